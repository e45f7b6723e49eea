"""Whole layers in one call of the C++ extension, where they are nothing but plain attention, two norms and two projections.

They compute what `program.py` says, in the same operations and the same order; what this saves is the time between them,
which is most of it for few tokens, and their buffers.
"""

from __future__ import annotations

import ctypes

import torch

from ..kernels import native
from ..kernels._dispatch import device_kind
from ..kernels.linear.cpu_native import ACTIVATION_CODES, Panels, multiplies
from ..packing import PackedBatch
from .binding import Binding
from .projection import Plain, Prepacked, Projection

_NORMS = ("norm1", "norm2")
_MATRICES = ("out", "up", "down")
_NUMBERS = ("scale", "eps1", "eps2")


class _Layer(ctypes.Structure):
    """`Layer` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("pre_norm", "dim", "heads", "kv_heads", "head_dim", "inner", "activation")),
        *((name, ctypes.c_int64) for name in ("weight_dtype", "vector_dtype", "norm_dtype", "rms", "packed")),
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "up", "down")),
        *((f"{name}_bias", ctypes.c_void_p) for name in ("query", "key", "value", "out", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in ("scale1", "scale2")),
    )


class NativeLayer:
    """The addresses of a layer's parameters, for as long as `Projections.current` says that they are still the same."""

    def __init__(
        self, binding: Binding, qkv_biases: list[torch.Tensor] | None, matrices: dict[str, Panels | torch.Tensor]
    ) -> None:
        spec, qkv = binding.spec, matrices["qkv"]
        packed = isinstance(qkv, Panels)
        weights = {name: matrix.weight if packed else matrix for name, matrix in matrices.items()}
        norms = [binding.norm(slot) for slot in _NORMS]
        biases = {f"{name}_bias": binding.linears[name].bias for name in _MATRICES}
        biases |= dict(zip(("query_bias", "key_bias", "value_bias"), qkv_biases or (None,) * 3, strict=True))
        self._kept = weights, qkv_biases
        self.isa = qkv.isa if packed else native.current
        self._made: tuple[tuple, bytes] = ((), b"")
        self._layer = _Layer(
            pre_norm=spec.adapter.norm_placement == "pre",
            dim=spec.hidden_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            inner=matrices["up"].outputs if packed else len(weights["up"]),
            activation=ACTIVATION_CODES[spec.activation],
            weight_dtype=qkv.code if packed else native.DTYPES[qkv.dtype],
            vector_dtype=native.DTYPES[binding.linears["out"].weight.dtype],
            norm_dtype=native.DTYPES[norms[0].weight.dtype],
            rms=norms[0].rms,
            packed=packed,
            **{name: weight.data_ptr() for name, weight in weights.items()},
            **{name: native.address(bias) for name, bias in biases.items()},
            norm1=norms[0].weight.data_ptr(),
            norm1_bias=native.address(norms[0].bias),
            norm2=norms[1].weight.data_ptr(),
            norm2_bias=native.address(norms[1].bias),
        )

    def runs(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether it may be given these tokens `[T, D]`, cast to this dtype. float16 is left to the program's guards against
        overflow."""
        return (
            dtype == torch.float32
            and x.dtype != torch.float16
            and native.current == self.isa
            and x.is_contiguous()
            and device_kind(x) == "cpu"
        )

    def fields(self, binding: Binding) -> bytes:
        """The layer's `Layer`, with the numbers as the model's modules have them now."""
        scales = (native.address(scale) for scale in binding.layer_scales())
        now = (binding.scale, *(binding.eps(slot) for slot in _NORMS), *scales)
        made_for, fields = self._made
        if now != made_for:
            for name, value in zip((*_NUMBERS, "scale1", "scale2"), now, strict=True):
                setattr(self._layer, name, value)
            fields = bytes(self._layer)
            self._made = now, fields  # both at once: another thread may ask
        return fields


def run_layers(isa: int, fields: bytes, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    """One layer after the other, given the `fields` of each: `[T, D]`, or `[B, S, D]` without padding, -> the same in the dtype
    of `x`, to which every layer's output is rounded."""
    dtype = x.dtype
    values = x if dtype == torch.float32 else x.to(torch.float32)
    out = torch.empty_like(values)
    offsets = batch.offsets
    native.library.layers(
        *(isa, fields, dtype == torch.bfloat16, values.data_ptr(), out.data_ptr()),
        *(offsets.data_ptr(), offsets.shape[0] - 1, x.numel() // x.shape[-1], torch.get_num_threads()),
    )
    return out if dtype == torch.float32 else out.to(dtype)


def native_layer(
    binding: Binding, qkv: object, qkv_biases: list[torch.Tensor] | None, slots: dict[str, Projection]
) -> NativeLayer | None:
    """For a layer whose projections are these, or None if it has more to it than the extension's layer."""
    spec = binding.spec
    adapter = spec.adapter
    plain = (
        set(binding.linears) == {"query", "key", "value", *_MATRICES}
        and set(binding.norms) == set(_NORMS)
        and adapter.attention == "plain"
        and adapter.norm_placement in ("post", "pre")
        and spec.activation in ACTIVATION_CODES
        and not (spec.wide or adapter.gated_up or adapter.chosen_last or adapter.divisor or adapter.scale_by_tanh)
    )
    if not plain:
        return None
    matrices = {"qkv": qkv, **{name: _matrix(slots[name]) for name in _MATRICES}}
    if not _alike(list(matrices.values())):
        return None
    norms = [binding.norm(slot) for slot in _NORMS]
    if any(norm is None or norm.weight is not binding.norms[slot].weight for slot, norm in zip(_NORMS, norms, strict=True)):
        return None  # an opaque norm, or one whose weight is computed for each call
    scales = binding.layer_scales()
    dtypes = {binding.linears[name].weight.dtype for name in binding.linears}
    dtypes |= {scale.dtype for scale in scales if scale is not None}
    norm_dtypes = {vector.dtype for norm in norms for vector in (norm.weight, norm.bias) if vector is not None}
    alike = len(dtypes) == len(norm_dtypes) == 1 and norms[0].rms == norms[1].rms
    if not alike or not dtypes <= {torch.float32, matrices["qkv"].dtype} or any(s is not None and s.dim() != 1 for s in scales):
        return None
    return NativeLayer(binding, qkv_biases, matrices)


def _matrix(projection: Projection) -> Panels | torch.Tensor | None:
    """What is multiplied in a slot."""
    if isinstance(projection, Prepacked):
        return projection.packed if isinstance(projection.packed, Panels) else None
    return projection.linear.weight.detach() if type(projection) is Plain else None


def _alike(matrices: list[object]) -> bool:
    """Whether the weights are all packed or all as they are, of one dtype that the extension multiplies."""
    if not all(isinstance(matrix, Panels) for matrix in matrices):
        for matrix in matrices:
            if not isinstance(matrix, torch.Tensor) or matrix.device.type != "cpu":
                return False
            if not matrix.is_contiguous() or not multiplies(matrix.dtype):
                return False
    return len({matrix.dtype for matrix in matrices}) == 1
