"""Part "dispatch": the alternatives between which the heuristics of `linear` and `varlen_attention` choose, all of them timed.

Each row is one entry's worth of evidence: the time of the vendor's GEMM (with its separate epilogue), of every tile in the
table and a few that are not, of partial sums with the norm that adds them up; and which of them the heuristics chose. A
candidate that does not compile is said to; one with a wrong answer fails the row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks.common import relative_error
from benchmarks.gpu_judge import find, not_available
from benchmarks.gpu_kernels_linear import linear as plain_linear
from benchmarks.gpu_limits import gemm_flops, input_sets, seconds_each
from benchmarks.store import Row, short

DTYPE = torch.bfloat16
TOKENS = (8192, 128, 512, 2048, 32768)
WRONG = 2e-2  # relative error of a bfloat16 product is about 2e-3
CHOSEN, VENDOR = "chosen", "vendor"

Make = Callable[[int], Callable[[], torch.Tensor]]  # seed -> a call on inputs of its own


@dataclass
class Contest:
    """Candidates for one call, all of which must return the same up to rounding."""

    name: str
    candidates: Callable[[], dict[str, Make]]
    moved: float  # bytes of one call
    flops: float
    choice: Callable[[], str]


def judge(contest: Contest, device: torch.device) -> dict[str, Any]:
    """Time every candidate whose answer is right."""
    found: dict[str, Any] = {"passed": True, "us": {}, "not_measured": {}}
    sets = input_sets(contest.moved, device)
    systems: dict[str, list[Callable[[], torch.Tensor]]] = {}
    reference = None
    for name, make in contest.candidates().items():
        try:
            out = make(0)()
            reference = out if reference is None else reference
            error = relative_error(out.float(), reference.float())
            calls = [make(seed) for seed in range(sets)]
        except Exception as problem:
            found["not_measured"][name] = short(problem)
            continue
        if error > WRONG:
            found |= {"passed": False, "why": f"{name}: {error:.1e} from the first candidate"}
            continue
        systems[name] = calls
    for name, spread in seconds_each(systems, device, 11).items():
        found["us"][name] = 1e6 * spread.median
    best = min(found["us"], key=lambda name: found["us"][name])
    found |= {"best": best, "choice": contest.choice(), "tflops": contest.flops / found["us"][best] / 1e6}
    if CHOSEN in found["us"]:
        found["lost"] = found["us"][CHOSEN] / found["us"][best] - 1  # what a right choice would save
    return found


def warm(contest: Contest) -> None:
    """Compile all candidates, so that the process that times them finds them in Triton's cache."""
    for make in contest.candidates().values():
        try:
            make(0)()
        except Exception:
            continue  # said by `judge`


def linear_contests(device: torch.device, quick: bool) -> Iterator[Contest]:
    """The products of BERT-base and BERT-large, by importance: many tokens, then few."""
    for tokens in TOKENS if not quick else (24,):
        for size, dim in (("base", 768), ("large", 1024)) if not quick else (("base", 64),):
            for name, n, k, activation, residual in (
                ("ffn up + gelu", 4 * dim, dim, "gelu", False),
                ("ffn down + residual", dim, 4 * dim, "identity", True),
                ("qkv", 3 * dim, dim, "identity", False),
                ("out + residual", dim, dim, "identity", True),
            ):
                shape = (tokens, n, k)
                yield Contest(
                    f"linear {name}, {size}, T={tokens}",
                    partial(_linear_candidates, shape, activation, residual, device),
                    2.0 * (tokens * (k + n) + n * k),
                    gemm_flops(shape),
                    partial(_linear_choice, shape, activation, residual, device),
                )
                if residual and tokens <= 512:
                    yield Contest(
                        f"linear + add_norm {name}, {size}, T={tokens}",
                        partial(_partial_candidates, shape, device),
                        2.0 * (tokens * (k + n) + n * k),
                        gemm_flops(shape),
                        partial(_splits, shape, device),
                    )


@lru_cache(maxsize=24)
def _operands(seed: int, shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, ...]:
    tokens, n, k = shape
    generator = torch.Generator(device).manual_seed(seed)
    sizes = ((tokens, k), (n, k), (n,), (tokens, n))
    x, weight, bias, added = (torch.randn(size, device=device, dtype=DTYPE, generator=generator) for size in sizes)
    return x, weight * k**-0.5, bias, added


def _linear_candidates(
    shape: tuple[int, int, int], activation: str, residual: bool, device: torch.device
) -> dict[str, Make]:
    def vendor(seed):
        x, weight, bias, added = _operands(seed, shape, device)
        return partial(plain_linear, x, weight, bias, activation, added if residual else None)

    def chosen(seed):
        x, weight, bias, added = _operands(seed, shape, device)
        return partial(find("linear"), x, weight, bias, activation, added if residual else None)

    tiles = {} if device.type == "cpu" else tile_candidates(shape, activation, residual, device)
    return {VENDOR: vendor, CHOSEN: chosen, **tiles}


def tile_candidates(
    shape: tuple[int, int, int], activation: str, residual: bool, device: torch.device
) -> dict[str, Make]:
    """Our GEMM with each tile."""
    triton = importlib.import_module("fastencoder.kernels.linear.triton_kernel")
    limits = limits_of(device)

    def with_tile(tile):
        def make(seed):
            x, weight, bias, added = _operands(seed, shape, device)

            def call():
                out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=device)
                arguments = (x, weight, bias, activation, added if residual else None, out, limits)
                triton.plan(*arguments, tile=tile).run(device)
                return out

            return call

        return make

    return {_tile_name(tile): with_tile(tile) for tile in _tiles(shape[0], residual, device)}


def limits_of(device: torch.device) -> Any:
    """What tiles depend on."""
    return importlib.import_module("fastencoder.kernels._triton").device_limits(device)


def _tiles(tokens: int, residual: bool, device: torch.device) -> list[Any]:
    """Those of the table for so many tokens, and a few more."""
    heuristics = importlib.import_module("fastencoder.kernels.linear.heuristics")
    limits, few = limits_of(device), tokens <= 64
    row = next(row for row in heuristics.rows(DTYPE, "ieee", limits) if tokens <= row.tokens)
    tile = heuristics.Tile
    more = [tile(128, 128, 64, 4, 4, 1.0), tile(64, 256, 64, 8, 3, 1.0)]
    if limits.capability[0] >= 9:
        more += [tile(256, 128, 64, 8, 4, 1.0, True), tile(128, 128, 64, 4, 4, 1.0, True), tile(64, 256, 64, 4, 4, 1.0, True)]
    wanted = [*row.tiles, *([] if few else more)]
    like = dict(dtype=DTYPE, with_residual=residual, gated=False, aligned=True, limits=limits)
    fitted = [heuristics.fitted(one, **like) for one in wanted]
    return list({_tile_name(one): one for one in fitted}.values())


def _tile_name(tile: Any) -> str:
    kind = "persistent" if tile.descriptors else "pointers"
    return f"{tile.m}x{tile.n}x{tile.k} {tile.num_warps} warps {tile.num_stages} stages {kind}"


def _linear_choice(shape: tuple[int, int, int], activation: str, residual: bool, device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    heuristics = importlib.import_module("fastencoder.kernels.linear.heuristics")
    options = {"activation": activation, "with_residual": residual}
    choice = heuristics.choose(*shape, DTYPE, "ieee", limits_of(device), **options)
    splits = f", {choice.splits} splits" if choice.splits > 1 else ""
    return VENDOR if choice.vendor else _tile_name(choice.tile) + splits


def _partial_candidates(shape: tuple[int, int, int], device: torch.device) -> dict[str, Make]:
    """A product and the norm after it; or partial sums, which the norm adds up."""
    add_norm, n = find("add_norm"), shape[1]
    weight_of_norm, bias_of_norm = (torch.ones(n, device=device, dtype=DTYPE) for _ in range(2))

    def whole(function):
        def make(seed):
            x, weight, bias, added = _operands(seed, shape, device)
            return lambda: add_norm(function(x, weight, bias), added, weight_of_norm, bias_of_norm, 1e-12)[0]

        return make

    def split(splits):
        def make(seed):
            x, weight, bias, added = _operands(seed, shape, device)
            sums = partial(find("linear_partial"), splits=splits)
            norm = (added, weight_of_norm, bias_of_norm, 1e-12)
            return lambda: add_norm(sums(x, weight), *norm, x_bias=bias)[0]

        return make

    vendor = whole(lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias))
    candidates = {VENDOR: vendor, "linear": whole(find("linear"))}
    return candidates | {f"{splits} splits": split(splits) for splits in (1, 2, 3, 4, 6, 8) if shape[2] >= 256 * splits}


def _splits(shape: tuple[int, int, int], device: torch.device) -> str:
    return f"{find('partial_splits')(*shape, DTYPE, device)} splits"


def rows(device: torch.device, quick: bool, deadline: float) -> list[Row]:
    """One row a contest; attention's come after the products of many tokens."""
    missing = [name for name in ("partial_splits", "linear_partial", "tile_list", "query_block") if find(name) is None]
    if missing:
        return [Row("contests", lambda: not_available(f"there is no {', no '.join(missing)}"))]
    from benchmarks.gpu_dispatch_attention import attention_contests

    contests = [*linear_contests(device, quick), *attention_contests(device, quick)]
    contests.sort(key=lambda contest: contest.name.startswith("attention") + 2 * contest.name.endswith("T=32768"))
    return [Row(c.name, partial(judge, c, device), warm=partial(warm, c)) for c in contests]
