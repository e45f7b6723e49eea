"""What the layers of each family compute, on packed tokens. The same program on every device."""

from __future__ import annotations

import torch

from ..kernels import add_norm, varlen_attention
from ..packing import PackedBatch
from ..spec import LayerSpec
from .binding import Binding
from .weights import Projections


def run_layer(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    """One encoder layer: `x` `[T, D]` -> `[T, D]`."""
    spec = binding.spec
    program = _post_ln if spec.adapter.norm_placement == "post" else _pre_ln
    return _clamp(program(binding, projections, batch, x), spec)


def _post_ln(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    attended = _attention(binding, projections, batch, x)
    x, _ = _norm(binding.norm1, attended, residual=x)
    x, _ = _norm(binding.norm2, _feed_forward(binding, projections, x), residual=x)
    return x


def _pre_ln(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    scale1, scale2 = binding.layer_scales()
    normed, _ = _norm(binding.norm1, x)
    attended = _attention(binding, projections, batch, normed)
    normed, x = _norm(binding.norm2, attended, residual=x, scale=scale1)
    if scale2 is None:
        return _feed_forward(binding, projections, normed, residual=x)
    return torch.addcmul(x, _feed_forward(binding, projections, normed), scale2)


def _attention(binding: Binding, projections: Projections, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    q, k, v = projections.qkv(x)
    mixed = varlen_attention(q, k, v, batch.offsets, batch.max_seqlen, binding.scale)
    return projections.out(mixed.flatten(1))


def _feed_forward(
    binding: Binding, projections: Projections, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    if binding.spec.activation == "module":
        return projections.down(binding.activation(projections.up(x)), residual=residual)
    return projections.down(projections.up(x, activation=binding.spec.activation), residual=residual)


def _norm(
    norm: torch.nn.LayerNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_norm(x, residual, norm.weight, norm.bias, norm.eps, scale)


def _clamp(x: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """BART's guard against fp16 overflow, as each class has it: always, or only once a value is not finite."""
    if spec.adapter.clamp == "none" or x.dtype != torch.float16:
        return x
    bound = torch.finfo(x.dtype).max - 1000
    if spec.adapter.clamp == "always":
        return x.clamp(-bound, bound)
    # The condition stays on the device: a branch would wait for the GPU in every layer.
    limit = torch.where(torch.isfinite(x).all(), float("inf"), bound).to(x.dtype)
    return torch.minimum(torch.maximum(x, -limit), limit)
