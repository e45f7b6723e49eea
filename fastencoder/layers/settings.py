"""What the user asked of a conversion: `to_fast`'s `compute_dtype`, `memory` and `batch_invariant`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ..kernels.linear import cpu as linear_cpu
from ..parts import linear_at, lookup
from ..spec import LINEAR_SLOTS, NORM_SLOTS, LayerSpec

Memory = Literal["default", "lean"]
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Settings:
    """What the user asked of a conversion.

    Args:
        compute_dtype: one of `COMPUTE_DTYPES`; None computes in the dtype of the parameters.
        memory: "default" keeps each linear weight once more where that is faster, "lean" never does.
        batch_invariant: whether the bits of a sequence's output may depend on that sequence alone (`invariance`).

    Raises:
        ValueError: another value, or two that exclude one another.
    """

    compute_dtype: torch.dtype | None = None
    memory: Memory = "default"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.compute_dtype is not None and self.compute_dtype not in COMPUTE_DTYPES:
            allowed = ", ".join(map(str, COMPUTE_DTYPES))
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}; it may be None, {allowed}")
        if self.memory not in get_args(Memory):
            raise ValueError(f"memory is {self.memory!r}; it may be {' or '.join(map(repr, get_args(Memory)))}")
        if self.batch_invariant and self.memory == "lean":
            raise ValueError(
                "batch_invariant=True multiplies a copy of the weights, which memory='lean' does not keep: "
                "leave one of the two out"
            )


DEFAULT = Settings()


def plain_weights(layer: nn.Module, spec: LayerSpec) -> list[torch.Tensor]:
    """The weights of a layer's plain linear slots; those of its norms, if it has none."""
    slots = spec.names.given(LINEAR_SLOTS)
    weights = [linear_at(layer, path).weight for slot, path in slots.items() if slot not in spec.opaque]
    norms = [lookup(layer, path) for path in spec.names.given(NORM_SLOTS).values()]  # of which one may be an identity
    return weights or [norm.weight for norm in norms if getattr(norm, "weight", None) is not None]


def fastest_dtype(wanted: torch.dtype | None, own: torch.Tensor) -> torch.dtype:
    """The dtype to compute in, where `wanted` is asked for and the weights are like `own`: their own dtype if the processor is
    no faster in 16 bits, which is the more exact as well."""
    if wanted is None or wanted == own.dtype:
        return own.dtype
    if own.device.type == "cpu" and wanted.itemsize == 2:
        multiplies = linear_cpu.can_prepack(torch.empty(0, 0, dtype=wanted, device="cpu"))
        if not multiplies or (own.dtype == torch.float32 and not linear_cpu.is_faster_than_float32(wanted)):
            return own.dtype
    return wanted


def computing_dtype(settings: Settings, spec: LayerSpec, weights: list[torch.Tensor]) -> torch.dtype:
    """The dtype that a layer with these plain weights computes in: its own if it cannot compute in the one asked for."""
    own = weights[0].dtype
    return own if refusal(settings, spec, weights) else fastest_dtype(settings.compute_dtype, weights[0])


def refusal(settings: Settings, spec: LayerSpec, weights: list[torch.Tensor]) -> str | None:
    """Why a layer cannot compute as it is asked to, or None."""
    wanted = fastest_dtype(settings.compute_dtype, weights[0])
    if wanted == weights[0].dtype:
        return None
    without = "convert without compute_dtype"
    if settings.memory == "lean":
        return f"{wanted} takes a copy of the weights, which memory='lean' does not keep: leave one of the two out"
    if spec.opaque:
        slots = ", ".join(sorted(spec.names.given(LINEAR_SLOTS)[slot] for slot in spec.opaque))
        return f"{slots} is no plain linear and computes in its own dtype, not in {wanted}: merge it, or {without}"
    if spec.has_choice or spec.adapter.chosen_last or not spec.intermediate_size:
        return f"its feed-forward block is called as it is, in its own dtype, not in {wanted}: {without}"
    if spec.wide:
        return f"one of its projections is kept in float32 beside {weights[0].dtype}: {without}"
    if any(weight.is_inference() for weight in weights):
        return f"its weights were made in inference mode: a copy of them in {wanted} could be stale. {without.capitalize()}"
    return None
