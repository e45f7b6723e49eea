"""``linear`` on CPU: the C++ extension where it is faster, otherwise oneDNN through PyTorch. Both take a weight as it is, or
laid out once to be used many times."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from fastencoder.kernels import native
from fastencoder.kernels.linear import cpu_native, reference
from fastencoder.kernels.linear.cpu_native import Panels
from fastencoder.kernels.linear.reference import ACTIVATIONS

# What oneDNN applies to the float32 accumulator before it writes: our name -> (its post-op, its algorithm). "none" is the
# erf form of GELU. Its swish has no factor inside the sigmoid, so quick_gelu is not here; its relu turns NaN into 0, so that is
# not here either.
_POST_OPS = {
    "identity": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
_IN_PLACE = {
    "gelu": torch._C._nn.gelu_,
    "gelu_tanh": lambda x: torch._C._nn.gelu_(x, approximate="tanh"),
    "relu": torch.relu_,
    "silu": lambda x: F.silu(x, inplace=True),
}
_MANY = 2**20  # tokens
_PREPACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T, K]``, ``[N, K]`` (gated: ``[2 N, K]``), ``[N]`` (``[2 N]``), name, ``[T, N]``, ``[N]`` -> ``[T, N]``."""
    if not gated and cpu_native.runs(x, weight, residual):
        return cpu_native.linear(x, weight, bias, activation, residual, scale)
    if scale is not None:
        return _scaled(linear(x, weight, bias, activation, None, gated), scale, residual)
    if gated and cpu_native.runs(x, weight, None):
        return _epilogue(cpu_native.linear(x, weight, bias), activation, residual, gated)
    if x.dtype in (torch.float16, torch.bfloat16) and _finishes(x.dtype):
        if not gated:
            return linear_prepacked(x, weight, bias, activation, residual)
        # The second product is multiplied by the first before it is rounded.
        (half, up), biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
        half = linear_prepacked(x, half, biases[0], activation)
        result = torch.ops.mkldnn._linear_pointwise.binary(x, half, up, biases[1], "mul")
        return result if residual is None else result.add_(residual)
    return _epilogue(F.linear(x, weight, bias), activation, residual, gated)


def linear_partial(x: torch.Tensor, weight: torch.Tensor, splits: int) -> torch.Tensor:
    """``[T, K]``, ``[N, K]`` -> ``[splits, T, N]`` in float32 or wider."""
    return reference.linear_partial(x, weight, splits)


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether this weight (``[N, K]``) can be multiplied here in a layout of its own."""
    if weight.device.type == "cpu" and cpu_native.multiplies(weight.dtype):
        return True
    return (
        weight.device.type == "cpu"
        and weight.dtype in _PREPACKED_DTYPES
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and _finishes(weight.dtype)
    )


def abilities() -> tuple[int, bool]:
    """What :func:`can_prepack` depends on that may change while a process runs."""
    return native.current, torch._C._get_mkldnn_enabled()


def _finishes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type here, and so can finish a product before it is rounded."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled() and _multiplies(dtype)


def _multiplies(dtype: torch.dtype) -> bool:
    """oneDNN has 16-bit matrix multiplication only where the processor does."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def float32_is_faster(dtype: torch.dtype, tokens: int) -> bool:
    """Whether a product of so many tokens is faster in float32, the conversion of the weight included.

    bfloat16 without AMX multiplies at 0.6 times the rate of float32 on an x86 processor (measured: 165 against 290 GFLOP/s on
    two cores of a Xeon that has AVX-512 and hides AMX, from 64 tokens on); the answers are the more exact for it. The extension
    reads the weights in bfloat16 and takes float32, for any number of tokens.
    """
    if dtype != torch.bfloat16:
        return False
    return cpu_native.multiplies(dtype) or (tokens >= 64 and _is_x86_without_amx())


def is_faster_than_float32(dtype: torch.dtype) -> bool:
    """Whether products with a copy of a weight in this dtype are faster than with one in float32."""
    return cpu_native.in_fixed_point(dtype) or not float32_is_faster(dtype, _MANY)


@cache
def _is_x86_without_amx() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and not torch.cpu._is_amx_tile_supported()


def prepack(
    *weights: torch.Tensor, dtype: torch.dtype | None = None, in_panels: bool = False
) -> torch.Tensor | Panels:
    """A copy of one weight ``[N, K]``, or of several as if they were one, in the layout that is multiplied fastest, or in
    panels, and in ``dtype`` (None: their own). Panels are filled up to the last one's end."""
    dtype = weights[0].dtype if dtype is None else dtype
    if in_panels or cpu_native.multiplies(dtype):
        return cpu_native.pack(*weights, dtype=dtype)
    together = torch.cat([weight.detach().to(dtype) for weight in weights])
    return torch.ops.mkldnn._reorder_linear_weight(together)


def takes(packed_weight: torch.Tensor | Panels, weight_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a weight of `weight_dtype` from :func:`prepack` multiplies activations of `dtype`."""
    return dtype == (torch.float32 if isinstance(packed_weight, Panels) else weight_dtype)


def linear_prepacked(
    x: torch.Tensor,
    packed_weight: torch.Tensor | Panels,
    bias: torch.Tensor | None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scale * activation(x @ weight.T + bias) + residual`` with a weight from :func:`prepack`, or one as it is.

    ``[T, K]``, opaque, ``[N]``, name, ``[T, N]`` -> ``[T, N]``. Gated: an opaque ``[2 N, K]`` and ``[2 N]``; the halves of the
    product are rounded before they meet.
    """
    if isinstance(packed_weight, Panels) and not gated:
        return cpu_native.linear(x, packed_weight, bias, activation, residual, scale)
    if scale is not None:
        return _scaled(linear_prepacked(x, packed_weight, bias, activation, None, gated), scale, residual)
    if gated:
        if isinstance(packed_weight, Panels):
            product = cpu_native.linear(x, packed_weight, bias)
        else:
            product = torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")
        return _epilogue(product, activation, residual, gated)
    if residual is not None and activation == "identity":
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed_weight, bias, "add")
    post_op = _POST_OPS.get(activation)
    if post_op is None:
        result = torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")
        result = _activate(result, activation)
    else:
        result = torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, post_op[0], [], post_op[1])
    return result if residual is None else result.add_(residual)


def _scaled(product: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    scale = scale.to(product.dtype)
    return product * scale if residual is None else torch.addcmul(residual, product, scale)


def _epilogue(product: torch.Tensor, activation: str, residual: torch.Tensor | None, gated: bool) -> torch.Tensor:
    """What follows a product that has been written, ``[T, N]`` or gated ``[T, 2 N]``. May write to it."""
    if gated:
        half, up = product.chunk(2, dim=1)
        product = _activate(half, activation) * up
    else:
        product = _activate(product, activation)
    return product if residual is None else product.add_(residual)


def _activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """May write to `x`: a fresh buffer costs more than the arithmetic."""
    if activation == "identity":
        return x
    if activation in _IN_PLACE:
        return _IN_PLACE[activation](x)
    return ACTIVATIONS[activation](x)
