"""The six projections of a layer in the form in which they are multiplied, rebuilt when the parameters change.

On the CPU oneDNN keeps a copy of each weight in its own layout (queries, keys and values as one), which is the only memory
that a conversion costs. On CUDA the parameters of queries, keys and values move into one storage, where they are one weight.
Anywhere else the model's own parameters are used as they are.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import nn

from .. import kernels
from ..kernels._dispatch import device_kind, on_gpu
from ..kernels.linear import cpu as linear_cpu
from ..spec import LayerSpec
from .binding import Binding
from .joined import joined

_QKV = ("query", "key", "value")
_PROBED = 64  # elements of a weight that are compared before each call


class Projection(Protocol):
    """`scale * activation(x @ weight.T + bias) + residual`: `[T, K]` -> `[T, N]`, in the dtype of `x`."""

    def __call__(
        self,
        x: torch.Tensor,
        activation: str = "identity",
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def sums(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class Projections:
    """Applies a layer's projections to packed tokens `[T, *]`.

    `up`, `out` and `down` are functions `(x, activation="identity", residual=None, scale=None) -> [T, N]`; `qkv(x)` returns
    three views `[T, H, d]`. `fuses_residual` says whether a residual costs nothing there.
    """

    def __init__(self, binding: Binding) -> None:
        spec = binding.spec
        self._heads = (spec.num_heads, spec.head_dim)
        weights = {slot: linear.weight for slot, linear in binding.linears.items()}
        self.dtype, self.device = weights["query"].dtype, weights["query"].device
        self.layout = _layout(binding)
        self.fuses_residual = self.layout == "prepacked"
        self._qkv_biases = _qkv_biases(binding.linears)
        self._probes: list[tuple[torch.Tensor, torch.Tensor]] = []
        qkv = [weights[slot] for slot in _QKV]
        if self.layout == "prepacked":
            self._probes = [_probe(weight) for weight in weights.values()]
            self._qkv_weight = linear_cpu.prepack(torch.cat([weight.detach() for weight in qkv]))
        elif self.layout == "joined":
            self._qkv_weight = joined(qkv)
            self._qkv_bias = None if self._qkv_biases is None else joined(self._qkv_biases)
        make = _Prepacked if self.layout == "prepacked" else _Plain
        self.query, self.key, self.value = (_Plain(binding.linears[slot]) for slot in _QKV)
        self.out, self.up, self.down = (make(binding.linears[slot]) for slot in ("out", "up", "down"))
        self._fingerprint = _fingerprint(binding)

    def working_dtype(self, tokens: int) -> torch.dtype:
        """The dtype to compute in: that of the weights, or float32 where the processor is faster in it."""
        if self.device.type == "cpu" and linear_cpu.float32_is_faster(self.dtype, tokens):
            return torch.float32
        return self.dtype

    def current(self, binding: Binding) -> bool:
        """Whether these are still the parameters that the binding's modules hold, with the values they had."""
        return (
            _fingerprint(binding) == self._fingerprint
            and _layout(binding) == self.layout
            and all(torch.equal(*probe) for probe in self._probes)
        )

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[T, D]` -> queries, keys and values, each `[T, H, d]` (views of one buffer, except in the plain layout)."""
        if self.layout == "joined":
            fused = kernels.linear(x, self._qkv_weight, self._qkv_bias)
            return fused.view(-1, 3, *self._heads).unbind(1)
        projections = (self.query, self.key, self.value)
        if self.device.type != "cpu":
            return tuple(projection(x).view(-1, *self._heads) for projection in projections)
        bias = None if self._qkv_biases is None else torch.cat(self._qkv_biases).detach().to(x.dtype)
        if self.layout == "prepacked" and x.dtype == self.dtype:
            fused = linear_cpu.linear_prepacked(x, self._qkv_weight, bias)
        else:
            weight = torch.cat([projection.linear.weight for projection in projections])
            fused = linear_cpu.linear(x, weight.to(x.dtype), bias)
        return fused.view(-1, 3, *self._heads).unbind(1)


class _Plain:
    """The module's own weight, cast where the working dtype is another."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(
        self,
        x: torch.Tensor,
        activation: str = "identity",
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return kernels.linear(x, weight, bias, activation, residual, scale=scale)

    def sums(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For `add_norm`: the product `[T, N]`, or its partial sums `[P, T, N]` and the bias that is still to be added. Few
        tokens leave most of a GPU idle unless the sum over K is divided."""
        weight = self.linear.weight
        if device_kind(x) == "cuda" and kernels.partial_splits(x.shape[0], *weight.shape, x.dtype, x.device) > 1:
            return kernels.linear_partial(x, weight), self.linear.bias
        return self(x), None


class _Prepacked(_Plain):
    """A copy of the weight in oneDNN's layout; the bias stays the module's own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._weight = linear_cpu.prepack(linear.weight)

    def __call__(
        self,
        x: torch.Tensor,
        activation: str = "identity",
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x.dtype != self.linear.weight.dtype:
            return super().__call__(x, activation, residual, scale)
        return linear_cpu.linear_prepacked(x, self._weight, self.linear.bias, activation, residual, scale=scale)


def extra_bytes(spec: LayerSpec, weight: torch.Tensor) -> int:
    """Bytes that a fast layer allocates beside the model's parameters, given any one of its weights."""
    return spec.linear_bytes if _may_prepack(weight) else 0


def _layout(binding: Binding) -> Literal["prepacked", "joined", "plain"]:
    """How the weights of a layer are kept, for the device that it runs on."""
    weights = [linear.weight for linear in binding.linears.values()]
    if on_gpu(weights[0].device):
        own = len({id(binding.linears[slot].weight) for slot in _QKV}) == len(_QKV)  # not tied to one another
        return "joined" if own and not any(weight.is_inference() for weight in weights) else "plain"
    return "prepacked" if all(_may_prepack(weight) for weight in weights) else "plain"


def _may_prepack(weight: torch.Tensor) -> bool:
    # A tensor made in inference mode changes without a version: a copy of it could be stale.
    return linear_cpu.can_prepack(weight) and not weight.is_inference()


def _qkv_biases(linears: dict[str, nn.Linear]) -> list[nn.Parameter] | None:
    """The biases of queries, keys and values; some models have none for keys, and zeros stand for it."""
    modules = [linears[slot] for slot in _QKV]
    if all(module.bias is None for module in modules):
        return None
    with torch.inference_mode(False):
        return [
            nn.Parameter(torch.zeros_like(module.weight[:, 0]), requires_grad=False) if module.bias is None else module.bias
            for module in modules
        ]


def _probe(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A few spread elements of a weight: a view of them, and what they are now.

    Writing through `weight.data` leaves no other trace: neither the address nor the version changes. PEFT merges adapters
    that way. A write that misses every probe goes unnoticed; it takes one that changes single elements on purpose.
    """
    step = max(weight.numel() // _PROBED, 1) | 1  # odd, so that it does not walk along one column
    view = weight.detach().flatten()[::step]
    return view, view.clone()


def _fingerprint(binding: Binding) -> list[tuple[int, int, torch.dtype] | None]:
    """Changes whenever a parameter is replaced, moved, cast or written to. Runs before every call: keep it short."""
    modules = (*binding.linears.values(), binding.norm1, binding.norm2)
    parameters = [parameter for module in modules for parameter in module._parameters.values()]
    try:
        return [None if p is None else (p.data_ptr(), p._version, p.dtype) for p in parameters]
    except RuntimeError:  # tensors made in inference mode have no version
        return [None if p is None else (p.data_ptr(), 0, p.dtype) for p in parameters]
