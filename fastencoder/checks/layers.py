"""Each layer by itself: what it makes of the hidden states that the reference's own layer was given.

Every model runs its whole forward, so that a layer gets its masks, rotations and biases from the code around it. Only the
hidden states that enter it are replaced, so the errors of earlier layers do not add up. The hooks that do this make a fast
layer pad its tokens in and out; how packed tokens pass from layer to layer shows in the outputs of the whole model, which runs
without them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers.arguments import first_parameter
from .compare import run
from .inputs import Batch


@dataclass(frozen=True)
class Call:
    """One call of a layer: the hidden states that went in and came out, on the CPU in float64."""

    entered: torch.Tensor
    left: torch.Tensor


Calls = dict[str, list[Call]]  # by the layer's name; ALBERT calls one layer many times


def record(model: Any, names: Sequence[str], batch: Batch, dtype: torch.dtype) -> Calls:
    """What the layers of these names are given and return in one forward of the model."""
    return _run(model, names, batch, dtype, None)


def with_hidden_states_of(calls: Calls, model: Any, batch: Batch, dtype: torch.dtype) -> Calls:
    """What the layers return when each is given the hidden states of `calls`, in this dtype."""
    return _run(model, list(calls), batch, dtype, calls)


def _run(model: Any, names: Sequence[str], batch: Batch, dtype: torch.dtype, given: Calls | None) -> Calls:
    found: Calls = {name: [] for name in names}
    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.enter_context(
                _watched(model.get_submodule(name), found[name], None if given is None else given[name])
            )
        run(model, batch, dtype)
    return {name: calls for name, calls in found.items() if calls}


@contextlib.contextmanager
def _watched(layer: nn.Module, calls: list[Call], given: Sequence[Call] | None) -> Iterator[None]:
    name = first_parameter(getattr(layer, "original_class", type(layer)))
    entered: list[torch.Tensor] = []

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs[name]
        if given is not None:
            hidden = given[len(calls)].entered.to(hidden)
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, name: hidden})
        entered.append(hidden.detach().cpu().double())
        return args, kwargs

    def after(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        left = output[0] if isinstance(output, tuple) else output
        calls.append(Call(entered.pop(), left.detach().cpu().double()))

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference_of(model: Any, batch: Batch) -> tuple[Any, torch.dtype]:
    """A copy of a model in the most exact dtype that its own code runs in, and that dtype: float64, or else float32."""
    exact = copy.deepcopy(model).double()
    try:
        run(exact, batch, torch.float64)
    except Exception:  # code of models makes float32 tensors of its own; what it then raises differs
        return exact.float(), torch.float32
    return exact, torch.float64


def counts(model: Any, names: Mapping[str, Any] | Sequence[str]) -> dict[str, tuple[int, int, str | None]]:
    """For each layer how many of its calls ran fast, how many ran the original code, and why the latest of these did."""
    found = {}
    for name in names:
        states = [_state(module) for module in model.get_submodule(name).modules()]
        of_layer = [state for state in states if state is not None]
        reasons = [state.last_reason for state in of_layer if state.last_reason]
        fast, delegated = (
            sum(getattr(state, kind) for state in of_layer) for kind in ("fast_calls", "delegated_calls")
        )
        found[name] = (fast, delegated, reasons[-1] if reasons else None)
    return found


def _state(module: nn.Module) -> Any:
    return getattr(module, "_fastencoder", None) or getattr(module, "_fastencoder_attention", None)
