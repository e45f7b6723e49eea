"""Layers whose source nobody tested are compared with their own forward, at their first call.

A registered class may compute something else in another version of transformers. Which arguments its forward needs differs
from family to family, and only a call has them. So at the first call of such a layer a copy of it, in fp32 on the CPU and with
weights under which every term shows, runs both ways with the arguments of that call; hidden states are random. If both agree,
the layer is fast from that call on. If not, all layers of its class and config run their original forward. Either way the call
is answered by code that is known to be right.

A call with a mask and one without may take different paths, so each is checked when it first comes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ..packing import NotAPaddingMask
from . import attention
from .arguments import first_parameter
from .deferred import Deferred, DistanceBias, PaddingMask, restored
from .guards import WITHOUT_EFFECT, Delegated
from .settings import DEFAULT
from .traffic import Lock, Traffic

TOLERANCE = 1e-4  # relative error of a token; fp32 rounding is a hundredth of it
ATTEMPTS = 3  # to run a layer's own forward beside its fused form
TOKENS = 1024  # of the call's rows as many as make about that many tokens, and at least two
MASKED, UNMASKED = "masked", "unmasked"
KINDS = (MASKED, UNMASKED)

_SETTING = (bool, int, float, str, type(None), list, tuple, dict)


class Trial:
    """What was found about the layers of one class and config, in this process.

    Attributes:
        failed: why these layers cannot be fast, or None.
        passed: settings of layers, with the kind of call, that agreed with their own forward.
        attempts: how many calls have said nothing, because the copy's own forward failed.
    """

    def __init__(self) -> None:
        self.failed: str | None = None
        self.passed: set[Hashable] = set()
        self.attempts = 0


class _SaysNothing(Exception):
    """A layer's own forward failed on the copy: the arguments may be wrong, or it may not run on a CPU."""


_trials: dict[tuple[type, str], Trial] = {}
_lock = Lock()  # one thread finds out, the others wait for what it says


def trial_of(layer: nn.Module, layer_class: type[nn.Module]) -> Trial:
    """The trial that all layers of a class with the same config share."""
    configs = {repr(_settings_of(config)) for config in map(_config, layer.modules()) if config is not None}
    return _trials.setdefault((layer_class, "".join(sorted(configs))), Trial())


def prove(layer: nn.Module, shape: tuple[int, ...], given: dict[str, Any]) -> None:
    """Compares a layer with its own forward, unless that was done for one like it and for this kind of call.

    Args:
        layer: a fast layer, of which `_fastencoder.to_prove` names the kinds of calls that are still to be checked.
        shape: of the hidden states, padded: `[B, S, D]`, or `[S, B, D]` for a layer that has time first.
        given: the arguments of the call by name.

    Raises:
        Delegated: it does not agree, or this call cannot say.
    """
    with _lock:
        _prove(layer, shape, given)


def _prove(layer: nn.Module, shape: tuple[int, ...], given: dict[str, Any]) -> None:
    state = layer._fastencoder
    mask = given.get(state.adapter.mask)
    kind = UNMASKED if mask is None else MASKED
    if kind not in state.to_prove:
        return
    trial = trial_of(layer, type(layer).original_class)
    if trial.failed is None:
        if not state.adapter.offsets:
            shape, given = _padded_form(first_parameter(type(layer).original_class), shape, given)
        tokens = _tokens(mask, shape, state.adapter)
        shows_padding = tokens is None or not bool(tokens.all())
        key = (_settings(layer), kind, shows_padding)
        if key not in trial.passed:
            try:
                trial.failed = _disagreement(layer, shape, given, tokens)
            except _SaysNothing as reason:
                trial.attempts += 1
                if trial.attempts < ATTEMPTS:
                    raise Delegated(str(reason)) from None
                trial.failed = str(reason)
            if trial.failed is None:
                trial.passed.add(key)
            else:
                warnings.warn(f"fastencoder: {trial.failed}", stacklevel=2)
        if trial.failed is None and shows_padding:
            state.to_prove = tuple(each for each in state.to_prove if each != kind)
    if trial.failed is not None:
        raise Delegated(trial.failed)


def _padded_form(first: str, shape: tuple[int, ...], given: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Tokens that came packed stand for one sequence: the original forward knows no other form."""
    hidden = given[first]
    if not hidden.is_nested and given.get("cu_seq_lens_q") is None:
        return shape, given
    rest = {name: value for name, value in given.items() if name not in WITHOUT_EFFECT}
    if any(isinstance(value, (torch.Tensor, tuple, Deferred)) for name, value in rest.items() if name != first):
        raise Delegated("its source differs from the tested versions, and packed tokens do not show whether it is the same")
    count = hidden.values().shape[0] if hidden.is_nested else hidden.shape[1]
    return (1, min(count, TOKENS), shape[-1]), rest


def _tokens(mask: Any, shape: tuple[int, ...], adapter: Any) -> torch.Tensor | None:
    """The real tokens `[B, S]` of a call, on the CPU; None where there is no mask."""
    if mask is None:
        return None
    batch, seqlen = (shape[1], shape[0]) if adapter.time_major else shape[:2]
    kind = attention.KINDS[adapter.attention]
    mask = kind.mask(_on_cpu(mask, 0, None), {})  # what is more than a mask in it is read again where the layer runs
    if mask is None:
        return None
    if type(mask) is not torch.Tensor:
        raise Delegated(f"the mask is a {type(mask).__name__}")
    nothing = torch.empty(batch, seqlen, 0, device="cpu")
    try:
        packed = kind.geometry(nothing, mask, adapter.mask_marks)
    except NotAPaddingMask as error:
        raise Delegated(f"only key padding is fused, and this is {error}") from None
    tokens = torch.full((batch * seqlen,), packed.indices is None, device="cpu")
    if packed.indices is not None:
        tokens[packed.indices.long()] = True
    return tokens.view(batch, seqlen)


def _disagreement(layer: nn.Module, shape: tuple[int, ...], given: dict, tokens: torch.Tensor | None) -> str | None:
    """Why a layer is not what it was, or None. First on some rows of the batch, then, if these say no, on all.

    Raises:
        _SaysNothing: its own forward failed.
    """
    adapter = layer._fastencoder.adapter
    batch_dim = 1 if adapter.time_major else 0
    batch, seqlen = shape[batch_dim], shape[1 - batch_dim]
    some = None if adapter.offsets else _some_rows(batch, max(2, TOKENS // max(seqlen, 1)), tokens)
    untested = f"the source of {type(layer).original_class.__name__} is not that of a tested version, and"
    for rows in [some, None] if some is not None and len(some) < batch else [None]:
        try:
            difference = _difference(layer, shape, batch_dim, rows, given, tokens)
        except _SaysNothing as reason:
            if rows is None:
                raise _SaysNothing(f"{untested} its own forward could not be run beside its fused form ({reason})") from None
            continue
        if difference <= TOLERANCE:
            return None
    return (
        f"{untested} its fused form differs from its own forward by {difference:.1g} of a token's norm: "
        "its layers run their original code"
    )


def _some_rows(batch: int, count: int, tokens: torch.Tensor | None) -> torch.Tensor:
    """Rows of all lengths, the shortest and the longest among them."""
    order = torch.arange(batch, device="cpu")
    if tokens is not None:
        lengths = tokens.sum(1)
        order = order[lengths > 0][lengths[lengths > 0].argsort()]
    spread = torch.linspace(0, max(len(order) - 1, 0), min(count, len(order)), device="cpu").round().long()
    return order[spread]


@torch.no_grad()
def _difference(
    layer: nn.Module,
    shape: tuple[int, ...],
    batch_dim: int,
    rows: torch.Tensor | None,
    given: dict[str, Any],
    tokens: torch.Tensor | None,
) -> float:
    """The largest relative error of a real token, of the fused form against the original forward."""
    original_class, adapter = type(layer).original_class, layer._fastencoder.adapter
    size = list(shape)
    size[batch_dim] = shape[batch_dim] if rows is None else len(rows)
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the user's default device is
        generator = torch.Generator(device="cpu").manual_seed(0)
        twin = _twin(layer, generator, {})
        twin._fastencoder = copy.copy(layer._fastencoder)
        twin._fastencoder.stack, twin._fastencoder.traffic, twin._fastencoder.to_prove = None, Traffic(), ()
        twin._fastencoder.settings = DEFAULT  # what a layer computes does not depend on the dtype that it computes in
        arguments = {name: _on_cpu(value, shape[batch_dim], rows) for name, value in given.items()}
        arguments[first_parameter(original_class)] = _normal(size, generator)
        if _leave_foreign_kernels(twin) and adapter.mask in arguments:
            arguments[adapter.mask] = _for_sdpa(arguments[adapter.mask])
        try:
            own = original_class.forward(twin, **{name: restored(value) for name, value in arguments.items()})
        except Exception as error:
            raise _SaysNothing(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        try:
            fused = twin._forward_fast(twin._fastencoder, None, (), arguments)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return float("inf")
    fused, own = (value if isinstance(value, tuple) else (value,) for value in (fused, own))
    if len(fused) != len(own):
        return float("inf")
    return _relative(fused[0], own[0], tokens, rows, adapter.time_major)


def _relative(
    fused: torch.Tensor, own: torch.Tensor, tokens: torch.Tensor | None, rows: torch.Tensor | None, time_major: bool
) -> float:
    if fused.shape != own.shape:
        return float("inf")
    if fused.dim() == 3:
        fused, own = (value.transpose(0, 1) if time_major else value for value in (fused, own))
        if tokens is not None:
            real = tokens if rows is None else tokens[rows]
            fused, own = fused[real], own[real]
    error = (fused.double() - own.double()).norm(dim=-1) / own.double().norm(dim=-1).clamp_min(1e-30)
    worst = float(error.max()) if error.numel() else 0.0
    return worst if worst == worst else float("inf")


def _twin(module: nn.Module, generator: torch.Generator, memo: dict[int, nn.Module]) -> nn.Module:
    """A copy of a layer in fp32 on the CPU, without hooks, with other weights. What is no tensor is shared."""
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = module.__new__(type(module))
    twin.__dict__ = {**module.__dict__}
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") or "_hooks_" in name:
            twin.__dict__[name] = type(value)()
    twin._parameters = {name: _shown(each, generator) for name, each in module._parameters.items()}
    twin._buffers = {name: _on_cpu(each, 0, None) for name, each in module._buffers.items()}
    twin._modules = {
        name: None if child is None else _twin(child, generator, memo) for name, child in module._modules.items()
    }
    return twin


def _shown(parameter: nn.Parameter | None, generator: torch.Generator) -> nn.Parameter | None:
    """A parameter under which what it does shows: weights keep tokens apart, biases and scales are far from 0 and 1."""
    if parameter is None or not parameter.is_floating_point():
        return parameter
    noise = _normal(parameter.shape, generator)
    value = parameter.detach().to("cpu", torch.float32)
    if value.dim() < 2:
        value = value + 0.5 * noise
    else:
        usual = value[0].numel() ** -0.5  # of a weight that keeps the variance
        deviation = float(value.std())
        value = value * (usual / deviation if deviation > 0 else 0.0) + 0.5 * usual * noise
    return nn.Parameter(value.clone(), requires_grad=False)


def _normal(shape: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _on_cpu(value: Any, batch: int, rows: torch.Tensor | None) -> Any:
    """Tensors on the CPU, floating-point ones in fp32, and of those with a batch dimension some rows."""
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            return value
        value = value.detach()
        value = value.to("cpu", torch.float32) if value.is_floating_point() else value.to("cpu")
        return value[rows] if rows is not None and value.dim() > 1 and value.shape[0] == batch else value.clone()
    if isinstance(value, Deferred):  # the fused form reads what it is made from, the original forward what it stands for
        made = _on_cpu(value.restore(), batch, rows)
        if isinstance(value, DistanceBias):
            return DistanceBias(lambda: made, _on_cpu(value.table, 0, None))
        if isinstance(value, PaddingMask):
            return PaddingMask(lambda: made, _on_cpu(value.tokens, batch, rows))
        return Deferred(lambda: made)
    if type(value) in (tuple, list):
        return type(value)(_on_cpu(each, batch, rows) for each in value)
    if type(value) is dict:
        return {name: _on_cpu(each, batch, rows) for name, each in value.items()}
    return value


def _leave_foreign_kernels(twin: nn.Module) -> bool:
    """Attention of other libraries (flash, flex) does not run in fp32 on a CPU: torch's own takes its place in the copy."""
    left = False
    for module in twin.modules():
        config = _config(module)
        if config is not None and config._attn_implementation not in (None, "eager", "sdpa"):
            config = module.__dict__["config"] = copy.copy(config)
            config._attn_implementation_internal = "sdpa"
            left = True
    return left


def _for_sdpa(mask: Any) -> Any:
    """Flash attention takes masks `[B, S]`; torch's own `[B, 1, 1, S]`."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return mask


def _config(module: nn.Module) -> Any:
    config = module.__dict__.get("config")
    return config if hasattr(config, "_attn_implementation") else None


def _settings(layer: nn.Module) -> str:
    """Everything of a layer that is not a tensor and can steer what it computes."""
    parts = [(name, type(module).__qualname__, _settings_of(module)) for name, module in layer.named_modules()]
    return repr([parts, [(name, tuple(each.shape)) for name, each in layer.named_parameters()]])


def _settings_of(thing: Any) -> list[tuple[str, Any]]:
    return sorted(
        (name, value)
        for name, value in vars(thing).items()
        if isinstance(value, _SETTING) and not (isinstance(thing, nn.Module) and isinstance(value, dict))
    )
