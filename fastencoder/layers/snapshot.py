"""What all layers of a stack are made of, in the form in which the extension compares it with what is there now.

It says in one call what `LayerState.ready` says of one layer after the other. For few tokens on the CPU those questions take
longer than the layers' norms and attention. Whatever it does not understand is left to `ready`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..kernels import native
from .binding import Binding
from .weights import Projections, circumstances, fingerprint

Part = tuple[Binding, Projections]  # what `ready` says of a layer


class Snapshot:
    """Layers that run in one call of the extension, of one dtype on one device.

    Everything in it was looked at before what was made of it: a change in between is found as one that comes later is.

    Attributes:
        parts: of each layer.
        fields: the extension's `Layer` of each, one after the other.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[Part]) -> None:
        self._layers, self.parts = list(layers), list(parts)
        kinds = {(p.dtype, p.device, p.compute_dtype, p.native_layer.isa, bool(p.spec.opaque)) for _, p in parts}
        seen = _Seen()
        # ALBERT's layers run several times.
        each = dict(zip(layers, parts, strict=True)).items()
        self._comparable = len(kinds) == 1 and all(seen.add(layer, *part) for layer, part in each)
        self._seen = tuple(seen.modules), tuple(seen.parameters), tuple(seen.attributes), bytes(seen.probes)
        self._implementations = seen.implementations
        self._circumstances = circumstances()
        self.fields = b"".join([projections.native_layer.fields(binding) for binding, projections in parts])

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are still the layers, and ready as they were. False where that cannot be compared."""
        return (
            self._comparable
            and layers == self._layers
            and circumstances() == self._circumstances
            and native.library.holds(*self._seen)
            and all(config._attn_implementation == name for config, name in self._implementations)
        )


class _Seen:
    """What `native.library.holds` is given."""

    def __init__(self) -> None:
        self.modules: list[tuple] = []
        self.parameters: list[tuple] = []
        self.attributes: list[tuple[dict[str, Any], str, Any]] = []
        self.probes = bytearray()
        self.implementations: list[tuple[Any, str | None]] = []

    def add(self, layer: nn.Module, binding: Binding, projections: Projections) -> bool:
        """False if something cannot be compared."""
        # The layer's own hooks run around it, whoever calls it.
        self.modules.append((layer, vars(layer), type(layer), binding.layer_children, False))
        self.modules += [(w.module, w.state, w.cls, w.children, True) for w in binding.watched]
        self.parameters += [(vars(h), marks) for h, marks in zip(binding.holders, projections.fingerprints, strict=True)]
        self.probes += projections.native_probes
        config = binding.attention_state.get("config")
        self.attributes.append((binding.attention_state, "config", config))
        if config is not None and not any(config is known for known, _ in self.implementations):
            self.implementations.append((config, binding.implementation))
        for module, name in binding.attributes():
            if name in module._parameters:
                self.parameters.append((vars(module), fingerprint(module)))
            elif name in vars(module) or getattr(module, name, None) is None:
                self.attributes.append((vars(module), name, vars(module).get(name)))
            else:
                return False  # computed by its class
        return True
