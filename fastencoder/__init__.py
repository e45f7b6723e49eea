"""Fused-kernel inference for Hugging Face encoder models: `to_fast(model)` and `reverse(model)`."""

from .conversion import AlreadyFastError, NotEligibleError, NotFastError, fast, is_fast, reverse, to_fast
from .layers import BatchVariantError
from .layers.traffic import BusyError
from .registry import register
from .report import LayerRow, Report, explain
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "AlreadyFastError",
    "BatchVariantError",
    "BusyError",
    "LayerRow",
    "NotEligibleError",
    "NotFastError",
    "Report",
    "explain",
    "fast",
    "is_fast",
    "register",
    "reverse",
    "to_fast",
    "warmup",
]
