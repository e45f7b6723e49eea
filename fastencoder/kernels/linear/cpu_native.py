"""``linear`` in the C++ extension: weights of float32 or bfloat16, everything behind the product in its registers.

It computes in float32, or with packed bfloat16 weights in fixed point of 16 bits, where the processor has it at twice the rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastencoder.kernels import native
from fastencoder.kernels.native import address, float32

ACTIVATION_CODES = {"identity": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4, "quick_gelu": 5}
_FIXED_POINT = 3  # the extension's code for such weights, beside those of dtypes
_FEWEST_ROWS = 4  # of x, for a weight that is not packed: it is turned around for every product


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight ``[N, K]`` of `dtype` as it is read, in panels of ``P`` outputs: ``[N / P, K, P]``, zeros behind the last one.
    In fixed point a panel is a row of int16, which also holds the scales."""

    weight: torch.Tensor
    outputs: int
    isa: int
    dtype: torch.dtype

    @property
    def code(self) -> int:
        """The extension's for the numbers of the weight."""
        return _FIXED_POINT if self.weight.dtype == torch.int16 else native.DTYPES[self.dtype]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the extension multiplies weights of this type faster than anything else here, or no slower.

    float32 on a processor with AVX-512: measured on two cores of a Xeon, 1.3 to 1.6 times as fast as oneDNN for up to 16
    tokens, as fast from some 64 on. bfloat16 where there is no AMX, which oneDNN multiplies at 0.6 times the rate of float32.
    """
    if native.current < native.ISAS.index("avx512"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported())


def in_fixed_point(dtype: torch.dtype) -> bool:
    """Whether packed weights of this type are multiplied in fixed point: bfloat16's, where the processor has VNNI.

    1.6 to 1.8 times the rate of float32 from 64 tokens on (measured: 510 to 580 against 310 to 330 GFLOP/s on two cores of a
    Xeon that hides AMX), with a third of the error that rounding the weight to bfloat16 has.
    """
    return dtype == torch.bfloat16 and native.current >= native.ISAS.index("avx512_vnni") and multiplies(dtype)


def pack(*weights: torch.Tensor, dtype: torch.dtype | None = None) -> Panels:
    """A copy of one weight ``[N, K]``, or of several as if they were one, in ``dtype`` (None: their own). It takes no other
    memory on the way, unless float64 becomes fixed point."""
    dtype = weights[0].dtype if dtype is None else dtype
    outputs, inputs = sum(map(len, weights)), weights[0].shape[1]
    if in_fixed_point(dtype):
        return Panels(_fixed_point_panels(weights, outputs, inputs), outputs, native.current, dtype)
    width = native.library.panel_width(native.current)
    panels = weights[0].new_empty(-(-outputs // width), inputs, width, dtype=dtype)
    by_output, row = panels.transpose(1, 2), 0
    for weight in weights:
        for part in weight.detach().split(_to_panel_ends(row, len(weight), width)):
            by_output[row // width, row % width : row % width + len(part)] = part
            row += len(part)
    by_output[-1, (outputs - 1) % width + 1 :] = 0
    return Panels(panels, outputs, native.current, dtype)


def _fixed_point_panels(weights: tuple[torch.Tensor, ...], outputs: int, inputs: int) -> torch.Tensor:
    panels_shape = -(-outputs // native.library.panel_width(native.current)), native.library.packed_panel_size(inputs)
    panels, row = torch.zeros(panels_shape, dtype=torch.int16), 0
    for weight in weights:
        source = weight.detach() if weight.dtype in native.DTYPES else weight.detach().float()
        source = source if source.stride(1) == 1 else source.contiguous()
        native.library.pack(
            *(source.data_ptr(), panels.data_ptr(), native.DTYPES[source.dtype], source.stride(0), len(source), inputs, row),
            torch.get_num_threads(),
        )
        row += len(source)
    return panels


def fixed_point_bytes(outputs: int, inputs: int) -> int:
    """Of a weight ``[N, K]`` in fixed point, without what fills the last panel: numbers of two bytes, and scales."""
    return outputs * 2 * native.library.packed_panel_size(inputs) // native.library.panel_width(native.current)


def _to_panel_ends(first: int, count: int, width: int) -> list[int]:
    """How many rows from `first` on each panel takes."""
    ends = [*range((first // width + 1) * width, first + count, width), first + count]
    return [end - start for start, end in zip([first, *ends], ends, strict=False)]


def runs(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether :func:`linear` takes a weight that is not packed, and is faster than anything else."""
    return (
        x.dtype == torch.float32
        and x.shape[0] >= _FEWEST_ROWS
        and multiplies(weight.dtype)
        and weight.stride(1) == 1
        and (residual is None or residual.dtype == torch.float32)
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Panels,
    bias: torch.Tensor | None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scale * activation(x @ weight.T + bias) + residual``: ``[T, K]``, ``[N, K]`` or packed, ``[N]``, name, ``[T, N]``,
    ``[N]`` -> ``[T, N]``, in the dtype of `x`."""
    packed = isinstance(weight, Panels)
    if packed:
        values, outputs, isa, code = weight.weight, weight.outputs, weight.isa, weight.code
    else:
        values, outputs, isa, code = weight, len(weight), native.current, native.DTYPES[weight.dtype]
    # Every tensor has a name until the end of the call: an address keeps nothing alive.
    dtype, x, residual = x.dtype, float32(x), float32(residual)
    vectors = [vector for vector in (bias, scale) if vector is not None]
    vector_dtype = weight.dtype
    if any(vector.dtype != vector_dtype for vector in vectors):
        vector_dtype = torch.float32
    bias, scale = (None if vector is None else vector.to(vector_dtype).contiguous() for vector in (bias, scale))
    out = x.new_empty(x.shape[0], outputs)
    native.library.linear(
        isa,
        *(address(x), values.data_ptr(), address(bias), address(scale), address(residual), out.data_ptr()),
        *(code, native.DTYPES[vector_dtype], 0 if packed else weight.stride(0), packed),
        *(x.shape[0], outputs, x.shape[1], ACTIVATION_CODES[activation], torch.get_num_threads()),
    )
    return out.to(dtype)
