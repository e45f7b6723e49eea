"""The vocabulary of a layer: what an adapter declares about a layer class, and what one layer computes.

An `Adapter` is data: where a layer class keeps its weights and which family it computes. Together with one live layer
it gives a `LayerSpec`, the canonical description that the fast layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NormPlacement = Literal["post", "pre"]
Clamp = Literal["none", "non-finite", "always"]

LINEAR_SLOTS = ("query", "key", "value", "out", "up", "down")
NORM_SLOTS = ("norm1", "norm2")
LAYER_SCALE_SLOTS = ("scale1", "scale2")


@dataclass(frozen=True)
class NameMap:
    """Where a layer keeps its parts, as dotted paths from the layer.

    `norm1` belongs to the attention block and `norm2` to the feed-forward block, whether they come before (pre-LN) or
    after (post-LN) their block. `scale1` and `scale2` are the parameters of LayerScale (https://arxiv.org/abs/2103.17239).
    """

    query: str
    key: str
    value: str
    out: str
    norm1: str
    up: str
    activation: str
    down: str
    norm2: str
    scale1: str | None = None
    scale2: str | None = None
    # Attribute paths (not modules) that give the number of heads and the factor on the scores.
    heads: str = ""
    scaling: str | None = None

    @property
    def attention(self) -> str:
        """Path of the module that owns the query projection."""
        return self.query.rpartition(".")[0]


@dataclass(frozen=True)
class Adapter:
    """How to read one layer class. Declarative: it computes nothing.

    Args:
        norm_placement: "post" for `norm(x + block(x))`, "pre" for `x + block(norm(x))`.
        names: where the parts are. Several maps may be given where versions of transformers differ: the first one whose
            paths all exist in the layer is used.
        mask: name of the parameter of the layer's `forward` that carries the attention mask.
        mask_marks: what True means in a two-dimensional boolean mask that reaches the layer.
        clamp: what the layer does to its fp16 output: nothing, clamp it if any value is not finite, or always clamp.
        extra_outputs: None for a layer that returns a tensor, otherwise how many values follow the hidden states in the
            tuple that it returns (they are None unless attentions are asked for).
        time_major: True if hidden states arrive as `[S, B, D]`.
        requires: attribute paths with the values that this adapter describes. Another value means another program: such
            a layer is left alone.
        decoder: why layers of this class are decoders, if they are; they are left alone.
        keeps_hidden_states: True if the loop around the layers keeps every layer's output even when nobody asked, so
            that each layer has to return padded hidden states.
        padding_is_read: True if what follows the layers reads the hidden states at padding, or the path of an attribute of
            the layer that says so (the flag of a convolution behind the encoder). Zeros there would change the answers for
            real tokens, so a batch that has padding runs through the original layers.
        padding_readers: the same, said by the presence of a module in the converted model: endings of class names.
        schedule: how the loop around the layers calls them: "list" (each layer of the container once, in order) or
            "albert" (shared layers, called in groups).
    """

    norm_placement: NormPlacement
    names: tuple[NameMap, ...]
    mask: str = "attention_mask"
    mask_marks: Literal["tokens", "padding"] = "tokens"
    clamp: Clamp = "none"
    extra_outputs: int | None = None
    time_major: bool = False
    requires: Mapping[str, object] = field(default_factory=dict)
    decoder: str | None = None
    keeps_hidden_states: bool = False
    padding_is_read: bool | str = False
    padding_readers: tuple[str, ...] = ()
    schedule: Literal["list", "albert"] = "list"

    @property
    def family(self) -> str:
        return f"{self.norm_placement}-LN MHA"


@dataclass(frozen=True)
class LayerSpec:
    """What one layer computes, read from the live layer.

    Args:
        names: the name map that fits the layer.
        hidden_size: D.
        num_heads, head_dim: H and d; the projections are `[H * d, D]`.
        scale: the factor on `q kᵀ`.
        activation: a name of `fastencoder.kernels.ACTIVATIONS`, or "module" to call the layer's own element-wise module.
        intermediate_size: F, the width of the feed-forward block.
        linear_bytes: bytes of the six linear weights, at the layer's dtype.
    """

    adapter: Adapter
    names: NameMap
    hidden_size: int
    num_heads: int
    head_dim: int
    scale: float
    activation: str
    intermediate_size: int
    linear_bytes: int
