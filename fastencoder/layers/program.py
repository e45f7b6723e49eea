"""What the layers of each family compute, on packed tokens. The same program on every device."""

from __future__ import annotations

import torch

from ..kernels import add_norm, varlen_attention
from ..packing import PackedBatch
from ..spec import LayerSpec
from .binding import Binding
from .weights import Projection, Projections


def run_layer(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    """One encoder layer: `x` `[T, D]` -> `[T, D]`, in the same dtype."""
    spec = binding.spec
    program = _post_ln if spec.adapter.norm_placement == "post" else _pre_ln
    working_dtype = projections.working_dtype(x.shape[0])
    return clamp(program(binding, projections, batch, x.to(working_dtype)).to(x.dtype), spec)


def _post_ln(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    mixed = _attention(binding, projections, batch, x)
    x, _ = _project_add_norm(projections, projections.out, mixed, x, binding.norm1, keep_sum=False)
    inner = _up(binding, projections, x)
    x, _ = _project_add_norm(projections, projections.down, inner, x, binding.norm2, keep_sum=False)
    return x


def _pre_ln(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    scale1, scale2 = binding.layer_scales()
    normed, _ = _norm(binding.norm1, x)
    mixed = _attention(binding, projections, batch, normed)
    normed, x = _project_add_norm(projections, projections.out, mixed, x, binding.norm2, scale1)
    inner = _up(binding, projections, normed)
    return projections.down(inner, residual=x, scale=scale2)


def _attention(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    """Attention up to, not including, its output projection: `[T, D]` -> `[T, H * d]`."""
    q, k, v = projections.qkv(x)
    tiles = batch.tiles(binding.spec.head_dim, x.dtype)
    return varlen_attention(q, k, v, batch.offsets, batch.max_seqlen, binding.scale, tiles=tiles).flatten(1)


def _up(binding: Binding, projections: Projections, x: torch.Tensor) -> torch.Tensor:
    """The first half of the feed-forward block: `[T, D]` -> `[T, F]`."""
    if binding.spec.activation == "module":
        return binding.activation(projections.up(x))
    return projections.up(x, activation=binding.spec.activation)


def _project_add_norm(
    projections: Projections,
    projection: Projection,
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.nn.LayerNorm,
    scale: torch.Tensor | None = None,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum = residual + scale * projection(x)`; returns `norm(sum)` and, if it is kept, `sum`."""
    if projections.fuses_residual and scale is None:
        return _norm(norm, projection(x, residual=residual))
    sums, bias = projection.sums(x)
    return _norm(norm, sums, residual, scale, bias, keep_sum)


def _norm(
    norm: torch.nn.LayerNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = norm.weight, norm.bias
    if weight.dtype != x.dtype and x.dim() == 2:  # the working dtype is not the weights' (partial sums are float32 anyway)
        weight, bias, scale = (None if vector is None else vector.to(x.dtype) for vector in (weight, bias, scale))
    return add_norm(x, residual, weight, bias, norm.eps, scale, x_bias=x_bias, keep_sum=keep_sum)


def clamp(x: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """BART's guard against fp16 overflow, as each class has it: always, or only once a value is not finite."""
    if spec.adapter.clamp == "none" or x.dtype != torch.float16:
        return x
    bound = torch.finfo(x.dtype).max - 1000
    if spec.adapter.clamp == "always":
        return x.clamp(-bound, bound)
    # The condition stays on the device: a branch would wait for the GPU in every layer.
    limit = torch.where(torch.isfinite(x).all(), float("inf"), bound).to(x.dtype)
    return torch.minimum(torch.maximum(x, -limit), limit)
