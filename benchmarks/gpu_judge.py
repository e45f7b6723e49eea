"""Whether a compiled operation is right: against float64, and against what plain torch makes of it in the same dtype.

Outputs are NaN until they are written, a fallback to the plain implementation is a failure, and a second call must return
the same bits. The bound is the one of the flash-attention tests: twice torch's own error.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from benchmarks.common import complaints, fallbacks
from benchmarks.store import Row
from fastencoder import kernels
from fastencoder.kernels._triton import Launch

Tensors = tuple[torch.Tensor, ...]
FACTOR = 2.0  # how many times torch's own error of the same dtype


def judge(out: torch.Tensor, exact: torch.Tensor, torch_out: torch.Tensor) -> dict[str, Any]:
    """Compares an output with the float64 answer and with torch's own in the same dtype.

    Both the largest and the root-mean-square error may be twice torch's, plus a little where torch happens to be exact:
    one unit in the last place of the largest element, and a tenth of one on the whole. Sums of float32 depend on their
    order in the last three bits. Integers must be equal.
    """
    if out.shape != exact.shape or out.dtype != torch_out.dtype:
        return {"passed": False, "why": f"{out.dtype} {tuple(out.shape)} instead of {torch_out.dtype} {tuple(exact.shape)}"}
    if not out.numel():
        return {"passed": True, "error": 0.0, "torch_error": 0.0, "ratio": 0.0}
    if not out.is_floating_point():
        wrong = int((out != torch_out).sum())
        return {"passed": True, "error": 0.0} if not wrong else {"passed": False, "why": f"{wrong} of {out.numel()} differ"}
    if not bool(out.isfinite().all()):
        return {"passed": False, "why": f"{int((~out.isfinite()).sum())} of {out.numel()} elements are not finite"}
    eps = torch.finfo(out.dtype).eps * (8 if out.dtype == torch.float32 else 1)
    room_largest, room_norm = eps * exact.abs().max(), (1 if out.dtype == torch.float32 else 0.1) * eps * exact.norm()
    ours, theirs = out.double() - exact, torch_out.double() - exact
    norms = [float(x.norm() / exact.norm().clamp(min=1e-300)) for x in (ours, theirs)]
    of_norm = share(ours.norm(), FACTOR * theirs.norm() + room_norm)
    of_largest = share(ours.abs().max(), FACTOR * theirs.abs().max() + room_largest)
    used = max(of_norm, of_largest)
    found = {
        "passed": used <= 1,
        "error": norms[0],
        "torch_error": norms[1],
        "ratio": norms[0] / norms[1] if norms[1] else 0.0,
        "bound_used": used,
    }
    return found if used <= 1 else found | {"why": f"{used:.3g} times its bound (torch {norms[1]:.2e}, ours {norms[0]:.2e})"}


def share(error: torch.Tensor, bound: torch.Tensor) -> float:
    """How much of a bound is used; nothing where both are zero."""
    return 0.0 if not bool(error) else float(error / bound)


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the Triton kernels that are launched inside the block."""
    names: list[str] = []
    original = Launch.run

    def run(self: Launch, device: torch.device) -> None:
        if 0 not in self.grid:
            names.append(getattr(self.kernel, "__name__", str(self.kernel)))
        original(self, device)

    Launch.run = run
    try:
        yield names
    finally:
        Launch.run = original


@contextmanager
def poisoned(outputs: Tensors) -> Iterator[None]:
    """Inside the block new tensors hold NaN: `torch.empty` fills them, and whoever allocates in another way gets freed
    blocks of NaN of the outputs' sizes, which the caching allocator hands out next."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def filled(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return empty

    blocks = [torch.full_like(x, float("nan") if x.is_floating_point() else -1) for x in outputs for _ in range(2)]
    del blocks
    for name, original in originals.items():
        setattr(torch, name, filled(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def find(operation: str) -> Callable[..., Any] | None:
    """An operation by name, wherever in `fastencoder.kernels` it is; None if it is nowhere."""
    for package in (None, *sorted(found.name for found in pkgutil.iter_modules(kernels.__path__) if found.ispkg)):
        module = kernels if package is None else importlib.import_module(f"fastencoder.kernels.{package}")
        function = getattr(module, operation, None)
        if callable(function):
            return function
    return None


def absent(operation: str, *features: str) -> str:
    """Why an operation cannot be called with these arguments here; empty if it can."""
    function = find(operation)
    if function is None:
        return f"there is no {operation}"
    missing = [name for name in features if name not in inspect.signature(function).parameters]
    return f"{operation} does not take {', '.join(missing)}" if missing else ""


def not_available(why: str) -> dict[str, Any]:
    """The result of a row that asks for something that is not there."""
    return {"passed": True, "not_available": why}


def compare(
    operation: str,
    arguments: tuple[Any, ...],
    exact: Callable[..., Any],
    plain: Callable[..., Any],
    device: torch.device,
    options: dict[str, Any] | None = None,
    same_bits: bool = False,
    kernel_too: bool = True,
    outputs: Callable[[Any], Any] = lambda out: out,
) -> dict[str, Any]:
    """Both ways to call an operation, judged: as the layers do, and its Triton kernel by name. Some calls are better
    served by the vendor's library, and then only the second shows that the kernel is right.

    Args:
        exact, plain: take the arguments (for `exact`: in float64) and return what the operation should; `plain` is the
            torch code that a stock model runs.
        options: keyword arguments; `exact` and `plain` get them too.
        same_bits: the operation moves or counts, and must return plain's very bits.
        kernel_too: whether there is a Triton kernel for these arguments.
        outputs: what is compared of that which the operation returns.
    """
    options = options or {}
    features = [name for name, value in options.items() if value is not None and value is not False]
    if why := absent(operation, *features):
        return not_available(why)
    given = {name: options[name] for name in features}
    expected = as_tuple(exact(*map(upcast, arguments), **{name: upcast(value) for name, value in given.items()}))
    torch_out = as_tuple(plain(*arguments, **given))
    function = find(operation)
    forced = kernels.implementation("triton" if device.type == "cuda" else "reference")
    found: dict[str, Any] = {"passed": True}
    for way, context in (("api", nullcontext()), ("kernel", forced))[: 1 + kernel_too]:
        with warnings.catch_warnings(record=True) as caught, launches() as launched, context:
            warnings.simplefilter("always")
            with poisoned(torch_out):
                out = as_tuple(outputs(function(*arguments, **given)))
                again = as_tuple(outputs(function(*arguments, **given)))
        judged = [judge(a, b, c) for a, b, c in zip(out, expected, torch_out, strict=True)]
        why = [f"output {i}: {one['why']}" for i, one in enumerate(judged) if not one["passed"]]
        if same_bits and not all(torch.equal(a, b) for a, b in zip(out, torch_out, strict=True)):
            why.append("rows are moved, so every bit must be torch's")
        if not all(torch.equal(a, b) for a, b in zip(out, again, strict=True)):
            why.append("a second call returned something else")
        fallen = fallbacks()
        why += complaints(caught)
        if fallen and not why:
            why = [f"{', '.join(fallen)} ran on the plain implementation"]
        if way == "kernel" and device.type == "cuda" and not launched and out[0].numel():
            why.append("no Triton kernel was launched")
        worst = max(judged, key=lambda one: one.get("bound_used", 0.0))
        found[way] = {**worst, "passed": not why, "launched": sorted(set(launched))}
        if why:
            found["passed"] = False
            found["why"] = f"{found.get('why', '')} {way}: {'; '.join(why)}".strip()
    return found


def upcast(value: Any) -> Any:
    """Floating tensors in float64, also inside a tuple."""
    if isinstance(value, tuple):
        return tuple(map(upcast, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def as_tuple(value: Any) -> Tensors:
    return value if isinstance(value, tuple) else (value,)


def normal(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def unique(rows: Iterator[Row]) -> list[Row]:
    """Without the rows whose name has been there: a dry run makes different shapes alike."""
    return list({row.name: row for row in rows}.values())
