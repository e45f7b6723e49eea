"""The live parts behind a spec, found once and re-checked cheaply before every call.

A model may change after its conversion: an adapter wraps a projection, a hook is added, a layer norm is replaced, training
mode is switched on for a single dropout. A binding remembers what the checks saw; as soon as that is not what is there, the
checks run again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ..eligibility import attention_implementation, inspect_layer, touched
from ..instance_forward import runs_own_forward
from ..norms import Norm, norm_kind, read_eps, read_norm
from ..parts import ParameterPair, linear_at, lookup
from ..spec import LINEAR_SLOTS, NORM_SLOTS, Adapter, LayerSpec

# Modules that compute the same in training and in evaluation.
_WITHOUT_MODES = (nn.Linear, nn.LayerNorm, nn.Identity)


class Watched(NamedTuple):
    module: nn.Module
    state: dict[str, Any]  # the module's attributes
    cls: type
    children: tuple[nn.Module | None, ...]
    touched: bool


class Binding:
    """A layer's parts by slot, or the reasons why it cannot run fast as it is now.

    Attributes:
        adapter: of the layer's class.
        spec: what to compute, or None; then `reasons` says why, and nothing below is there.
        linears: what is in the linear slots, by slot.
        norms: the norm modules, by slot.
        activation, feed_forward, attention: the modules of those names in the spec's name map; None where there is none.
        layer_children: the layer's own modules, as they were found.
        watched: those inside of it, likewise.
        holders: the modules that hold the parameters of the spec's slots.
        attention_state: the attributes of the module that has the attention's configuration, which names an `implementation`.
        memo: what the kind of attention keeps as long as the layer stays as it is.
    """

    def __init__(self, layer: nn.Module, layer_class: type[nn.Module], adapter: Adapter) -> None:
        finding = inspect_layer(layer, layer_class, adapter)
        self.adapter = adapter
        self.spec: LayerSpec | None = finding.spec
        self.reasons = finding.reasons
        self.watched = [
            Watched(module, vars(module), type(module), tuple(module._modules.values()), touched(module))
            for module in layer.modules()
            if module is not layer
        ]
        self._modal = [watched.module for watched in self.watched if watched.cls not in _WITHOUT_MODES]
        self._names = self.spec.names if self.spec is not None else adapter.names[0]
        self.attention_state = vars(lookup(layer, self._names.attention) or layer)
        self.implementation = attention_implementation(layer, self._names)
        self.layer_children = tuple(layer._modules.values())
        self._layer_patched = not runs_own_forward(layer)
        if self.spec is None:
            self._tensors = _tensors(layer)
            return
        names = self.spec.names
        self.linears: dict[str, Any] = {
            slot: linear_at(layer, path) for slot, path in names.given(LINEAR_SLOTS).items()
        }
        self.norms: dict[str, nn.Module] = {
            slot: lookup(layer, path) for slot, path in names.given(NORM_SLOTS).items()
        }
        parts = [*self.linears.values(), *self.norms.values()]
        self.holders = [part.owner if isinstance(part, ParameterPair) else part for part in parts]
        self.holders += [holder for path in adapter.extra_parameters for holder in _holders_of(layer, path)]
        self._norm_kinds = {slot: norm_kind(module) for slot, module in self.norms.items()}
        self.activation = lookup(layer, names.activation) if names.activation else None
        self.feed_forward = lookup(layer, names.feed_forward) if names.feed_forward else None
        self.memo: dict[Any, Any] = {}
        self.scale_owner = lookup(layer, names.scaling.rpartition(".")[0]) if names.scaling else None
        self.scale_name = names.scaling.rpartition(".")[2] if names.scaling else ""
        self.attention = lookup(layer, names.attention)
        divisor_owner, _, self._divisor_name = adapter.divisor.rpartition(".")
        self._divisor_owner = (lookup(layer, divisor_owner) if divisor_owner else layer) if adapter.divisor else None
        self._scales = [
            (None if path is None else lookup(layer, path.rpartition(".")[0]) or layer, (path or "").rpartition(".")[2])
            for path in (names.scale1, names.scale2)
        ]

    def holds(self, layer: nn.Module) -> bool:
        """Whether the layer is still made of the same modules, neither hooked nor patched since. Runs before every call of
        every layer, so it looks no further than it must."""
        if tuple(layer._modules.values()) != self.layer_children:
            return False
        if (self._layer_patched or "forward" in vars(layer)) and self._layer_patched == runs_own_forward(layer):
            return False
        for module, state, cls, children, was_touched in self.watched:
            if type(module) is not cls:
                return False
            suspect = was_touched or "forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"]
            if suspect and touched(module) != was_touched:
                return False
            present = state["_modules"]
            if (children or present) and tuple(present.values()) != children:
                return False
        if getattr(self.attention_state.get("config"), "_attn_implementation", None) != self.implementation:
            return False
        # Where there is a spec, `Projections` watches the tensors.
        return self.spec is not None or _tensors(layer) == self._tensors

    def norm(self, slot: str) -> Norm | None:
        """The numbers of a norm as they are now; None if it has to be called as it is."""
        kind = self._norm_kinds[slot]
        return None if kind is None else read_norm(self.norms[slot], kind)

    def eps(self, slot: str) -> float:
        """That of a norm of which `norm` is not None."""
        return read_eps(self.norms[slot], self._norm_kinds[slot])

    def layer_scales(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The vectors `[D]` that multiply what the attention and the feed-forward block add; None for none."""
        if self._divisor_owner is not None:
            factor = 1.0 / getattr(self._divisor_owner, self._divisor_name)
            if self.memo.get("divisor", (None,))[0] != factor:
                self.memo["divisor"] = factor, torch.full_like(next(iter(self.norms.values())).weight, factor)
            return (self.memo["divisor"][1],) * 2
        first, second = (None if owner is None else getattr(owner, name) for owner, name in self._scales)
        # BEiT without LayerScale has the number 1 there.
        scales = tuple(scale if isinstance(scale, torch.Tensor) else None for scale in (first, second))
        if not self.spec.adapter.scale_by_tanh:
            return scales
        size = self.spec.hidden_size
        return tuple(None if gate is None else gate.tanh().expand(size) for gate in scales)

    def attributes(self) -> list[tuple[nn.Module, str]]:
        """Where `scale`, `eps` and `layer_scales` look: modules and the names of their attributes."""
        norms = [(self.norms[slot], kind.eps_name) for slot, kind in self._norm_kinds.items() if kind is not None]
        scales = [(self.scale_owner, self.scale_name), *self._scales]
        return norms + [(owner, name) for owner, name in scales if owner is not None]

    def any_training(self) -> bool:
        """Whether some inner module that has a training mode (a dropout, say) is in it although the layer is not."""
        return any(module.training for module in self._modal)

    @property
    def scale(self) -> float:
        """The factor on the scores, as the layer's attention has it now."""
        value = getattr(self.scale_owner, self.scale_name, None)
        return self.spec.scale if value is None else value


def _holders_of(layer: nn.Module, path: str) -> list[nn.Module]:
    """The modules whose parameters lie at a path: those of a module there, or the owner of a parameter."""
    found = lookup(layer, path)
    if isinstance(found, nn.Module):
        return list(found.modules())
    return [] if found is None else [lookup(layer, path.rpartition(".")[0]) if "." in path else layer]


def _tensors(layer: nn.Module) -> list[tuple[type, torch.dtype, torch.device]]:
    return [(type(parameter), parameter.dtype, parameter.device) for parameter in layer.parameters()]
