"""The functions that transformers calls by the name "fastencoder", and the way back to those that it called before.

A converted attention module runs its own forward; where that asks transformers' attention interface for a function, it is
given `attend`. The model's configs keep the name that they have, so masks are made in the form that this name stands for: no
padding can be lost on the way, and whatever `attend` cannot do is passed on to the function of that name, unchanged.

The name has a mask function too. Without one transformers would drop the padding mask, without a word, in a model whose
config somebody sets to this name.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from ..eligibility import DTYPES, MAX_HEAD_DIM
from ..kernels import varlen_attention
from ..kernels._dispatch import on_gpu
from ..layers.guards import WITHOUT_EFFECT, Delegated
from ..packing import PackedBatch
from .window import read_geometry

NAME = "fastencoder"  # transformers takes every name with "flash" in it for flash attention
MIN_HEAD_DIM_ON_GPU = 16
# The functions that `attend` agrees with wherever it does not pass a call on.
KNOWN_FUNCTIONS = ("sdpa", "eager")
# Arguments that neither of them looks at (a window is in the mask already), or that are looked at here.
_UNDERSTOOD = WITHOUT_EFFECT | {"dropout", "is_causal", "position_bias", "scaling", "sliding_window"}


@dataclass(frozen=True)
class CallSite:
    """Where the forward of an attention class asks for a function.

    Args:
        interface: transformers' `ALL_ATTENTION_FUNCTIONS`, as the class's own file sees it.
        eager: the file's function for "eager".
    """

    interface: Any
    eager: Callable[..., Any]

    def function(self, name: str | None) -> Callable[..., Any]:
        """What the forward would call for an implementation of this name."""
        found: Callable[..., Any] = self.interface.get_interface(name, self.eager)
        return found


@cache
def call_site(cls: type[nn.Module]) -> CallSite | None:
    """Where a class of `transformers.models` asks for the function that its own config names; None if it does not."""
    function = inspect.unwrap(cls.forward)
    code = getattr(function, "__code__", None)
    if code is None or not cls.__module__.startswith("transformers.models.") or function.__module__ != cls.__module__:
        return None
    names = set(code.co_names)
    if not {"ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation"} <= names:
        return None
    eager = [name for name in names if name.endswith("eager_attention_forward")]
    found = function.__globals__
    if len(eager) != 1 or eager[0] not in found or "ALL_ATTENTION_FUNCTIONS" not in found:
        return None
    return CallSite(found["ALL_ATTENTION_FUNCTIONS"], found[eager[0]])


def register_functions() -> None:
    """Gives transformers the functions of `NAME`. Imports transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, padding_mask)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention for transformers: over real tokens only where that is exact, by the function of before otherwise.

    Args:
        module: the attention module. If it was not converted, no mask is taken for padding that may be left out.
        query: `[B, H, S, d]`.
        key, value: `[B, Hk, S, d]`.
        attention_mask: what the function of before would get.
        kwargs: `scaling`, `dropout`, `is_causal` and whatever else the module passes; an argument that is not known to
            be without effect passes the call on.

    Returns:
        `[B, S, H, d]`, zero at padding, and None: attention weights exist only where a call is passed on.
    """
    state = module.__dict__.get("_fastencoder_attention")
    name = implementation_of(module)
    try:
        output = _attend(module, state, name, query, key, value, attention_mask, kwargs)
    except Delegated as reason:
        if state is not None:
            state.delegated(str(reason))
        return _function_of_before(module, name)(module, query, key, value, attention_mask, **kwargs)
    if state is not None:
        state.fast_calls += 1
    return output, None


def implementation_of(module: nn.Module) -> str | None:
    """The name of the attention function in the config of an attention module."""
    return getattr(module.__dict__.get("config"), "_attn_implementation", None)


def _function_of_before(module: nn.Module, name: str | None) -> Callable[..., Any]:
    site = call_site(getattr(module, "original_class", type(module)))
    if name in KNOWN_FUNCTIONS and site is not None:
        return site.function(name)
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    sdpa: Callable[..., Any] = functions["sdpa"]  # somebody has set a config to NAME: `padding_mask` speaks its language
    return sdpa


def _attend(
    module: nn.Module,
    state: Any,
    name: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """`[B, S, H, d]`. Raises Delegated."""
    _check_tensors(module, query, key, value)
    for argument, given in kwargs.items():
        if given is not None and given is not False and argument not in _UNDERSTOOD:
            raise Delegated(f"the argument {argument} is given")
    if kwargs.get("dropout"):
        raise Delegated("there is dropout")
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(scale, float | int) or not scale > 0 or not math.isfinite(scale):
        raise Delegated(f"the scores are multiplied by {scale!r}")
    causal = False
    if mask is None and name != "eager":  # eager attention looks at the mask alone, sdpa looks at it first
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    bias = kwargs.get("position_bias")
    if bias is not None:
        _check_bias(query, bias)
    batch = _batch(state, name, query, mask, bias, kwargs)
    q, k, v = (batch.take(x.transpose(1, 2).flatten(2)).unflatten(1, (-1, x.shape[-1])) for x in (query, key, value))
    tiles = batch.tiles(query.shape[-1], query.dtype)
    mixed = varlen_attention(
        q, k, v, batch.offsets, batch.max_seqlen, float(scale), causal=causal, bias=bias, tiles=tiles
    )
    if not batch.seqlen:
        return mixed.unsqueeze(0)  # it came packed
    return batch.to_padded(mixed.flatten(1)).unflatten(2, mixed.shape[1:])


def _check_tensors(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    tensors = (query, key, value)
    if any(type(x) is not torch.Tensor or x.dim() != 4 for x in tensors):
        raise Delegated("queries, keys and values are not tensors [B, H, S, d]")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise Delegated("a gradient may be needed")
    if len({(x.dtype, x.device) for x in tensors}) > 1 or query.dtype not in DTYPES:
        raise Delegated("queries, keys and values are not of one dtype on one device")
    batch, heads, seqlen, dim = query.shape
    groups = getattr(module, "num_key_value_groups", 1)
    if key.shape != value.shape or key.shape != (batch, heads // groups, seqlen, dim) or heads % groups:
        raise Delegated("queries and keys have different shapes: this is not self-attention without a cache")
    if dim > MAX_HEAD_DIM or dim < MIN_HEAD_DIM_ON_GPU and on_gpu(query.device):
        raise Delegated(f"the head size is {dim}")


def _check_bias(query: torch.Tensor, bias: torch.Tensor) -> None:
    batch, heads, seqlen, _ = query.shape
    shapes = [(b, h, seqlen, seqlen) for b in (1, batch) for h in (1, heads)]
    if type(bias) is not torch.Tensor or bias.shape not in shapes or bias.dtype != query.dtype:
        raise Delegated("the position bias is not [B or 1, H or 1, S, S] in the dtype of the queries")
    if torch.is_grad_enabled() and bias.requires_grad:
        raise Delegated("a gradient may be needed")


def _batch(
    state: Any,
    name: str | None,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> PackedBatch:
    """The sequences to attend in, without values. Raises Delegated."""
    rows = query[:, 0]  # [B, S, d]
    if mask is None:
        offsets = kwargs.get("cu_seq_lens_q")
        if offsets is not None:
            if rows.shape[0] != 1 or bias is not None:
                raise Delegated("cu_seq_lens_q is given and the queries are not [1, H, T, d], or they have a bias")
            return PackedBatch.from_offsets(rows[0], offsets, kwargs.get("max_length_q"))
        if name == "eager" and state is not None and state.padding_is_read is not None:
            raise Delegated("eager attention answers with weights too, and what this layer does with them is not known")
        batch = PackedBatch.geometry(rows, None)
    else:
        if state is None or state.padding_is_read is not None:
            raise Delegated("not converted" if state is None else state.padding_is_read)
        if type(mask) is not torch.Tensor or mask.dim() != 4 or name == "eager" and not mask.is_floating_point():
            raise Delegated("the mask is not [B, 1, S, S] in the form of this model's attention function")
        batch = read_geometry(rows, mask, padding_at_end=bias is not None)
    if batch.indices is None and not on_gpu(query.device):
        raise Delegated("there is no padding to leave out, and on a CPU the original attention is as fast")
    return batch


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for `attend`, as transformers asks for masks: what `sdpa` would get, or a view of the same values.

    Key padding `[B, S]` of bidirectional attention becomes a view `[B, 1, S, S]` over the same memory, and nothing waits
    for the device to find out whether there is any. Everything else (causal masks, windows, caches) is made by transformers.
    """
    masking = sys.modules["transformers.masking_utils"]
    plain = (
        mask_function is masking.bidirectional_mask_function
        and attention_mask is not None
        and attention_mask.shape == (batch_size, kv_length)
        and attention_mask.dtype == torch.bool
        and q_offset == kv_offset == 0
        and not torch.compiler.is_compiling()
    )
    if plain and attention_mask is not None:
        return attention_mask[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    made: torch.Tensor | None = masking.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs
    )
    return made
