"""Rows of linear and linear_partial: activations, gates, residuals, and shapes from one token to thousands."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.common import DTYPES
from benchmarks.gpu_judge import compare, normal
from benchmarks.store import Row

ACTIVATIONS = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def linear(x, weight, bias, activation, residual, gated=False):
    """What a stock model computes."""
    out = F.linear(x, weight, bias)
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = ACTIVATIONS[activation](gate) * up
    else:
        out = ACTIVATIONS[activation](out)
    return out if residual is None else out + residual


def partial_exact(x, weight):
    """The sum of all partial sums."""
    return x @ weight.T


def partial_plain(x, weight):
    """The vendor's product with a float32 output, where torch has it."""
    if x.device.type == "cuda" and x.dtype != torch.float32 and x.numel():
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Activations at one shape, then shapes at one activation; a dry run makes all of them small."""
    cases = [(a, True, r, False, 257, 768, 1024) for a, r in product(ACTIVATIONS, (False,))]
    cases += [(a, True, True, False, 257, 768, 1024) for a in ("identity", "gelu")]
    cases += [("identity", False, False, False, 257, 768, 1024), ("gelu", False, True, False, 300, 384, 1536)]
    for tokens, k, n in ((0, 64, 96), (1, 768, 3072), (16, 768, 768), (37, 48, 80), (50, 50, 130), (129, 1152, 4304)):
        cases.append(("gelu", True, False, False, tokens, k, n))
    cases += [("identity", True, True, False, t, k, n) for t, k, n in ((511, 3072, 768), (4096, 1024, 1024))]
    cases += [("gelu", True, False, False, 8192, 768, 3072), ("identity", True, True, False, 8192, 3072, 768)]
    cases += [(a, True, False, True, 257, 768, 1152) for a in ("gelu", "silu", "gelu_tanh")]
    cases += [("gelu", False, True, True, t, k, n) for t, k, n in ((1, 768, 1152), (37, 48, 80), (4096, 768, 2048))]
    partial = [(1, 768, 3072), (16, 768, 768), (37, 48, 80), (128, 3072, 768), (129, 4096, 1024), (0, 64, 96)]
    if quick:
        cases = [(a, b, r, g, min(t, 40), min(k, 50), min(n, 70)) for a, b, r, g, t, k, n in cases[:11] + cases[-6:]]
        partial = [(min(t, 20), min(k, 50), min(n, 70)) for t, k, n in partial]
    for dtype, (activation, bias, residual, gated, tokens, k, n) in product(DTYPES, dict.fromkeys(cases)):
        extras = "".join([" bias" * bias, " residual" * residual, " gated" * gated])
        name = f"linear {dtype} {tokens}x{k}->{n} {activation}{extras}"

        def run(
            dtype=DTYPES[dtype], activation=activation, bias=bias, residual=residual, gated=gated, t=tokens, k=k, n=n
        ):
            def make(seed, *shape):
                return normal(seed, *shape, dtype=dtype, device=device)

            wide = 2 * n if gated else n
            weight = make(2, wide, k) * k**-0.5
            more = (make(3, wide) if bias else None, activation, make(4, t, n) if residual else None)
            return compare("linear", (make(1, t, k), weight, *more), linear, linear, device, {"gated": gated})

        yield Row(name, run)
    for dtype, (tokens, k, n) in product(DTYPES, dict.fromkeys(partial)):

        def run_partial(dtype=DTYPES[dtype], t=tokens, k=k, n=n):
            x = normal(1, t, k, dtype=dtype, device=device)
            weight = normal(2, n, k, dtype=dtype, device=device) * k**-0.5
            return compare("linear_partial", (x, weight), partial_exact, partial_plain, device, outputs=lambda p: p.sum(0))

        yield Row(f"linear_partial {dtype} {tokens}x{k}->{n}", run_partial)
