"""The fast layer: a layer whose class was swapped for a subclass that runs a spec on packed tokens.

A call that the fused program cannot do exactly goes to the original `forward`, which is still there as `super().forward`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..eligibility import has_foreign_hooks
from ..instance_forward import in_one_place
from ..packing import NotAPaddingMask, PackedBatch
from ..parts import lookup
from ..spec import Adapter
from . import traced, trial
from .arguments import first_parameter, read_arguments
from .attention import KINDS
from .binding import Binding
from .deferred import restored
from .guards import Delegated, is_out_of_memory, refuse_arguments, refuse_hidden, refuse_mode
from .invariance import BatchVariantError, invariant_kernels, layer_refusal
from .joined import apart, separate
from .packed_input import within_sequences
from .program import run_layer
from .settings import DEFAULT, Settings, plain_weights
from .snapshot import Part
from .stack import Stack, StackCall, abandon_call, collected_outputs, current_call
from .traffic import Traffic
from .weights import Projections, joinable
from .whole import FEW_TOKENS, input_of, run_few, run_whole

_NO_MEMORY = "there was no memory for a copy of the layer's weights"

Run = Callable[[PackedBatch, torch.Tensor], torch.Tensor]  # one layer on packed tokens: [T, D] -> [T, D]


class LayerState:
    """What a fast layer knows beside its own parameters: kept in `layer._fastencoder`, outside of the state_dict.

    Attributes:
        fast_calls, delegated_calls: how many calls ran fused, and how many ran the original forward.
        last_reason: why the latest delegated call was.
        to_prove: the kinds of calls in which the layer has yet to agree with its own forward (`trial`); none if its source is
            that of a tested version.
        settings: in which dtype it computes, and what memory it may take.
        traffic: which forwards of the converted model run.
    """

    def __init__(
        self,
        adapter: Adapter,
        stack: Stack | None,
        padding_is_read: bool = False,
        unproven: bool = False,
        settings: Settings = DEFAULT,
        traffic: Traffic | None = None,
    ) -> None:
        self.adapter = adapter
        self.traffic = traffic or Traffic()
        self.settings = settings
        self.stack = stack
        self.padding_is_read = padding_is_read
        self.to_prove: tuple[str, ...] = trial.KINDS if unproven else ()
        self.joined = False  # some parameters of the layer share one storage
        self._forget()

    def _forget(self) -> None:
        kind = KINDS[self.adapter.attention]
        named = [name for name in (self.adapter.offsets, self.adapter.chosen_by) if name]
        self.understood = kind.reads.union(self.adapter.ignores, named)
        self.binding: Binding | None = None
        self.projections: Projections | None = None
        self.starved = False  # there was no memory for the projections
        self.refusal: str | None = None  # why its bits would depend on the batch
        self.fast_calls = 0
        self.delegated_calls = 0
        self.last_reason: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the layer finds its own parts and weights.
        kept = ("adapter", "settings", "stack", "traffic", "padding_is_read", "joined", "to_prove")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def release(self, layer: nn.Module) -> None:
        """Undoes what running the layer fast has done to its parameters' storage."""
        if not self.joined:
            return
        for names in self.adapter.names:
            for linears in joinable(layer, names):
                for name in ("weight", "bias"):
                    parameters = [getattr(linear, name, None) for linear in linears]
                    separate([parameter for parameter in parameters if isinstance(parameter, nn.Parameter)])

    def reads_padding(self, layer: nn.Module) -> bool:
        """Whether code behind the layers reads the hidden states at padding (`spec.Adapter.padding_is_read`)."""
        said = self.adapter.padding_is_read
        return self.padding_is_read or (bool(lookup(layer, said)) if isinstance(said, str) else said)

    def leaving(self, batch: PackedBatch, values: torch.Tensor) -> torch.Tensor:
        """Packed tokens `[T, D]` in the dtype of the padded hidden states that they came from."""
        own = batch.dtype
        return values if self.settings.compute_dtype in (None, own) else values.to(own)

    def ready(self, layer: nn.Module) -> tuple[Binding, Projections]:
        """The layer's parts and weights as they are now. Raises Delegated if they are no longer eligible."""
        if not self._is_current(layer):
            with self.traffic.alone():  # parameters may move, and one copy of the weights is enough
                if not self._is_current(layer):
                    self._prepare(layer)
        binding, projections = self.binding, self.projections
        if binding.spec is None:
            raise Delegated(f"the layer has changed since its conversion: {'; '.join(binding.reasons)}")
        if projections is None:
            raise Delegated(self.refusal or _NO_MEMORY)
        if binding.any_training():
            raise Delegated("a part of the layer is in training mode")
        return binding, projections

    def _is_current(self, layer: nn.Module) -> bool:
        """Whether parts and weights are known, and what they were when they were looked at."""
        binding, projections = self.binding, self.projections
        if binding is None or not binding.holds(layer):
            return False
        return binding.spec is None or self.starved or (projections is not None and projections.current(binding))

    def _prepare(self, layer: nn.Module) -> None:
        self.projections, self.starved, self.refusal = None, False, None
        if self.stack is not None:
            self.stack.snapshot = None  # which would keep a copy of weights that are no longer used
        self.binding = Binding(layer, type(layer).original_class, self.adapter)
        if self.binding.spec is None:
            return
        if self.settings.batch_invariant:
            self.refusal = layer_refusal(layer, self.binding.spec, plain_weights(layer, self.binding.spec))
            if self.refusal is not None:
                return
        try:
            self.projections = Projections(self.binding, self.settings)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.starved = self.joined = True  # `release` looks at what there is
            if not self.traffic.announced:
                self.traffic.announced = True
                _warn_starved()
            return
        self.joined = self.joined or self.projections.layout == "joined"


class FastLayer(nn.Module):
    """Mixed in before the layer's own class (see `classes.fast_class`)."""

    original_class: type[nn.Module]
    _fastencoder: LayerState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, "_fastencoder", None)
        if state is None:  # `reverse` ran since this method was looked up
            return self.forward(*args, **kwargs)
        call = current_call(state.stack)
        if call is not None and call.repeats(type(self), args, kwargs):
            state.fast_calls += 1
            return self._pass_on(state.adapter, call)
        if state.settings.batch_invariant and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            raise BatchVariantError("it is being compiled or traced")
        if torch.jit.is_tracing():
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling() or (call is not None and isinstance(call.batch, traced.TracedBatch)):
            return traced.forward(self, call, args, kwargs)
        if call is not None and call.has_ended:
            abandon_call(state.stack)
            call = None
        if call is not None:  # its owner has entered
            return self._answer(state, call, args, kwargs)
        with state.traffic.forward():
            if vars(self).get("_fastencoder") is state:
                return self._answer(state, None, args, kwargs)
        return self.forward(*args, **kwargs)

    def _answer(self, state: LayerState, call: StackCall | None, args: tuple, kwargs: dict) -> Any:
        if state.settings.batch_invariant:
            return self._answer_invariant(state, call, args, kwargs)
        try:
            try:
                output = self._forward_fast(state, call, args, kwargs)
                state.fast_calls += 1
            except Delegated as reason:
                state.delegated_calls += 1
                state.last_reason = str(reason)
                output = self._forward_original(call, args, kwargs)
            return output
        except BaseException:  # KeyboardInterrupt too: a hook of the owner would not see it
            abandon_call(state.stack)
            raise

    def _answer_invariant(self, state: LayerState, call: StackCall | None, args: tuple, kwargs: dict) -> Any:
        """Where the original forward, whose bits depend on the batch, is no answer."""
        try:
            with invariant_kernels(next(self.parameters()).device):
                output = self._forward_fast(state, call, args, kwargs)
        except Delegated as reason:
            abandon_call(state.stack)
            raise BatchVariantError(reason) from None
        except BaseException:
            abandon_call(state.stack)
            raise
        state.fast_calls += 1
        return output

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """The layer's own; of parameters that share one storage, each by itself."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        if self._fastencoder.joined and not keep_vars and not args:
            for name, parameter in self.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
                if name in state and parameter.untyped_storage().nbytes() > parameter.nbytes:
                    state[name] = apart(state[name])
        return state

    def _forward_fast(self, state: LayerState, call: StackCall | None, args: tuple, kwargs: dict) -> Any:
        adapter = state.adapter
        others = self._arguments(args, kwargs)
        hidden, mask = others.pop(first_parameter(type(self).original_class), None), others.pop(adapter.mask, None)
        refuse_arguments(others, state.understood)
        if adapter.extra_outputs and call is not None and call.wants_attentions:
            raise Delegated("the loop around the layers reads the attention weights that they return")
        mask = KINDS[adapter.attention].mask(mask, others)
        if call is not None and call.whole_output is not None and call.carried is hidden:
            return self._pass_on(adapter, call)
        if call is not None and call.carried is not None and call.carried is not hidden and call.next_layer() is self:
            raise RuntimeError(
                f"{state.stack.owner_class} works on the hidden states between its layers, which are packed there: "
                "reverse(model), and report the model, so that its layers are not run this way."
            )
        refuse_hidden(hidden, (2, 3) if adapter.offsets else (4,) if adapter.grid else (3,))
        refuse_mode(self, hidden)
        part = binding, projections = self._ready(state, call)
        if state.to_prove:
            self._prove(call, hidden, args, kwargs)
        carried = call is not None and call.carried is hidden  # in the dtype in which the layers compute
        dtype = call.batch.dtype if carried else hidden.dtype
        fits = dtype == projections.dtype or (binding.spec.wide and dtype == torch.float32)
        if not fits or hidden.device != projections.device:
            raise Delegated("the hidden states have another dtype or device than the weights")
        run = partial(run_layer, binding, projections, layer=self, arguments=others, mask=mask)
        output = self._run(run, part, call, hidden, mask, others)
        if call is not None and call.whole_output is not None:
            call.accepted = type(self), args, kwargs
        if adapter.gives_back:
            given_back = [others.get(name) for name in adapter.gives_back]
            output = (output[0], *given_back, *output[1 + len(given_back) :])
        return output

    def _ready(self, state: LayerState, call: StackCall | None) -> Part:
        """As `LayerState.ready`, for all layers at once where that is known to be possible."""
        known = state.stack.snapshot if call is not None and call.position == 0 else None
        # Where gradients are on, each layer is asked whether it needs one.
        if known is not None and not torch.is_grad_enabled() and call.next_layer() is self and known.holds(call.schedule):
            call.snapshot = known
            return known.parts[0]
        return state.ready(self)

    def _run(
        self, run: Run, part: Part, call: StackCall | None, hidden: torch.Tensor, mask: Any, others: dict[str, Any]
    ) -> Any:
        """In the form in which the hidden states arrive: packed by the layer before, by the owner, nested, or padded."""
        adapter = part[0].spec.adapter
        if adapter.offsets and (adapter.offsets in others or hidden.dim() == 2):
            return self._run_packed_by_owner(run, adapter, call, hidden, mask, others)
        if adapter.grid:
            return self._run_grid(run, part, call, hidden, mask, others)
        if hidden.is_nested:
            return self._run_nested(run, adapter, hidden, mask)
        if call is not None and call.carried is hidden:
            return self._run_carried(run, adapter, call)
        if others.get("cu_seq_lens_q") is not None:
            if mask is not None:
                raise Delegated("both a mask and cu_seq_lens_q are given")
            return self._run_already_packed(run, adapter, call, hidden, others)
        return self._run_padded(run, part, call, hidden, mask)

    def _prove(self, call: StackCall | None, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        carried = call is not None and call.carried is hidden
        shape = (call.batch.batch, call.batch.seqlen, hidden.shape[2]) if carried else tuple(hidden.shape)
        if carried and self._fastencoder.adapter.time_major:
            shape = (shape[1], shape[0], shape[2])
        trial.prove(self, shape, self._arguments(args, kwargs))

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Everything that was given, by the names that the layer's forward has for it today."""
        given = read_arguments(type(self).original_class, args, kwargs)
        for old, new in self._fastencoder.adapter.former_names.items():
            if old in given and new not in given:
                given[new] = given.pop(old)
        return given

    def _run_grid(
        self, run: Run, part: Part, call: StackCall | None, hidden: torch.Tensor, mask: Any, others: dict[str, Any]
    ) -> Any:
        """Images `[B, h, w, D]` or `[B, D, h, w]`, in and out."""
        channels_first = part[0].spec.adapter.grid == "channels first"
        grid = hidden.permute(0, 2, 3, 1) if channels_first else hidden
        others["grid"] = tuple(grid.shape[1:3])
        output = self._run_padded(run, part, call, grid.flatten(1, 2), mask)
        values = (output[0] if isinstance(output, tuple) else output).view(grid.shape)
        values = values.permute(0, 3, 1, 2) if channels_first else values
        return (values, *output[1:]) if isinstance(output, tuple) else values

    def _run_padded(self, run: Run, part: Part, call: StackCall | None, hidden: torch.Tensor, mask: Any) -> Any:
        binding, projections = part
        adapter = binding.spec.adapter
        if adapter.time_major:
            hidden = hidden.transpose(0, 1)
        batch = call.known_batch(mask, *hidden.shape[:2]) if call is not None else None
        if batch is None:
            batch = _geometry(binding, hidden, mask)
            if batch.indices is not None and self._fastencoder.reads_padding(self):
                raise Delegated("the batch has padding, and what follows the layers reads the hidden states there")
        if call is not None:
            call.keep_batch(mask, batch)
            stack = self._fastencoder.stack
            graphs = stack.graphs
            few = graphs is None and hidden.device.type == "cpu" and sum(batch.lengths) <= FEW_TOKENS
            if call.may_carry is None:
                call.may_carry = (few or batch.indices is not None or graphs is not None) and _may_carry(stack, call)
            if (few or graphs is not None) and call.may_carry and _runs_whole(call):
                if few:
                    call.whole_output = run_few(stack, call, batch, hidden, part)
                else:
                    call.whole_output = run_whole(graphs, call, batch, hidden)
                if call.whole_output is not None:
                    call.whole_input = hidden
                    return self._pass_on(adapter, call)
        values = run(batch, projections.entering(batch.take(hidden)))
        return self._hand_over(adapter, call, batch, values)

    def _run_carried(self, run: Run, adapter: Adapter, call: StackCall) -> Any:
        values = run(call.batch, call.carried[0])  # if it delegates instead, the tokens are still there
        call.carried = None
        return self._hand_over(adapter, call, call.batch, values)

    def _hand_over(self, adapter: Adapter, call: StackCall | None, batch: PackedBatch, values: torch.Tensor) -> Any:
        """To the next fast layer as packed `[1, T, D]`, to anybody else as padded `[B, S, D]`."""
        if call is not None and call.advance(self) and call.may_carry and isinstance(call.next_layer(), FastLayer):
            call.carried = values.unsqueeze(0)
            return _as_original(adapter, call.carried)
        return _as_original(adapter, _padded(adapter, batch, self._fastencoder.leaving(batch, values)))

    def _pass_on(self, adapter: Adapter, call: StackCall) -> Any:
        """All layers have run already: the last one returns what came out. Those before it do so as well, which tells the next
        one that its turn has come."""
        call.advance(self)
        output = call.carried = call.whole_output
        if call.next_layer() is None:
            call.carried = None
            output = output.transpose(0, 1) if adapter.time_major else output
        return _as_original(adapter, output)

    def _run_nested(self, run: Run, adapter: Adapter, hidden: torch.Tensor, mask: Any) -> Any:
        if mask is not None:
            raise Delegated("a nested tensor with a mask")
        try:
            batch = PackedBatch.from_nested(hidden)
        except ValueError as error:
            raise Delegated(str(error)) from None
        return _as_original(adapter, batch.nested_like(hidden, run(batch, batch.values)))

    def _run_already_packed(
        self, run: Run, adapter: Adapter, call: StackCall | None, hidden: torch.Tensor, others: dict[str, Any]
    ) -> Any:
        if hidden.shape[0] != 1 or adapter.time_major:
            raise Delegated("cu_seq_lens_q is given and the hidden states are not [1, T, D]")
        offsets, longest = others["cu_seq_lens_q"], others.get("max_length_q")
        if call is not None:
            batch = call.packed_batch(hidden[0], offsets, longest)
            call.advance(self)
        else:
            batch = PackedBatch.from_offsets(hidden[0], offsets, longest)
        return _as_original(adapter, run(batch, hidden[0]).unsqueeze(0))

    def _run_packed_by_owner(
        self, run: Run, adapter: Adapter, call: StackCall | None, hidden: torch.Tensor, mask: Any, others: dict[str, Any]
    ) -> Any:
        """Vision blocks that take `[T, D]`, or `[1, T, D]`, and the cumulative lengths of the images or windows."""
        offsets, longest = others.get(adapter.offsets), others.get("max_seqlen")
        if not isinstance(offsets, torch.Tensor) or hidden.is_nested or (hidden.dim() == 3 and hidden.shape[0] != 1):
            raise Delegated(f"{adapter.offsets} is not given, or the hidden states are not [T, D]")
        if mask is not None:
            raise Delegated(f"both a mask and {adapter.offsets} are given")
        values = hidden if hidden.dim() == 2 else hidden[0]
        try:
            if call is not None:
                batch = call.packed_batch(values, offsets, longest)
            else:
                batch = PackedBatch.from_offsets(values, offsets, longest)
        except ValueError as error:
            raise Delegated(str(error)) from None
        output = run(batch, values).view(hidden.shape)
        if call is not None:
            call.advance(self)
        return _as_original(adapter, output)

    def _forward_original(self, call: StackCall | None, args: tuple, kwargs: dict) -> Any:
        """The original forward, on padded hidden states even if they arrive packed."""
        if call is not None:
            if call.carried is not None:
                carried = call.carried
                values = carried[0] if call.whole_output is None else input_of(call, call.batch)
                padded = _padded(self._fastencoder.adapter, call.batch, self._fastencoder.leaving(call.batch, values))
                args = tuple(padded if value is carried else value for value in args)
                kwargs = {name: padded if value is carried else value for name, value in kwargs.items()}
                call.carried = call.whole_output = call.accepted = None
            call.advance(self)
        args = tuple(restored(value) for value in args)
        kwargs = {name: restored(value) for name, value in kwargs.items()}
        if kwargs.get("cu_seq_lens_q") is not None:
            args, kwargs = within_sequences(self, type(self).original_class, self._fastencoder.adapter, args, kwargs)
        return super().forward(*args, **kwargs)


def _geometry(binding: Binding, hidden: torch.Tensor, mask: Any) -> PackedBatch:
    """Where the real tokens of `hidden` `[B, S, D]` are. Raises Delegated for anything but key padding."""
    if mask is None and _is_causal_without_mask(binding):
        raise Delegated("this attention is causal where no mask is given")
    if mask is not None and type(mask) is not torch.Tensor:
        raise Delegated(f"the mask is a {type(mask).__name__}")
    adapter = binding.spec.adapter
    marks = adapter.mask_marks
    if adapter.mask_by_head and mask is not None and mask.dim() == 4:
        if not torch.equal(mask, mask[:, :1].expand_as(mask)):
            raise Delegated("the mask differs between heads")
        mask = mask[:, :1]
    if mask is not None and mask.dim() == 2 and marks == "pairs":
        raise Delegated("the mask is one of queries and keys")
    if mask is not None and mask.dim() == 2 and mask.is_floating_point():
        mask = mask[:, None, None]  # additive, by key
    try:
        kind = KINDS[adapter.attention]
        return kind.geometry(hidden, mask, "tokens" if marks == "pairs" else marks)
    except NotAPaddingMask as error:
        raise Delegated(f"only key padding is fused, and this is {error}") from None


def _is_causal_without_mask(binding: Binding) -> bool:
    """transformers takes an attention module without an `is_causal` attribute for a causal one, except in eager mode. Those of
    layers that take no mask are known."""
    if not binding.spec.adapter.mask:
        return False
    config = getattr(binding.attention, "config", None)
    if config is None or binding.spec.adapter.bidirectional or hasattr(binding.attention, "is_causal"):
        return False
    return getattr(config, "_attn_implementation", "eager") != "eager"


def _runs_whole(call: StackCall) -> bool:
    """Whether this is the first layer of the call, and all of them are fast."""
    return call.position == 0 and all(isinstance(layer, FastLayer) for layer in call.schedule)


def _may_carry(stack: Stack | None, call: StackCall) -> bool:
    """Whether packed tokens may travel between the layers of this call: nobody but the layers must see them."""
    if stack is None or not stack.may_carry or call.wants_hidden_states:
        return False
    if "hidden_states" in collected_outputs():
        return False
    # A layer that was compiled by itself does not know tensors by their identity; nor does one that they are moved to.
    if any(has_foreign_hooks(layer) or layer._compiled_call_impl is not None for layer in call.schedule):
        return False
    return in_one_place(call.schedule)


def _padded(adapter: Adapter, batch: PackedBatch, values: torch.Tensor) -> torch.Tensor:
    """`[B, S, D]`, or `[S, B, D]` for a layer that has time first."""
    padded = batch.to_padded(values)
    return padded.transpose(0, 1) if adapter.time_major else padded


def _as_original(adapter: Adapter, hidden: torch.Tensor) -> Any:
    """In the shape in which the layer's own class returns it."""
    if adapter.extra_outputs is None:
        return hidden
    return (hidden, *(None,) * adapter.extra_outputs)


def _warn_starved() -> None:
    warnings.warn(
        f"fastencoder: {_NO_MEMORY}. Its original code runs from now on: results stay right, but slower. "
        'reverse(model) and to_fast(model, memory="lean") takes no copy.',
        RuntimeWarning,
        stacklevel=2,
    )
