"""Part "kernels": every operation, compiled, against float64, and against what plain torch makes of it in the same dtype.

Each row calls the operation as the layers do and, where there is a Triton kernel behind it, that kernel itself: some calls
are better served by the vendor's library, and then only the second of the two shows that the kernel is right. Freed blocks
of NaN lie where the outputs will be, a fallback to the plain implementation is a failure, and a second call must return the
same bits.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import DTYPES, complaints, dispatchers, fallbacks
from benchmarks.store import Row
from fastencoder import kernels
from fastencoder.kernels._triton import Launch

Tensors = tuple[torch.Tensor, ...]
FACTOR = 2.0  # how many times torch's own error of the same dtype


def judge(out: torch.Tensor, exact: torch.Tensor, torch_out: torch.Tensor) -> dict[str, Any]:
    """Compares an output with the float64 answer and with torch's own in the same dtype.

    Both the largest and the root-mean-square error may be twice torch's, plus a little where torch happens to be exact:
    one unit in the last place of the largest element, and a tenth of one on the whole. Sums of float32 depend on their
    order in the last three bits.
    """
    if out.shape != exact.shape or out.dtype != torch_out.dtype:
        return {"passed": False, "why": f"{out.dtype} {tuple(out.shape)} instead of {torch_out.dtype} {tuple(exact.shape)}"}
    if not out.numel():
        return {"passed": True, "error": 0.0, "torch_error": 0.0, "ratio": 0.0}
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


def poison(outputs: Tensors) -> None:
    """Leaves freed blocks of NaN of the outputs' sizes, which the caching allocator hands out next."""
    blocks = [torch.full_like(x, float("nan")) for x in outputs for _ in range(2)]
    del blocks


def direct(operation: str, device: torch.device) -> Callable[..., Any]:
    """The operation's Triton implementation; its plain one where no GPU is."""
    name = {"unpack": "pack"}.get(operation, operation)
    module = "triton_kernel" if device.type == "cuda" else "reference"
    return getattr(importlib.import_module(f"fastencoder.kernels.{name}.{module}"), operation)


def compare(
    operation: str,
    arguments: tuple[Any, ...],
    exact: Callable[..., Any],
    plain: Callable[..., Any],
    device: torch.device,
) -> dict[str, Any]:
    """Both ways to call an operation, judged.

    Args:
        exact, plain: take the arguments (for `exact`: in float64) and return what the operation should; `plain` is the
            torch code that a stock model runs.
    """
    upcast = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    expected, torch_out = as_tuple(exact(*upcast)), as_tuple(plain(*arguments))
    found: dict[str, Any] = {"passed": True}
    for way, call in (("api", getattr(kernels, operation)), ("kernel", direct(operation, device))):
        with warnings.catch_warnings(record=True) as caught, launches() as launched:
            warnings.simplefilter("always")
            poison(torch_out)
            out = as_tuple(call(*arguments))
            again = as_tuple(call(*arguments))
        judged = [judge(a, b, c) for a, b, c in zip(out, expected, torch_out, strict=True)]
        why = [f"output {i}: {one['why']}" for i, one in enumerate(judged) if not one["passed"]]
        if operation in ("pack", "unpack") and not torch.equal(out[0], torch_out[0]):
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


def as_tuple(value: Any) -> Tensors:
    return value if isinstance(value, tuple) else (value,)


def normal(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


# --- linear ---

_ACTIVATIONS = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def _linear(x, weight, bias, activation, residual):
    out = _ACTIVATIONS[activation](F.linear(x, weight, bias))
    return out if residual is None else out + residual


def linear_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Activations at one shape, then shapes at one activation."""
    cases = [(a, True, r, 257, 768, 1024) for a, r in [*product(_ACTIVATIONS, (False,)), ("identity", True), ("gelu", True)]]
    cases += [("identity", False, False, 257, 768, 1024), ("gelu", False, True, 300, 384, 1536)]
    for tokens, k, n in ((0, 64, 96), (1, 768, 3072), (16, 768, 768), (37, 48, 80), (50, 50, 130), (129, 1152, 4304)):
        cases.append(("gelu", True, False, tokens, k, n))
    cases += [("identity", True, True, t, k, n) for t, k, n in ((511, 3072, 768), (4096, 1024, 1024), (8192, 3072, 768))]
    if quick:
        cases = [(a, b, r, min(t, 40), min(k, 50), min(n, 70)) for a, b, r, t, k, n in cases[:11]]
    for dtype, (activation, bias, residual, tokens, k, n) in product(DTYPES, cases):
        extras = "".join([" bias" * bias, " residual" * residual])
        name = f"linear {dtype} {tokens}x{k}->{n} {activation}{extras}"

        def run(dtype=DTYPES[dtype], activation=activation, bias=bias, residual=residual, t=tokens, k=k, n=n):
            def make(seed, *shape):
                return normal(seed, *shape, dtype=dtype, device=device)

            weight = make(2, n, k) * k**-0.5
            more = (make(3, n) if bias else None, activation, make(4, t, n) if residual else None)
            return compare("linear", (make(1, t, k), weight, *more), _linear, _linear, device)

        yield Row(name, run)


# --- attention ---


def _attention(q, k, v, offsets, max_seqlen, scale):
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    bounds = offsets.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        if start < end:
            query, key, value = (x[None, start:end].transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            mixed = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
            out[start:end] = mixed[0].transpose(0, 1)
    return out


RAGGED = (0, 1, 17, 64, 0, 128, 127, 63, 2, 0)
LONG = (700, 0, 1, 512, 257)
DENSE = (128, 128, 128, 128)


def attention_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Lengths, head sizes, strided views of one buffer, and fewer key heads than query heads."""
    cases = [(dim, 4, 4, RAGGED, 1.0) for dim in (32, 64, 72, 80, 128)]
    cases += [(dim, 4, 4, LONG, 1.0) for dim in (32, 64, 72, 80, 128)]
    cases += [(64, 8, 2, RAGGED, 1.0), (64, 8, 1, LONG, 1.0), (64, 12, 12, DENSE, 1.0), (64, 4, 4, (1,), 1.0)]
    cases += [(64, 4, 4, (9, 0, 31, 16), 1.0), (16, 4, 4, RAGGED, 1.0), (256, 2, 2, RAGGED, 1.0), (64, 4, 4, (0, 0), 1.0)]
    cases += [(64, 4, 4, RAGGED, 8.0), (64, 4, 4, LONG, 8.0)]  # scores far apart: softmax close to one-hot
    if quick:
        cases = [(d, h, hk, tuple(min(x, 20) for x in lengths), s) for d, h, hk, lengths, s in cases[::2]]
    for dtype, (dim, heads, key_heads, lengths, spread) in product(DTYPES, cases):
        name = f"varlen_attention {dtype} d={dim} heads={heads}/{key_heads} lengths={','.join(map(str, lengths))}"
        if spread != 1:
            name += f" scores x{spread:g}"

        def run(dtype=DTYPES[dtype], dim=dim, heads=heads, key_heads=key_heads, lengths=lengths, spread=spread):
            tokens = sum(lengths)
            offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
            # One buffer, as a fused projection of queries, keys and values leaves it.
            buffer = normal(1, tokens, heads + 2 * key_heads, dim, dtype=dtype, device=device)
            q, k, v = buffer.split([heads, key_heads, key_heads], dim=1)
            arguments = (q, k, v, offsets, max(lengths), spread * dim**-0.5)
            return compare("varlen_attention", arguments, _attention, _attention, device)

        yield Row(name, run)


# --- residual, layer scale and norm ---


def _add_norm(x, residual, weight, bias, eps, scale):
    total = x if scale is None else x * scale
    total = total if residual is None else residual + total
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total


def add_norm_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Widths, what is added, and rows whose mean is far larger than their spread."""
    cases = [(37, dim, True, True, False, 0.0) for dim in (48, 312, 384, 768, 1000, 1024, 1280, 4096)]
    cases += [(t, 768, True, True, False, 0.0) for t in (0, 1, 4096)]
    cases += [(37, 768, r, b, s, 0.0) for r, b, s in product((False, True), repeat=3)]
    cases += [(37, 768, True, True, False, 300.0), (37, 1000, False, True, True, 300.0)]
    cases = list(dict.fromkeys(cases))
    if quick:
        cases = [(min(t, 5), min(d, 64), *rest) for t, d, *rest in cases[8:]]
        cases = list(dict.fromkeys(cases))
    for dtype, (tokens, dim, residual, bias, scale, mean) in product(DTYPES, cases):
        extras = "".join([" residual" * residual, " bias" * bias, " scale" * scale, f" mean={mean:g}" * bool(mean)])
        name = f"add_norm {dtype} {tokens}x{dim}{extras}"

        def run(dtype=DTYPES[dtype], t=tokens, dim=dim, residual=residual, bias=bias, scale=scale, mean=mean):
            def make(seed, *shape):
                return normal(seed, *shape, dtype=dtype, device=device)

            x = (make(1, t, dim) + mean).to(dtype)
            arguments = (
                x,
                make(2, t, dim) if residual else None,
                1 + 0.4 * make(3, dim),
                make(4, dim) if bias else None,
                0.3,  # far from 0, so that a dropped eps shows
                1 + 0.5 * make(5, dim) if scale else None,
            )
            return compare("add_norm", arguments, _add_norm, _add_norm, device)

        yield Row(name, run)


# --- packing ---


def _pack(hidden, indices):
    return hidden.flatten(0, 1)[indices.long()]


def _unpack(values, indices, batch, seqlen):
    padded = values.new_zeros(batch * seqlen, values.shape[1])
    padded[indices.long()] = values
    return padded.view(batch, seqlen, -1)


def pack_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Holes anywhere, no token at all, no padding; both index types. Torch moves rows exactly, and so must we."""
    cases = [(5, 37, 48, 0.5), (32, 128, 768, 0.7), (1, 1, 80, 0.0), (3, 20, 64, 1.0), (4, 512, 1024, 0.25), (7, 9, 33, 0.0)]
    if quick:
        cases = [(b, min(s, 20), min(d, 48), share) for b, s, d, share in cases]
    for dtype, index, (batch, seqlen, dim, share) in product(DTYPES, (torch.int64, torch.int32), cases):
        for operation in ("pack", "unpack"):
            name = f"{operation} {dtype} {str(index)[6:]} {batch}x{seqlen}x{dim} padding={share:g}"

            def run(op=operation, dtype=DTYPES[dtype], index=index, b=batch, s=seqlen, d=dim, share=share):
                real = torch.rand(b * s, generator=torch.Generator().manual_seed(7)) >= share
                indices = real.nonzero().flatten().to(device=device, dtype=index)
                if op == "pack":
                    hidden = normal(1, b, s, d, dtype=dtype, device=device)
                    hidden.view(b * s, d)[~real.to(device)] = float("nan")  # padding is never read
                    return compare("pack", (hidden, indices), _pack, _pack, device)
                values = normal(1, len(indices), d, dtype=dtype, device=device)
                return compare("unpack", (values, indices, b, s), _unpack, _unpack, device)

            yield Row(name, run)


def rows(device: torch.device, quick: bool) -> list[Row]:
    """All rows of the part."""
    assert len(list(dispatchers())) == 5, "an operation was added: give it rows here"
    makers = (pack_rows, add_norm_rows, attention_rows, linear_rows)
    made = [row for maker in makers for row in maker(device, quick)]
    return list({row.name: row for row in made}.values())
