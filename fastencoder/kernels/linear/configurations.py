"""Every kernel configuration of ``linear`` that the heuristics can ask for on a device, for the examination without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastencoder.kernels._triton import DeviceLimits, Launch, dot_precision, user_precision
from fastencoder.kernels.linear import heuristics
from fastencoder.kernels.linear.heuristics import Tile, fitted
from fastencoder.kernels.linear.triton_kernel import plan, plan_partial, plan_reduction

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
_N, _K = 3072, 768


def configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Each configuration once, by name: on some devices two tiles of the table become the same one."""
    yield from dict(_configurations(limits)).items()


def _configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Every tile of the table with the epilogues that ask for most of it: exact GELU, gated with a residual, and where a
    tile has no stage to spare for it a residual alone. Split-K, every other activation and the reduction, once or twice.

    The two 16-bit types differ in one instruction, so that each is compiled where the other is not.
    """
    for dtype in ("bf16", "tf32", "fp32"):
        with user_precision(dtype):
            tiles = _tiles(dtype, limits)
            for tile in tiles:
                yield _product(dtype, tile, "gelu", False, False, limits)
                if dtype == "bf16" or tile == tiles[-1]:
                    yield _product(dtype, tile, "silu", True, True, limits)
                if dtype == "bf16" and tile.m >= 128:
                    yield _product(dtype, tile, "identity", True, False, limits, scaled=True)
                if tile.descriptors:
                    yield _product(dtype, tile, "silu", False, True, limits)
                    yield _product(dtype, tile, "identity", True, False, limits)
            if dtype != "fp32":
                yield _partial(dtype, tiles[0], limits)
                yield _partial(dtype, tiles[-1], limits)
    for activation in ("gelu_tanh", "quick_gelu", "relu"):
        yield _product("fp16", _tiles("fp16", limits)[0], activation, True, False, limits)
    # Rows that do not begin on a multiple of 16 elements, of a length that no step divides.
    for dtype in ("fp16", "tf32"):
        with user_precision(dtype):
            for tile in _tiles(dtype, limits):
                if not tile.descriptors:
                    yield _product(dtype, tile, "gelu_tanh", True, False, limits, n=1201, k=311)
    yield _reduction("bf16", "gelu", False, False)
    yield _reduction("fp16", "silu", True, True)


def _tiles(dtype: str, limits: DeviceLimits) -> list[Tile]:
    """Each tile of the table once."""
    torch_dtype = _DTYPES[dtype]
    rows = heuristics.rows(torch_dtype, dot_precision(torch_dtype), limits)
    return list(dict.fromkeys(tile._replace(rate=1.0) for row in rows for tile in row.tiles))


def _product(
    dtype: str,
    tile: Tile,
    activation: str,
    with_residual: bool,
    gated: bool,
    limits: DeviceLimits,
    n: int = _N,
    k: int = _K,
    scaled: bool = False,
) -> tuple[str, Launch]:
    tokens = max(tile.m, 4096 if tile.m > 64 else tile.m)
    tile = fitted(tile, _DTYPES[dtype], with_residual, gated, k % 16 == 0, limits)
    x, weight = _meta(dtype, tokens, k), _meta(dtype, 2 * n if gated else n, k)
    bias, out = _meta(dtype, weight.shape[0]), _meta(dtype, tokens, n)
    residual = _meta(dtype, tokens, n) if with_residual else None
    scale = _meta(dtype, n) if scaled else None
    epilogue = f"{activation}{'-gated' if gated else ''}{'-scale' if scaled else ''}{'-residual' if with_residual else ''}"
    launch = plan(x, weight, bias, activation, residual, out, limits, gated, tile, scale)
    return f"{_name(dtype, tile)}-{n}x{k}-{epilogue}", launch


def _partial(dtype: str, tile: Tile, limits: DeviceLimits) -> tuple[str, Launch]:
    tile = fitted(tile, _DTYPES[dtype], False, False, True, limits)
    partial = torch.empty(3, tile.m, _K, dtype=torch.float32, device="meta")
    launch = plan_partial(_meta(dtype, tile.m, _N), _meta(dtype, _K, _N), partial, limits, tile)
    return f"{_name(dtype, tile)}-partial", launch


def _reduction(dtype: str, activation: str, with_residual: bool, gated: bool) -> tuple[str, Launch]:
    tokens, width = 16, 2 * _N if gated else _N
    partial = torch.empty(4, tokens, width, dtype=torch.float32, device="meta")
    residual = _meta(dtype, tokens, _N) if with_residual else None
    epilogue = f"{activation}{'-gated' if gated else ''}{'-residual' if with_residual else ''}"
    launch = plan_reduction(partial, _meta(dtype, width), activation, residual, _meta(dtype, tokens, _N), gated)
    return f"linear-{dtype}-reduction-{epilogue}", launch


def _name(dtype: str, tile: Tile) -> str:
    kernel = "-descriptors" if tile.descriptors else ""
    return f"linear-{dtype}-{tile.m}x{tile.n}x{tile.k}x{tile.num_stages}{kernel}"


def _meta(dtype: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
