"""A fast layer inside `torch.compile` and `torch.export`: the same program, as a graph without breaks.

Nothing on the host may depend on values here: how many tokens are real is known when the graph runs, not when it is made. Two
operators hold what is a branch elsewhere. `padding_geometry` reads the mask and returns as many positions as there are real
tokens, a size that the graph does not know. `packed_attention` attends inside the sequences. A mask that is materialised over
the queries looks like any other at trace time, so the first of the two also finds out whether it is key padding; where it is
not, it keeps every position and returns no offsets, and the second attends under the very mask that the layer was given.

An `ExportedProgram` of a fast model holds operators of the namespace `fastencoder`: `import fastencoder` before loading one.
Export under `torch.no_grad()`, or the original layers are exported, which have gradients.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

from .. import kernels
from ..eligibility import CAPTURE_MODULE, inspect_layer
from ..kernels._dispatch import register
from ..packing import NotAPaddingMask, PackedBatch
from ..parts import lookup
from ..spec import Adapter, LayerSpec
from . import trial
from .arguments import parameter_names
from .guards import RECORDED_OUTSIDE, WITHOUT_EFFECT
from .program import clamp
from .settings import computing_dtype, plain_weights
from .stack import Stack, StackCall, collected_outputs, constant_in_graphs

# Other subclasses of tensors have a meaning of their own. The last two stand for plain tensors while a graph is made.
_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
# What computes the same in training and in evaluation.
_WITHOUT_MODES = (nn.Linear, nn.LayerNorm, nn.Identity)


class TracedBatch:
    """A batch whose padding is dropped inside a graph: the counterpart of `packing.PackedBatch`.

    Args:
        indices: int32 `[T]`, the flat position of each token that is kept; None if the layer has no mask: then T = B * S.
        offsets: int32 `[B + 1]`; empty if the mask turns out not to be key padding: then T = B * S, too.
        mask: what the layer was given, None if nothing.
        batch, seqlen: B and S.
        dtype: of the padded hidden states.
    """

    def __init__(
        self,
        indices: torch.Tensor | None,
        offsets: torch.Tensor,
        mask: torch.Tensor | None,
        batch: int,
        seqlen: int,
        dtype: torch.dtype,
    ) -> None:
        self.indices = indices
        self.offsets = offsets
        self.mask = mask
        self.batch = batch
        self.seqlen = seqlen
        self.dtype = dtype

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """The tokens that are kept, `[T, D]`, of `hidden` `[B, S, D]`."""
        return hidden.flatten(0, 1) if self.indices is None else kernels.pack(hidden, self.indices)

    def to_padded(self, values: torch.Tensor) -> torch.Tensor:
        """`[B, S, D]` with zeros at padding, from `values` `[T, D]`."""
        if self.indices is None:
            return values.view(self.batch, self.seqlen, values.shape[-1])
        return kernels.unpack(values, self.indices, self.batch, self.seqlen)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Inside each sequence: three times `[T, H, d]` -> `[T, H, d]`."""
        if self.mask is None:
            return kernels.varlen_attention(q, k, v, self.offsets, self.seqlen, scale)
        return torch.ops.fastencoder.packed_attention(q, k, v, self.offsets, self.mask, self.batch, self.seqlen, scale)


def forward(layer: nn.Module, call: StackCall | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`FastLayer.forward` while a graph is made: on packed tokens, or as the original where that is not the same.

    Everything that is read here from the layer becomes a guard of the compiled graph: a layer that changes is traced anew.

    Raises:
        RuntimeError: packed tokens were handed on that do not belong to this graph.
    """
    adapter = layer._fastencoder.adapter
    hidden, mask, others = _arguments(type(layer).original_class, adapter.mask, args, kwargs)
    carried = call is not None and call.carried is not None
    if carried and not (call.carried is hidden and isinstance(call.batch, TracedBatch)):
        # torch.compile runs this part of the model without it then. Packed tokens are known by their identity.
        raise RuntimeError("the packed tokens that a layer handed on were changed, or come from outside of the graph")
    to_prove = layer._fastencoder.to_prove
    unproven = bool(to_prove) and (trial.UNMASKED if mask is None else trial.MASKED) in to_prove
    spec = None if unproven or _is_refused(layer, hidden, others) else _spec(layer, _implementation(layer, adapter))
    dtype = call.batch.dtype if carried else hidden.dtype
    if spec is None or not _fits(layer, spec, hidden, dtype) or not (carried or _is_readable(layer, spec, hidden, mask)):
        return layer._forward_original(call, args, kwargs)
    if carried:
        batch, values = call.batch, hidden[0]
        call.carried = None
    else:
        hidden = hidden.transpose(0, 1) if adapter.time_major else hidden
        batch = _geometry(layer._fastencoder.stack, call, hidden, mask, adapter)
        values = batch.take(hidden)
    computing = _computing_dtype(layer, _implementation(layer, adapter))
    values = _run(layer, spec, batch, values if values.dtype == computing else values.to(computing))
    on_turn = call is not None and call.advance(layer)
    if on_turn and call.may_carry and hasattr(type(call.next_layer()), "original_class"):  # a fast layer
        call.carried = output = values.unsqueeze(0)
    else:
        output = batch.to_padded(values if values.dtype == batch.dtype else values.to(batch.dtype))
        output = output.transpose(0, 1) if adapter.time_major else output
    return output if adapter.extra_outputs is None else (output, *(None,) * adapter.extra_outputs)


def _is_refused(layer: nn.Module, hidden: Any, others: dict[str, Any]) -> bool:
    """The conditions of an eager call (`fast_layer`), asked of the modules as they are while the graph is made."""
    if not isinstance(hidden, torch.Tensor) or type(hidden) not in _PLAIN or hidden.is_nested or hidden.dim() != 3:
        return True
    if any(value is not None and value is not False and name not in WITHOUT_EFFECT for name, value in others.items()):
        return True
    if others.get("cu_seq_lens_q") is not None:
        return True
    if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in layer.parameters())):
        return True
    if torch.is_autocast_enabled(hidden.device.type) or torch._C._are_functorch_transforms_active():
        return True
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return _any_touched(layer)


def _fits(layer: nn.Module, spec: LayerSpec, hidden: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether hidden states, in `dtype` before they were packed, have the dtype and device of the weights."""
    weight = lookup(layer, spec.names.query).weight
    return dtype == weight.dtype and hidden.device == weight.device


def _any_touched(layer: nn.Module) -> bool:
    """Whether a part of a layer is in training mode, patched, or looked at by a hook. The layer's own hooks do no harm."""
    parts = [layer]
    while parts:
        module = parts.pop()
        if module.training and type(module) not in _WITHOUT_MODES:
            return True
        if not callable(module.forward):  # always is: it is read so that a later patch of it is seen
            return True
        if module is not layer and _is_watched(module, RECORDED_OUTSIDE):
            return True
        parts.extend(child for child in module._modules.values() if child is not None)
    return False


def _is_watched(module: nn.Module, harmless: frozenset[str]) -> bool:
    """Whether a hook of a module looks at it now. Hooks of transformers look only if something is recorded, `harmless`
    aside."""
    if module._forward_pre_hooks:
        return True
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", None) != CAPTURE_MODULE:
            return True
        recorded = _recorded()
        if recorded is None or not recorded <= harmless:
            return True
    return False


def _recorded() -> frozenset[str] | None:
    """What transformers is recording, or None where that cannot be known: Dynamo does not read context variables."""
    if not torch.compiler.is_dynamo_compiling():
        return collected_outputs()
    collector = sys.modules[CAPTURE_MODULE]._active_collector
    return frozenset(collector.global_var or ()) if collector.compiling else None


def _is_readable(layer: nn.Module, spec: LayerSpec, hidden: torch.Tensor, mask: Any) -> bool:
    """Whether `padding_geometry` understands the form of a mask. Its values are not known here."""
    adapter = layer._fastencoder.adapter
    if mask is None:
        return not _is_causal_without_mask(lookup(layer, spec.names.attention))
    if layer._fastencoder.reads_padding(layer) or not isinstance(mask, torch.Tensor) or type(mask) not in _PLAIN:
        return False
    batch, seqlen = (hidden.shape[1], hidden.shape[0]) if adapter.time_major else hidden.shape[:2]
    if mask.dim() == 2:
        return mask.shape[0] == batch and mask.shape[1] == seqlen and not mask.is_floating_point()
    return (
        mask.dim() == 4
        and mask.shape[1] == 1
        and mask.shape[3] == seqlen
        and (mask.shape[0] == batch or mask.shape[0] == 1)
        and (mask.shape[2] == seqlen or mask.shape[2] == 1)
        and (mask.dtype == torch.bool or mask.dtype == hidden.dtype)
    )


def _geometry(
    stack: Stack | None, call: StackCall | None, hidden: torch.Tensor, mask: torch.Tensor | None, adapter: Adapter
) -> TracedBatch:
    """Where the real tokens of `hidden` `[B, S, D]` are; read once for all layers that are given the same mask."""
    batch, seqlen = hidden.shape[:2]
    known = call.known_batch(mask, *hidden.shape[:2]) if call is not None else None
    if isinstance(known, TracedBatch) and known.batch == batch and known.seqlen == seqlen:
        return known
    if mask is None:
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * seqlen
        found = TracedBatch(None, offsets, None, batch, seqlen, hidden.dtype)
    else:
        indices, offsets = torch.ops.fastencoder.padding_geometry(mask, batch, seqlen, adapter.mask_marks)
        found = TracedBatch(indices, offsets, mask, batch, seqlen, hidden.dtype)
    if call is not None:
        call.keep_batch(mask, found)
        if call.may_carry is None:
            call.may_carry = mask is not None and _may_carry(stack, call)
    return found


def _may_carry(stack: Stack, call: StackCall) -> bool:
    """Whether packed tokens may travel between the layers of this call (see `stack`): nobody else must look at them."""
    if not stack.may_carry or call.wants_hidden_states:
        return False
    return not any(_is_watched(layer, RECORDED_OUTSIDE - {"hidden_states"}) for layer in call.schedule)


def _is_causal_without_mask(attention: nn.Module) -> bool:
    """As in eager calls: transformers takes attention without an `is_causal` attribute for causal, except in eager mode."""
    config = getattr(attention, "config", None)
    if config is None or hasattr(attention, "is_causal"):
        return False
    return getattr(config, "_attn_implementation", "eager") != "eager"


def _run(layer: nn.Module, spec: LayerSpec, batch: TracedBatch, x: torch.Tensor) -> torch.Tensor:
    """What `program.run_layer` computes, from the model's own parameters: `[T, D]` -> `[T, D]`, in the dtype of `x`.

    Parameters of another dtype are cast inside the graph, so that there is no copy that could be stale."""
    names = spec.names
    norm1, norm2 = lookup(layer, names.norm1), lookup(layer, names.norm2)
    weight1, bias1, weight2, bias2 = (_in(x.dtype, each) for each in (norm1.weight, norm1.bias, norm2.weight, norm2.bias))
    if spec.adapter.norm_placement == "post":
        mixed = _attention(layer, spec, batch, x)
        x, _ = kernels.add_norm(mixed, x, weight1, bias1, norm1.eps)
        x, _ = kernels.add_norm(_feed_forward(layer, spec, x), x, weight2, bias2, norm2.eps)
    else:
        scales = (None if path is None else lookup(layer, path) for path in (names.scale1, names.scale2))
        scale1, scale2 = (_in(x.dtype, scale) for scale in scales)
        mixed = _attention(layer, spec, batch, F.layer_norm(x, x.shape[1:], weight1, bias1, norm1.eps))
        normed, x = kernels.add_norm(mixed, x, weight2, bias2, norm2.eps, scale1)
        inner = _feed_forward(layer, spec, normed)
        x = x + inner if scale2 is None else torch.addcmul(x, inner, scale2)
    return clamp(x, spec)


def _attention(layer: nn.Module, spec: LayerSpec, batch: TracedBatch, x: torch.Tensor) -> torch.Tensor:
    """Attention with its output projection: `[T, D]` -> `[T, D]`."""
    names, heads = spec.names, (spec.num_heads, spec.head_dim)
    q, k, v = (_linear(layer, path, x).unflatten(1, heads) for path in (names.query, names.key, names.value))
    scale = lookup(layer, names.scaling) if names.scaling else None
    mixed = batch.attention(q, k, v, spec.scale if scale is None else scale)
    return _linear(layer, names.out, mixed.flatten(1))


def _feed_forward(layer: nn.Module, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
    names = spec.names
    if spec.activation == "module":
        inner = _in(x.dtype, lookup(layer, names.activation)(_linear(layer, names.up, x)))
    else:
        inner = _linear(layer, names.up, x, spec.activation)
    return _linear(layer, names.down, inner)


def _linear(layer: nn.Module, path: str, x: torch.Tensor, activation: str = "identity") -> torch.Tensor:
    linear = lookup(layer, path)
    return kernels.linear(x, _in(x.dtype, linear.weight), _in(x.dtype, linear.bias), activation)


def _in(dtype: torch.dtype, tensor: Any) -> Any:
    """A tensor in this dtype, and without a node in the graph where it has it; None for None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _implementation(layer: nn.Module, adapter: Adapter) -> str | None:
    attention = lookup(layer, adapter.names[0].attention)
    return getattr(getattr(attention, "config", None), "_attn_implementation", None)


@constant_in_graphs
def _spec(layer: nn.Module, implementation: str | None) -> LayerSpec | None:
    """The spec of a layer as it is now, found outside of the graph, or None. What it rests on is read inside as well, for the
    sake of guards: by `_any_touched`, and which attention function the layer would call."""
    state = layer._fastencoder
    if state.binding is not None and state.binding.holds(layer):
        spec = state.binding.spec
    else:
        spec = inspect_layer(layer, type(layer).original_class, state.adapter).spec
    if spec is None or not spec.is_basic:
        return None
    norms = [lookup(layer, path) for path in (spec.names.norm1, spec.names.norm2)]
    return spec if all(type(norm) is nn.LayerNorm for norm in norms) else None


@constant_in_graphs
def _computing_dtype(layer: nn.Module, implementation: str | None) -> torch.dtype | None:
    spec = _spec(layer, implementation)
    return None if spec is None else computing_dtype(layer._fastencoder.settings, spec, plain_weights(layer, spec))


@constant_in_graphs
def _parameter_names(original_class: type) -> tuple[str, ...]:
    return parameter_names(original_class)


def _arguments(original_class: type, mask_name: str, args: tuple, kwargs: dict) -> tuple[Any, Any, dict[str, Any]]:
    """Hidden states, mask, and everything else by name."""
    names = _parameter_names(original_class)
    given = dict(zip(names, args, strict=False))
    given.update(kwargs)
    if len(args) > len(names):
        given["*args"] = args[len(names) :]
    return given.pop(names[0], None), given.pop(mask_name, None), given


def _geometry_of(mask: torch.Tensor, batch: int, seqlen: int, marks: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastencoder::padding_geometry`: indices int32 `[T]` and offsets int32 `[B + 1]` of the tokens that a mask keeps.

    For a mask that is not key padding: every position, and offsets `[0]`.
    """
    indices, offsets = None, mask.new_empty(0, dtype=torch.int32)
    with contextlib.suppress(NotAPaddingMask):
        found = PackedBatch.geometry(mask.new_empty(batch, seqlen, 0), mask, marks)
        indices, offsets = found.indices, found.offsets.clone()  # offsets may be kept for other calls
    if indices is None:
        indices = torch.arange(batch * seqlen, dtype=torch.int32, device=mask.device)
    return indices, offsets


def _fake_geometry_of(mask: torch.Tensor, batch: int, seqlen: int, marks: str) -> tuple[torch.Tensor, torch.Tensor]:
    return mask.new_empty(_unknown_size(), dtype=torch.int32), mask.new_empty(_unknown_size(), dtype=torch.int32)


def _unknown_size() -> torch.SymInt:
    """A size that is known when the graph runs. torch.compile breaks a graph at such sizes unless it is told otherwise,
    although everything behind this operator is made for them."""
    context = torch.library.get_ctx()
    try:
        return context.new_dynamic_size()
    except DynamicOutputShapeException:
        if context._shape_env is None:
            raise
        from torch._library.fake_impl import allocate_size

        return allocate_size(context._shape_env)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    mask: torch.Tensor,
    batch: int,
    seqlen: int,
    scale: float,
) -> torch.Tensor:
    """`fastencoder::packed_attention`: inside the sequences between `offsets`; without offsets, the padded form's attention
    under its mask, `[B or 1, 1, 1 or S, S]`, boolean or added to the scores."""
    if offsets.numel():
        return kernels.varlen_attention(q, k, v, offsets, seqlen, scale)
    if mask.dtype not in (torch.bool, q.dtype):
        mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)  # the lowest value of a wider dtype would become -inf
    q, k, v = (x.unflatten(0, (batch, seqlen)).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).flatten(0, 1).contiguous()


def _fake_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    mask: torch.Tensor,
    batch: int,
    seqlen: int,
    scale: float,
) -> torch.Tensor:
    return q.new_empty(q.shape)


register(
    "padding_geometry(Tensor mask, SymInt batch, SymInt seqlen, str marks) -> (Tensor, Tensor)",
    _geometry_of,
    _fake_geometry_of,
)
register(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor mask, SymInt batch, SymInt seqlen, float scale)"
    " -> Tensor",
    _attend,
    _fake_attend,
)
