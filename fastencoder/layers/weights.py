"""The projections of a layer in the form in which they are multiplied, rebuilt when the parameters change.

Layouts, one for all plain slots of a layer:

- "prepacked": on the CPU a copy of each weight in the layout that is multiplied fastest (queries, keys and values as one), in
  the dtype that the layer computes in.
- "joined": on CUDA, and on the CPU with `memory="lean"`, the parameters of queries, keys and values move into one storage,
  where they are one weight, and so do the two halves of a gated feed-forward block. Nothing is copied.
- "cast": where the layer computes in another dtype than that of its parameters, and oneDNN has no part in it, a copy of each
  weight in that dtype. The parameters stay as they are.
- "plain": the model's own parameters as they are.

With `batch_invariant=True` the layout on the CPU is always "prepacked", in the extension's panels.

A slot that holds something else than a weight and a bias is called as it is.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from .. import kernels
from ..kernels import native
from ..kernels._dispatch import on_gpu
from ..kernels.linear import cpu as linear_cpu
from ..kernels.linear import cpu_native
from ..parts import linear_at
from ..spec import LayerSpec, NameMap
from .binding import Binding
from .joined import joined
from .native_layer import native_layer
from .projection import Cast, Opaque, Plain, Prepacked, Projection
from .settings import DEFAULT, Settings, computing_dtype

Layout = Literal["prepacked", "joined", "cast", "plain"]
_QKV = ("query", "key", "value")
_GATED = ("gate", "up")
_CPU = torch.device("cpu")
_PROBED = 64  # elements of a weight that are compared before each call


class Projections:
    """Applies a layer's projections to packed tokens `[T, *]`.

    `slots` has a `projection.Projection` for each linear slot that is given; `out` and `down` are two of them. `qkv(x)` returns
    queries `[T, H, d]`, keys and values `[T, Hk, d]`, and `inner(x)` what goes into `down`, `[T, F]`. `fuses_residual` says
    whether a residual costs nothing there. `native_layer` runs the whole layer, where it can. `dtype` is that of the
    parameters, `compute_dtype` that of the products.
    """

    def __init__(self, binding: Binding, settings: Settings = DEFAULT) -> None:
        self.spec = spec = binding.spec
        self._settings = settings
        plain = _plain(binding)
        parts = (plain or binding.norms).values()  # of which one may be an identity
        weights = [part.weight for part in parts if getattr(part, "weight", None) is not None]
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.compute_dtype = computing_dtype(settings, spec, weights)
        self.layout = _layout(binding, settings, self.compute_dtype)
        self.fuses_residual = self.layout == "prepacked"
        self._probes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.native_probes = b""
        if self.layout in ("prepacked", "cast"):
            self._probes = [_probe(linear.weight) for linear in plain.values()]
            self.native_probes = b"".join(_native_probe(*probe) for probe in self._probes)
        self._activation = binding.activation
        # Where the activation of a gated `up` has to be the extension's: PyTorch's rounds an element by where it lies.
        self._by_halves = bool(spec.adapter.gated_up) and settings.batch_invariant and self.layout == "prepacked"
        self.slots = {slot: self._projection(slot, part) for slot, part in binding.linears.items()}
        self.out = self.slots["out"]
        self.down = self.slots.get("down")
        self._halves = self._halves_of(binding.linears["up"]) if self._by_halves else None
        self._separate_qkv = "qkv" not in binding.linears
        self._fused_qkv = self._separate_qkv and _one_product(spec)
        if self._fused_qkv:
            self._fuse_qkv([binding.linears[slot] for slot in _QKV])
        self._joined_gate = None
        if self.layout == "joined" and "gate" in binding.linears and not spec.opaque.intersection(_GATED):
            self._join_gate([binding.linears[slot] for slot in _GATED])
        self.fingerprints = [*map(fingerprint, binding.holders)]
        self._circumstances = circumstances()
        self.native_layer = None
        if self.layout in ("prepacked", "joined") and self._fused_qkv and not on_gpu(self.device):
            self.native_layer = native_layer(binding, self._qkv_weight, self._qkv_biases, self.slots)

    def _projection(self, slot: str, part: Any) -> Projection:
        if slot in self.spec.opaque:
            return Opaque(part)
        if slot in _QKV and _one_product(self.spec):  # they are multiplied as one
            return Plain(part)
        if slot == "up" and self._by_halves:
            return Plain(part)
        if self.layout == "prepacked":
            return Prepacked(part, self.compute_dtype, self._settings.batch_invariant)
        return Cast(part, self.compute_dtype) if self.layout == "cast" else Plain(part)

    def _fuse_qkv(self, linears: list[Any]) -> None:
        weights = [linear.weight for linear in linears]
        self._qkv_biases = _biases(linears)
        if self.layout == "prepacked":
            in_panels = self._settings.batch_invariant
            self._qkv_weight = linear_cpu.prepack(*weights, dtype=self.compute_dtype, in_panels=in_panels)
        elif self.layout == "cast":
            self._qkv_weight = torch.cat([weight.detach().to(self.compute_dtype) for weight in weights])
        elif self.layout == "joined":
            self._qkv_weight = joined(weights)
            self._qkv_bias = None if self._qkv_biases is None else joined(self._qkv_biases)

    def _halves_of(self, up: Any) -> tuple[Prepacked, Prepacked]:
        """The halves of a gated `up` as products of their own, the activated one first."""
        weights = up.weight.detach().chunk(2)
        biases = (None, None) if up.bias is None else up.bias.detach().chunk(2)
        first, second = (
            Prepacked(SimpleNamespace(weight=weight, bias=bias), self.compute_dtype, in_panels=True)
            for weight, bias in zip(weights, biases, strict=True)
        )
        return (first, second) if self.spec.adapter.gated_up == "first" else (second, first)

    def _join_gate(self, linears: list[Any]) -> None:
        biases = _biases(linears)
        self._joined_gate = (joined([linear.weight for linear in linears]), None if biases is None else joined(biases))

    def working_dtype(self, tokens: int) -> torch.dtype:
        """The dtype to compute in: `compute_dtype`, or float32 where the processor is faster in it."""
        if self.device.type == "cpu" and not self.spec.opaque:
            in_panels = self._settings.batch_invariant and self.layout == "prepacked"
            if in_panels or linear_cpu.float32_is_faster(self.compute_dtype, tokens):
                return torch.float32
        return self.compute_dtype

    def entering(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[*, D]` in the dtype in which they may stay packed between layers."""
        return x if self.compute_dtype == self.dtype else x.to(self.working_dtype(x.numel() // x.shape[-1]))

    def current(self, binding: Binding) -> bool:
        """Whether these are still the parameters that the binding's modules hold, with the values they had."""
        return (
            [*map(fingerprint, binding.holders)] == self.fingerprints
            and circumstances() == self._circumstances
            and self._probes_hold()
        )

    def _probes_hold(self) -> bool:
        if not self._probes:
            return True
        if not on_gpu(self.device):
            if native.current:
                return native.library.unchanged(self.native_probes)
            return all(torch.equal(*probe) for probe in self._probes)
        live, saved = zip(*self._probes, strict=True)
        return torch.equal(torch.cat(live), torch.cat(saved))  # the host waits once

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[T, D]` -> queries `[T, H, d]`, keys and values `[T, Hk, d]`: views of one buffer where they are one product."""
        if not self._separate_qkv:
            return self._split(self.slots["qkv"](x))
        if not self._fused_qkv:
            return self._heads_of(*(self.slots[slot](x) for slot in _QKV))
        if self.layout == "joined":
            bias = None if self._qkv_bias is None else self._qkv_bias.to(x.dtype)
            return self._split(kernels.linear(x, self._qkv_weight.to(x.dtype), bias))
        if self.layout == "plain":
            return self._heads_of(*(self.slots[slot](x) for slot in _QKV))
        bias = None if self._qkv_biases is None else torch.cat(self._qkv_biases).detach().to(x.dtype)
        if self.layout == "cast":
            fused = kernels.linear(x, self._qkv_weight, bias)
        elif linear_cpu.takes(self._qkv_weight, self.compute_dtype, x.dtype):
            fused = linear_cpu.linear_prepacked(x, self._qkv_weight, bias)
        else:
            weight = torch.cat([self.slots[slot].linear.weight for slot in _QKV])
            fused = linear_cpu.linear(x, weight.to(x.dtype), bias)
        return self._split(fused)

    def _split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spec = self.spec
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        if heads == kv_heads:
            shape, axis = ((heads, 3, dim), 2) if spec.adapter.qkv_order == "heads" else ((3, heads, dim), 1)
            return fused.view(-1, *shape).unbind(axis)
        return self._heads_of(*fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1))

    def _heads_of(self, *flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (x.unflatten(1, (-1, self.spec.head_dim)) for x in flat)
        return q, k, v

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward block up to `down`: `[T, D]` -> `[T, F]`."""
        name = self.spec.activation
        fused = "identity" if name == "module" else name
        if self._joined_gate is not None and name != "module":
            weight, bias = (None if tensor is None else tensor.to(x.dtype) for tensor in self._joined_gate)
            return kernels.linear(x, weight, bias, activation=fused, gated=True)
        if "gate" in self.slots:
            activated = self.slots["gate"](x, activation=fused)
            activated = self._activation(activated).to(x.dtype) if name == "module" else activated
            return activated.mul_(self.slots["up"](x))
        if self._halves is not None:
            first, second = self._halves
            return first(x, activation=fused).mul_(second(x))
        order = self.spec.adapter.gated_up
        if order:
            halves = self.slots["up"](x).chunk(2, dim=1)
            first, second = halves if order == "first" else reversed(halves)
            return (self._activation(first).to(x.dtype) if name == "module" else kernels.ACTIVATIONS[name](first)) * second
        inner = self.slots["up"](x, activation=fused)
        return self._activation(inner).to(x.dtype) if name == "module" else inner


def extra_bytes(spec: LayerSpec, weights: list[torch.Tensor], settings: Settings) -> int:
    """Bytes that a fast layer allocates beside the model's parameters, given its plain weights (`settings.plain_weights`)."""
    own, computing = weights[0].dtype, computing_dtype(settings, spec, weights)
    on_cpu = weights[0].device.type == "cpu" and not on_gpu(weights[0].device)
    copied = (
        computing != own
        or (settings.batch_invariant and weights[0].device.type == "cpu")
        or (settings.memory == "default" and _may_prepack(weights[0]))
    )
    if copied and on_cpu and cpu_native.in_fixed_point(computing):
        return sum(cpu_native.fixed_point_bytes(*weight.shape) for weight in weights)
    return spec.linear_bytes // own.itemsize * computing.itemsize if copied else 0


def joinable(layer: nn.Module, names: NameMap) -> list[list[Any]]:
    """The groups of linears of a layer whose parameters may have been moved into one storage."""
    groups = (_QKV, _GATED)
    return [
        [linear_at(layer, getattr(names, slot)) for slot in group]
        for group in groups
        if all(getattr(names, slot) for slot in group)
    ]


def _one_product(spec: LayerSpec) -> bool:
    """Whether queries, keys and values are one product: plain linears of one and the same input."""
    return not spec.opaque.intersection(_QKV) and not spec.adapter.options.get("separate_qkv")


def _plain(binding: Binding) -> dict[str, Any]:
    return {slot: part for slot, part in binding.linears.items() if slot not in binding.spec.opaque}


def _layout(binding: Binding, settings: Settings, dtype: torch.dtype) -> Layout:
    """How the weights of a layer that computes in `dtype` are kept, for the device that it runs on."""
    weights = [part.weight for part in _plain(binding).values()]
    if not weights:
        return "plain"
    on_cpu = weights[0].device.type == "cpu" and not on_gpu(weights[0].device)
    if settings.batch_invariant and on_cpu:
        return "prepacked"
    if dtype != weights[0].dtype:
        return "prepacked" if on_cpu and linear_cpu.can_prepack(weights[0].new_empty(0, 0, dtype=dtype)) else "cast"
    if on_gpu(weights[0].device) or (on_cpu and settings.memory == "lean"):
        own = len({id(weight) for weight in weights}) == len(weights)  # not tied to one another
        return "joined" if own and not any(weight.is_inference() for weight in weights) else "plain"
    return "prepacked" if all(_may_prepack(weight) for weight in weights) else "plain"


def circumstances() -> tuple:
    """What beside the parameters decides how weights are kept: what the processor's libraries may do, and whether operations
    run as on a GPU."""
    return linear_cpu.abilities(), on_gpu(_CPU)


def _may_prepack(weight: torch.Tensor) -> bool:
    # A tensor made in inference mode changes without a version: a copy of it could be stale.
    return linear_cpu.can_prepack(weight) and not weight.is_inference()


def _biases(linears: list[Any]) -> list[nn.Parameter] | None:
    """The biases of linears that are one product; some models have none for keys, and zeros stand for it."""
    if all(linear.bias is None for linear in linears):
        return None
    with torch.inference_mode(False):
        return [
            nn.Parameter(torch.zeros_like(linear.weight[:, 0]), requires_grad=False) if linear.bias is None else linear.bias
            for linear in linears
        ]


def _probe(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A few spread elements of a weight: a view of them, and what they are now.

    Writing through `weight.data` leaves no other trace: neither the address nor the version changes. PEFT merges adapters
    that way. A write that misses every probe goes unnoticed; it takes one that changes single elements on purpose.
    """
    step = max(weight.numel() // _PROBED, 1) | 1  # odd, so that it does not walk along one column
    view = weight.detach().flatten()[::step]
    return view, view.clone()


def _native_probe(live: torch.Tensor, saved: torch.Tensor) -> bytes:
    """`Probe` of native/kernels.h."""
    size = live.element_size()
    return struct.pack("5q", live.data_ptr(), saved.data_ptr(), live.numel(), live.stride(0) * size, size)


def fingerprint(holder: nn.Module) -> tuple[tuple[int, int, torch.dtype] | None, ...]:
    """Changes whenever a parameter of a module is replaced, moved, cast or written to. Runs before every call: keep it
    short."""
    parameters = holder._parameters.values()
    try:
        return tuple([None if p is None else (p.data_ptr(), p._version, p.dtype) for p in parameters])
    except RuntimeError:  # tensors made in inference mode have no version
        return tuple([None if p is None else (p.data_ptr(), 0, p.dtype) for p in parameters])
