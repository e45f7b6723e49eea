"""Kinds of attention: what each family does between the projections of queries, keys and values and that of the output.

One short file a kind. A kind may read arguments of the layer's call (position embeddings, say), and whatever it makes of them
it keeps with the batch, so that the next layer finds it.
"""

from __future__ import annotations

from .call import LayerCall
from .kind import AttentionKind
from .pair_mask import CausalFlag, PairMask
from .position_bias import PositionBias, T5Bias
from .rope import RoFormerRope, Rope
from .spatial import SpatialPositions
from .windowed import Windowed
from .windows import CosineWindows, DecomposedWindows, ShiftedWindows

# By the name that adapters give.
KINDS: dict[str, AttentionKind] = {
    "plain": AttentionKind(),
    "pair-mask": PairMask(),
    "causal-flag": CausalFlag(),
    "spatial-positions": SpatialPositions("spatial_position_embeddings"),
    "object-queries": SpatialPositions("object_queries"),
    "position-embeddings": SpatialPositions("position_embeddings"),
    "shifted-windows": ShiftedWindows(),
    "cosine-windows": CosineWindows(),
    "decomposed-windows": DecomposedWindows(),
    "position-bias": PositionBias(),
    "t5": T5Bias(shared=True),
    "t5-own": T5Bias(shared=False),
    "rope": Rope(),
    "rope-interleaved": Rope(interleaved=True),
    "rope-roformer": RoFormerRope(),
    "rope-windowed": Windowed(Rope()),
}

__all__ = ["KINDS", "AttentionKind", "LayerCall"]
