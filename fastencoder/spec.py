"""The vocabulary of a layer: what an adapter declares about a layer class, and what one layer computes.

An `Adapter` is data: where a layer class keeps its weights and which family it computes. Together with one live layer
it gives a `LayerSpec`, the canonical description that the fast layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NormPlacement = Literal["post", "pre", "residual"]
Clamp = Literal["none", "non-finite", "always", "each-block"]

LINEAR_SLOTS = ("query", "key", "value", "qkv", "out", "gate", "up", "down")
NORM_SLOTS = (
    "norm1",
    "norm2",
    "output_norm1",
    "output_norm2",
    "query_norm",
    "key_norm",
    "value_norm",
    "mixed_norm",
    "inner_norm",
)
LAYER_SCALE_SLOTS = ("scale1", "scale2")


@dataclass(frozen=True)
class NameMap:
    """Where a layer keeps its parts, as dotted paths from the layer; empty where it has no such part.

    Linear slots are `nn.Linear`s, or parameters whose path ends in `weight` (their bias ends in `bias`, as in
    `nn.MultiheadAttention.in_proj_weight`). The attention has `query`, `key` and `value`, or all three in `qkv`; the
    feed-forward block has `up` and `down`, and if it is gated (`activation(gate(x)) * up(x)`) `gate`, or both in `up`; or it
    is the module `feed_forward`, which works on each token by itself and is called as it is.

    `norm1` belongs to the attention block and `norm2` to the feed-forward block, whether they come before (pre-LN) or
    after (post-LN) their block. `output_norm1` and `output_norm2` normalise what a block adds to the residual stream
    ("sandwich"), `query_norm`, `key_norm` and `value_norm` queries, keys and values, `mixed_norm` what comes into the
    attention's output projection, `inner_norm` what comes into `down`. `scale1` and `scale2` are the parameters of LayerScale
    (https://arxiv.org/abs/2103.17239).
    """

    out: str
    norm1: str
    norm2: str
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = ""
    up: str = ""
    gate: str = ""
    activation: str = ""
    down: str = ""
    feed_forward: str = ""
    output_norm1: str = ""
    output_norm2: str = ""
    query_norm: str = ""
    key_norm: str = ""
    value_norm: str = ""
    mixed_norm: str = ""
    inner_norm: str = ""
    scale1: str | None = None
    scale2: str | None = None
    # Attribute paths (not modules) that give the number of heads, of heads of keys and values (default: as many), the width of
    # a head (default: what the query projection makes of the heads), and the factor on the scores.
    heads: str = ""
    kv_heads: str = ""
    head_dim: str = ""
    scaling: str | None = None
    # Path of the attention module, where the query projection is not one of its attributes.
    attention_module: str = ""

    @property
    def attention(self) -> str:
        """Path of the module that attends, which owns the query projection."""
        return self.attention_module or (self.query or self.qkv).rpartition(".")[0]

    def given(self, slots: tuple[str, ...]) -> dict[str, str]:
        """The paths of those of `slots` that the layer has, by slot."""
        return {slot: getattr(self, slot) for slot in slots if getattr(self, slot)}


@dataclass(frozen=True)
class Adapter:
    """How to read one layer class. Declarative: it computes nothing.

    Args:
        norm_placement: "post" for `norm(x + block(x))`, "pre" for `x + block(norm(x))`, "residual" for `x + norm(block(x))`.
        names: where the parts are. Several maps may be given where versions of transformers or configurations differ: the
            first one whose paths all exist in the layer is used.
        former_names: older names of the layer's arguments that it still takes, with what they are called now.
        mask: name of the parameter of the layer's `forward` that carries the attention mask; "" for a layer that takes none,
            or whose kind of attention reads it.
        mask_marks: what True means in a two-dimensional boolean mask `[B, S]` that reaches the layer; "pairs" where a mask of
            two dimensions is one of queries and keys.
        mask_by_head: True if the mask that reaches the layer is materialised for every head, all heads alike.
        clamp: what the layer does to its fp16 output: nothing, clamp it if any value is not finite, or always clamp; or clamp
            after each block if any value is infinite.
        extra_outputs: None for a layer that returns a tensor, otherwise how many values follow the hidden states in the
            tuple that it returns (they are None unless attentions are asked for).
        gives_back: the arguments of the layer's `forward` that come first among those extra outputs, as they are after the
            call: a kind of attention may make one that was not given (T5's first layer makes the bias of all).
        time_major: True if hidden states arrive as `[S, B, D]`.
        grid: for layers that take images, how they lie: "channels last" `[B, h, w, D]` or "channels first" `[B, D, h, w]`. The
            kind of attention finds `(h, w)` as the argument `grid`.
        attention: what attention adds to queries, keys and values: a name of `fastencoder.layers.attention.KINDS`.
        qkv_order: how the rows of a `qkv` projection lie: all queries, then all keys, then all values ("qkv"), or queries, keys
            and values of one head after the other ("heads").
        gated_up: which half of an `up` that holds both goes through the activation: "first" or "second"; "" where there are no
            halves.
        activation: the feed-forward block's activation where the layer has no module for it: a name of
            `fastencoder.kernels.ACTIVATIONS`.
        scale: the factor on the scores where the layer has no attribute for it and it is not `head_dim ** -0.5`.
        scale_by_tanh: True if LayerScale's parameters are one number each, and its hyperbolic tangent is the scale.
        divisor: path of an attribute of the layer; what each block adds to the residual stream is divided by it.
        options: what else the kind of attention must know about the class.
        ignores: arguments of the layer's `forward` that change nothing in it.
        chosen_by: the argument `[B]` that chooses an expert or an adapter for each sequence: a `feed_forward` of the name map
            is called with hidden states `[T, 1, D]` and the choice for each token `[T]`.
        chosen_last: path of a method that is called with the choice for each token `[T]` and the sum `[T, D]` of the
            feed-forward block and its residual, before the last norm (post-LN only).
        offsets: for layers that take packed tokens `[T, D]`, the argument that holds the cumulative lengths of the sequences.
        label: the family's name, for people; by default it is made of `norm_placement`.
        extra_parameters: paths of parameters and buffers that the kind of attention reads.
        requires: attribute paths with the values that this adapter describes. Another value means another program: such
            a layer is left alone.
        bidirectional: True if the attention is never causal, whatever attributes it has or lacks: it does not go through
            transformers' attention functions, which take a module without `is_causal` for a causal one.
        may_stay_wide: True if `down` may be kept in float32 in a model of lower precision, as transformers loads T5: from there
            on the residual stream is float32.
        refuses: given a layer, why it is another program than this one, or None. For what `requires` cannot say.
        choose: given a layer, the adapter that describes it, for a class that computes one of several programs.
        sources: modules of Python, beside the layer's own file, whose classes its parts may be.
        decoder: why layers of this class are decoders, if they are; they are left alone.
        keeps_hidden_states: True if the loop around the layers keeps every layer's output even when nobody asked, so
            that each layer has to return padded hidden states.
        kept_for: the class, of the layer's own file, that `keeps_hidden_states` is for: it calls the owner, and unless it is
            asked for hidden states itself it reads no other than the last ones.
        works_between: an attribute of the owner that, unless it is None, works on hidden states between two layers: then each
            layer has to return padded hidden states.
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
    mask_marks: Literal["tokens", "padding", "pairs"] = "tokens"
    mask_by_head: bool = False
    clamp: Clamp = "none"
    extra_outputs: int | None = None
    gives_back: tuple[str, ...] = ()
    time_major: bool = False
    grid: Literal["", "channels last", "channels first"] = ""
    attention: str = "plain"
    qkv_order: Literal["qkv", "heads"] = "qkv"
    gated_up: Literal["", "first", "second"] = ""
    activation: str = ""
    scale: float | None = None
    scale_by_tanh: bool = False
    divisor: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    former_names: Mapping[str, str] = field(default_factory=dict)
    chosen_by: str = ""
    chosen_last: str = ""
    offsets: str = ""
    bidirectional: bool = False
    extra_parameters: tuple[str, ...] = ()
    label: str = ""
    requires: Mapping[str, object] = field(default_factory=dict)
    may_stay_wide: bool = False
    refuses: Callable[[Any], str | None] | None = None
    choose: Callable[[Any], Adapter] | None = None
    sources: tuple[str, ...] = ()
    decoder: str | None = None
    keeps_hidden_states: bool = False
    kept_for: str = ""
    works_between: str = ""
    padding_is_read: bool | str = False
    padding_readers: tuple[str, ...] = ()
    schedule: Literal["list", "albert"] = "list"

    def of(self, layer: Any) -> Adapter:
        """The adapter that describes this very layer of the class."""
        return self if self.choose is None else self.choose(layer)

    @property
    def family(self) -> str:
        return self.label or f"{self.norm_placement}-LN MHA"


@dataclass(frozen=True)
class LayerSpec:
    """What one layer computes, read from the live layer.

    Args:
        names: the name map that fits the layer.
        hidden_size: D.
        num_heads, num_kv_heads, head_dim: H, Hk and d; queries are `[H * d]` wide, keys and values `[Hk * d]`.
        scale: the factor on `q kᵀ`.
        activation: a name of `fastencoder.kernels.ACTIVATIONS`, or "module" to call the layer's own element-wise module; "" if
            the feed-forward block is one module.
        intermediate_size: F, the width of the feed-forward block; 0 if that block is one module.
        linear_bytes: bytes of the weights of all plain linear slots, at the layer's dtype.
        opaque: the linear slots that hold something else than a plain linear (an adapter, a quantised one): they are called as
            they are.
        wide: whether `down` is kept in float32 (`Adapter.may_stay_wide`).
    """

    adapter: Adapter
    names: NameMap
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    activation: str
    intermediate_size: int
    linear_bytes: int
    opaque: frozenset[str] = frozenset()
    wide: bool = False

    @property
    def has_choice(self) -> bool:
        """Whether a part of the layer is chosen for each sequence."""
        return bool(self.adapter.chosen_by and (self.names.feed_forward or self.adapter.chosen_last))

    @property
    def is_basic(self) -> bool:
        """Whether this is the first of all programs: plain attention over separate projections, two norms, two linears."""
        basic = {"query", "key", "value", "out", "up", "down"}
        return (
            self.adapter.attention == "plain"
            and not self.adapter.offsets
            and not self.has_choice
            and not self.opaque
            and not self.wide
            and set(self.names.given(LINEAR_SLOTS)) == basic
            and set(self.names.given(NORM_SLOTS)) == {"norm1", "norm2"}
        )
