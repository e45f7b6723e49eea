"""What the layers of each family compute, on packed tokens. The same program on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..packing import PackedBatch
from ..parts import lookup
from ..spec import LayerSpec
from .attention import KINDS, LayerCall
from .binding import Binding
from .guards import Delegated
from .native_layer import run_layers
from .projection import Projection
from .weights import Projections


def run_layer(
    binding: Binding,
    projections: Projections,
    batch: PackedBatch,
    x: torch.Tensor,
    layer: nn.Module | None = None,
    arguments: dict[str, Any] | None = None,
    mask: Any = None,
) -> torch.Tensor:
    """One encoder layer: `x` `[T, D]` -> `[T, D]`, in the same dtype (float32 where a part of the layer is kept in it).

    `layer`, `arguments`, the call's own by name, and `mask` are there for the kinds of attention that need them.
    """
    spec, native = binding.spec, projections.native_layer
    working_dtype = projections.working_dtype(x.shape[0])
    if native is not None and native.runs(x, working_dtype):
        return run_layers(native.isa, native.fields(binding), batch, x)
    call = LayerCall(binding, projections, batch, layer, {} if arguments is None else arguments, mask)
    if spec.wide:
        return _pre_ln_wide(call, x, working_dtype)
    program = {"post": _post_ln, "pre": _pre_ln, "residual": _residual_ln}[spec.adapter.norm_placement]
    output = clamp(program(call, x.to(working_dtype)), spec)
    if output.dtype != x.dtype:
        output = clamp(output.to(x.dtype), spec)
    return KINDS[spec.adapter.attention].finish(call, output)


def _post_ln(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    mixed = _attention(call, x)
    x, _ = _project_add_norm(call, call.projections.out, mixed, x, "norm1", keep_sum=False)
    return KINDS[call.spec.adapter.attention].after(call, x, _post_ln_feed_forward)


def _post_ln_feed_forward(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    if call.binding.feed_forward is not None:
        x, _ = call.norm("norm2", _whole_feed_forward(call, x), x, keep_sum=False)
        return x
    if call.spec.adapter.chosen_last:
        x = _chosen_last(call, call.projections.down(_inner(call, x), residual=x))
        x, _ = call.norm("norm2", x, keep_sum=False)
        return x
    x, _ = _project_add_norm(call, call.projections.down, _inner(call, x), x, "norm2", keep_sum=False)
    return x


def _pre_ln(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    projections = call.projections
    scale1, scale2 = call.binding.layer_scales()
    normed, _ = call.norm("norm1", x)
    mixed = _attention(call, normed)
    if "output_norm1" in call.binding.norms:
        added, _ = call.norm("output_norm1", projections.out(mixed))
        normed, x = call.norm("norm2", added, x, scale1)
    elif call.spec.adapter.clamp == "each-block" and x.dtype == torch.float16:
        x = clamp(projections.out(mixed, residual=x, scale=scale1), call.spec)
        normed, _ = call.norm("norm2", x)
    else:
        normed, x = _project_add_norm(call, projections.out, mixed, x, "norm2", scale1)
    if call.binding.feed_forward is None and "output_norm2" not in call.binding.norms:
        return projections.down(_inner(call, normed), residual=x, scale=scale2)
    if call.binding.feed_forward is not None:
        added = _whole_feed_forward(call, normed)
    else:
        added = projections.down(_inner(call, normed))
    if "output_norm2" in call.binding.norms:
        added, _ = call.norm("output_norm2", added)
    return x + added if scale2 is None else torch.addcmul(x, added, scale2.to(x.dtype))


def _pre_ln_wide(call: LayerCall, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """T5's blocks in half precision: `down` is kept in float32, and the residual stream is float32 behind it."""
    mixed = _attention(call, call.norm("norm1", x)[0].to(dtype))
    x = clamp(x + call.projections.out(mixed), call.spec)
    inner = _inner(call, call.norm("norm2", x)[0].to(dtype))
    return x + call.projections.down(inner.float())


def _residual_ln(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    added, _ = call.norm("norm1", call.projections.out(_attention(call, x)))
    x = x + added
    added, _ = call.norm("norm2", call.projections.down(_inner(call, x)))
    return x + added


def _attention(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    """Attention up to, not including, its output projection: `[T, D]` -> `[T, H * d]`."""
    mixed = KINDS[call.spec.adapter.attention].attend(call, x)
    if "mixed_norm" in call.binding.norms:
        mixed, _ = call.norm("mixed_norm", mixed)
    return mixed


def _inner(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    """The feed-forward block up to, not including, its last projection: `[T, D]` -> `[T, F]`."""
    inner = call.projections.inner(x)
    if "inner_norm" in call.binding.norms:
        inner, _ = call.norm("inner_norm", inner)
    return inner


def _whole_feed_forward(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    """A feed-forward block that is one module of the model's own: `[T, D]` -> `[T, D]`."""
    weights_dtype = call.projections.dtype
    if call.spec.has_choice:
        return call.binding.feed_forward(x.to(weights_dtype).unsqueeze(1), _choice(call))[:, 0].to(x.dtype)
    return call.binding.feed_forward(x.to(weights_dtype).unsqueeze(0))[0].to(x.dtype)


def _chosen_last(call: LayerCall, x: torch.Tensor) -> torch.Tensor:
    """A method of the model's own, with a part that was chosen for each sequence: `[T, D]` -> `[T, D]`."""
    method = lookup(call.layer, call.spec.adapter.chosen_last)
    return method(_choice(call), x.to(call.projections.dtype)).to(x.dtype)


def _choice(call: LayerCall) -> torch.Tensor:
    """The expert or adapter that was chosen for the sequence of each token: `[T]`."""
    given = call.arguments.get(call.spec.adapter.chosen_by)
    if not isinstance(given, torch.Tensor) or given.dim() != 1:
        raise Delegated(f"{call.spec.adapter.chosen_by} is not one number for each sequence")
    try:
        return call.batch.per_sequence(given)
    except ValueError as error:
        raise Delegated(f"{call.spec.adapter.chosen_by}: {error}") from None


def _project_add_norm(
    call: LayerCall,
    projection: Projection,
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: str,
    scale: torch.Tensor | None = None,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum = residual + scale * projection(x)`; returns `norm(sum)` and, if it is kept, `sum`."""
    if call.projections.fuses_residual and scale is None:
        return call.norm(norm, projection(x, residual=residual))
    sums, bias = projection.sums(x)
    return call.norm(norm, sums, residual, scale, bias, keep_sum)


def clamp(x: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """BART's guard against fp16 overflow, as each class has it: always, or only once a value is not finite."""
    if spec.adapter.clamp == "none" or x.dtype != torch.float16:
        return x
    bound = torch.finfo(x.dtype).max - 1000
    if spec.adapter.clamp == "always":
        return x.clamp(-bound, bound)
    # The condition stays on the device: a branch would wait for the GPU in every layer.
    overflow = torch.isinf(x).any() if spec.adapter.clamp == "each-block" else ~torch.isfinite(x).all()
    limit = torch.where(overflow, bound, float("inf")).to(x.dtype)
    return torch.minimum(torch.maximum(x, -limit), limit)
