"""Kinds of attention: what each family does between the projections of queries, keys and values and that of the output.

One short file a kind. A kind may read arguments of the layer's call (position embeddings, say), and whatever it makes of them
it keeps with the batch, so that the next layer finds it.
"""

from __future__ import annotations

from .biased import Biased
from .blocks import BlockDiagonalRope
from .call import LayerCall
from .dense_bias import GridBias, LayoutBias
from .disentangled import Disentangled, DisentangledV1
from .joined_windows import JoinedWindows
from .kind import AttentionKind
from .pair_mask import CausalFlag, PairMask
from .per_layer_input import PerLayerInput
from .position_bias import PositionBias, T5Bias
from .qformer import QFormer
from .query_bias import BoxBias, DistanceKeys, GatedBias
from .rope import AxialRope, RoFormerRope, Rope
from .softcap import Softcap
from .spatial import SpatialPositions
from .turned_windows import TurnedWindows
from .vision_rope import ComplexRope, VisionRope
from .vjepa_rope import VJepaRope
from .windowed import Windowed
from .windows import CosineWindows, DecomposedWindows, ShiftedWindows

# By the name that adapters give.
KINDS: dict[str, AttentionKind] = {
    "plain": AttentionKind(),
    "biased": Biased(),
    "joined-windows": JoinedWindows(),
    "softcap": Softcap(),
    "windowed": Windowed(AttentionKind()),
    "pair-mask": PairMask(),
    "causal-flag": CausalFlag(),
    "spatial-positions": SpatialPositions("spatial_position_embeddings"),
    "object-queries": SpatialPositions("object_queries"),
    "position-embeddings": SpatialPositions("position_embeddings"),
    "shifted-windows": ShiftedWindows(),
    "cosine-windows": CosineWindows(),
    "decomposed-windows": DecomposedWindows(),
    "q-former": QFormer(),
    "position-bias": PositionBias(),
    "t5": T5Bias(shared=True),
    "t5-own": T5Bias(shared=False),
    "disentangled": Disentangled(),
    "disentangled-v1": DisentangledV1(),
    "layout-v2": LayoutBias("v2"),
    "layout-v3": LayoutBias("v3"),
    "layout-boxes": LayoutBias("boxes"),
    "grid": GridBias(owner="", shared=""),
    "grid-in-attention": GridBias(owner="attention.attention", shared="relative_position_bias"),
    "gated-bias": GatedBias(),
    "box-bias": BoxBias(),
    "distance-keys": DistanceKeys(),
    "rope": Rope(),
    "rope-interleaved": Rope(interleaved=True, repeats="neighbours"),
    "rope-neighbours": Rope(interleaved=True),
    "rope-roformer": RoFormerRope(),
    "rope-windowed": Windowed(Rope()),
    "rope-windowed-softcap": Windowed(Rope(), Softcap()),
    "rope-per-layer-input": PerLayerInput(Rope()),
    "rope-axial": AxialRope(),
    "rope-vision": VisionRope(),
    "rope-vision-interleaved": VisionRope(interleaved=True),
    "rope-vision-prefix": VisionRope(prefix=True),
    "rope-vision-blocks": BlockDiagonalRope(),
    "rope-complex": ComplexRope(),
    "rope-vjepa": VJepaRope(),
    "rope-vision-windows": TurnedWindows(),
}

__all__ = ["KINDS", "AttentionKind", "LayerCall"]
