"""Part "rates": every kernel at the shapes of BERT-base and BERT-large: time, rate, and the fraction of what can be reached.

What moves memory is compared with a copy that moves as many bytes, what multiplies with the vendor's GEMM at the same shape,
and attention with whichever of the two takes longer; both measured in this process. Bytes are the least that the operation
can move: each input read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_judge import absent, find, normal, not_available
from benchmarks.gpu_limits import copy_rate, gemm_flops, input_sets, seconds_each, vendor_rate
from benchmarks.models import lengths_of
from benchmarks.store import Row

DTYPE = torch.bfloat16
Calls = Callable[[int], Callable[[], object]]  # seed -> a call on inputs of its own


@dataclass
class Kernel:
    """One operation at one shape. `make` raises LookupError where the operation is absent."""

    name: str
    make: Calls
    moved: float  # bytes
    shape: tuple[int, int, int] | None = None  # of a matrix product, as (T, N, K)
    flops: float = 0.0
    needs: tuple[str, ...] = ()  # the operation, and arguments that it must take


def measure(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Time of one call, on several sets of inputs in turn, and how that compares with the limit."""
    if why := absent(*kernel.needs):
        return not_available(why)
    calls = [kernel.make(seed) for seed in range(input_sets(kernel.moved, device))]
    spread = seconds_each({"ours": calls}, device)["ours"]
    seconds = spread.median
    copied = copy_rate(int(kernel.moved), device)
    least = {"copy": kernel.moved / copied}
    if kernel.shape is not None:
        least["vendor GEMM"] = kernel.flops / vendor_rate(kernel.shape, DTYPE, device)
    elif kernel.flops:
        size = 256 if device.type == "cpu" else 4096
        least["vendor GEMM"] = kernel.flops / vendor_rate((size, size, size), DTYPE, device)
    limit = "vendor GEMM" if kernel.shape is not None else max(least, key=lambda name: least[name])
    return {
        "passed": True,
        "us": {**spread.to_dict(), **{k: 1e6 * getattr(spread, k) for k in ("median", "low", "high")}},
        "gb_per_s": kernel.moved / seconds / 1e9,
        "tflops": kernel.flops / seconds / 1e12,
        "limit": limit,
        "of_limit": least[limit] / seconds,
    }


def warm(kernel: Kernel) -> None:
    """Compile it."""
    if not absent(*kernel.needs):
        kernel.make(0)()


def kernels(device: torch.device, quick: bool) -> Iterator[Kernel]:
    """All kernels, at a batch that fills the device and at one text."""
    for model, dim, heads in (("base", 768, 12), ("large", 1024, 16)):
        batches = ((64, 128), (1, 128)) if not quick else ((2, 8),)
        for batch, seqlen in batches:
            where = f"{model} {batch}x{seqlen}"
            yield from _products(where, batch * seqlen, dim if not quick else 64, device)
            yield from _memory(where, batch, seqlen, dim if not quick else 64, device)
        for batch, seqlen in ((256, 32), (64, 128), (16, 512), (1, 128)) if not quick else ((2, 8),):
            yield _attention(f"{model} {batch}x{seqlen}", [seqlen] * batch, heads, device)
        if not quick:
            yield _attention(f"{model} 64x128 half padding", lengths_of(64, 128, 0.5), heads, device)
        if quick:
            return


def _products(where: str, tokens: int, dim: int, device: torch.device) -> Iterator[Kernel]:
    linear = find("linear")
    for name, n, k, activation, residual in (
        ("qkv", 3 * dim, dim, "identity", False),
        ("out + residual", dim, dim, "identity", True),
        ("ffn up + gelu", 4 * dim, dim, "gelu", False),
        ("ffn down + residual", dim, 4 * dim, "identity", True),
    ):

        def make(seed, n=n, k=k, activation=activation, residual=residual):
            x, weight, bias, added = _operands(seed, tokens, n, k, device)
            return partial(linear, x, weight, bias, activation, added if residual else None)

        shape = (tokens, n, k)
        moved = 2 * (tokens * (k + n * (2 if residual else 1)) + n * k)
        yield Kernel(f"linear {name}, {where}", make, moved, shape, gemm_flops(shape), ("linear",))

    def gated(seed):
        x, weight, bias, _ = _operands(seed, tokens, 3 * dim, dim, device)
        return partial(linear, x, weight, bias, "gelu", gated=True)  # 2 x 1.5 D rows, as in ModernBERT

    shape = (tokens, 3 * dim, dim)
    moved = 2 * (tokens * (dim + 3 * dim // 2) + 3 * dim * dim)
    yield Kernel(f"linear gated, {where}", gated, moved, shape, gemm_flops(shape), ("linear", "gated"))


def _operands(seed: int, tokens: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    shapes = ((tokens, k), (n, k), (n,), (tokens, n))
    x, weight, bias, added = (_normal(seed * 4 + i, *shape, device=device) for i, shape in enumerate(shapes))
    return x, weight * k**-0.5, bias, added


def _normal(seed: int, *shape: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return normal(seed, *shape, dtype=DTYPE, device=device)
    return torch.randn(shape, device=device, dtype=DTYPE, generator=torch.Generator(device).manual_seed(seed))


def _memory(where: str, batch: int, seqlen: int, dim: int, device: torch.device) -> Iterator[Kernel]:
    tokens = batch * seqlen
    row = 2 * dim  # bytes
    table = dict(zip(("weight", "bias"), (_normal(i, dim, device=device) for i in (90, 91)), strict=True))

    def add_norm(seed, **options):
        x, residual = (_normal(2 * seed + i, tokens, dim, device=device) for i in (0, 1))
        return partial(find("add_norm"), x, residual, table["weight"], table["bias"], 1e-12, **options)

    yield Kernel(f"add_norm, {where}", add_norm, 4 * tokens * row, needs=("add_norm",))
    no_sum = partial(add_norm, keep_sum=False)
    yield Kernel(f"add_norm without sum, {where}", no_sum, 3 * tokens * row, needs=("add_norm", "keep_sum"))

    def partial_sums(seed):
        x = torch.randn(4, tokens, dim, device=device)
        residual = _normal(seed, tokens, dim, device=device)
        arguments = (x, residual, table["weight"], table["bias"], 1e-12)
        return partial(find("add_norm"), *arguments, x_bias=table["bias"])

    if tokens <= 1024:
        moved = 4 * tokens * 2 * row + 3 * tokens * row
        yield Kernel(f"add_norm of 4 partial sums, {where}", partial_sums, moved, needs=("add_norm", "x_bias"))

    lengths = torch.tensor(lengths_of(batch, seqlen, 0.5) if batch > 1 else [max(seqlen // 2, 1)])
    real = (torch.arange(seqlen)[None] < lengths[:, None]).to(device)
    indices, count = real.flatten().nonzero().flatten().to(torch.int32), int(lengths.sum())
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)

    def pack(seed):
        return partial(find("pack"), _normal(seed, batch, seqlen, dim, device=device), indices)

    def unpack(seed):
        return partial(find("unpack"), _normal(seed, count, dim, device=device), indices, batch, seqlen)

    def embed_norm(seed):
        vocabulary, places = (_normal(seed * 3 + i, n, dim, device=device) for i, n in ((0, 30_522), (1, 512)))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(30_522, (tokens,), generator=generator).to(device)
        positions = torch.arange(seqlen, device=device).repeat(batch)
        arguments = (ids, vocabulary, table["weight"], table["bias"], 1e-12)
        return partial(find("embed_norm"), *arguments, position_ids=positions, position_table=places)

    def read_mask(seed):
        return partial(find("read_mask"), real.long(), batch, seqlen)

    def positions(seed):
        return partial(find("token_positions"), real.clone(), offsets, count)

    yield Kernel(f"pack half, {where}", pack, 2 * count * row, needs=("pack",))
    yield Kernel(f"unpack half, {where}", unpack, (count + tokens) * row, needs=("unpack",))
    yield Kernel(f"embed_norm, {where}", embed_norm, (2 * tokens + seqlen) * row, needs=("embed_norm",))
    yield Kernel(f"read_mask, {where}", read_mask, 9 * tokens, needs=("read_mask",))
    yield Kernel(f"token_positions, {where}", positions, tokens + 4 * count, needs=("token_positions",))


def _attention(where: str, lengths: list[int], heads: int, device: torch.device) -> Kernel:
    tokens, dim = sum(lengths), 64
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    tiles = {}
    if not absent("varlen_attention", "tiles") and find("tile_list") is not None:
        queries = find("query_block")(dim, DTYPE, max(lengths), device)
        tiles["tiles"] = find("tile_list")(lengths, queries).to(device)

    def make(seed):
        q, k, v = _normal(seed, tokens, 3, heads, dim, device=device).unbind(1)
        return partial(find("varlen_attention"), q, k, v, offsets, max(lengths), dim**-0.5, **tiles)

    flops = float(sum(4 * s * s * heads * dim for s in lengths))
    moved = 4 * tokens * heads * dim * 2
    return Kernel(f"varlen_attention, {where}", make, moved, flops=flops, needs=("varlen_attention",))


def rows(device: torch.device, quick: bool, deadline: float) -> list[Row]:
    """One row a kernel and shape."""
    made = kernels(device, quick)
    return [Row(one.name, partial(measure, one, device), warm=partial(warm, one)) for one in made]
