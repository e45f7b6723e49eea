"""``linear`` and ``linear_partial`` in Triton: what is launched, with which tile."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastencoder.kernels._triton import DeviceLimits, Launch, cdiv, device_limits, dot_precision, rows_contiguous
from fastencoder.kernels.linear.heuristics import Choice, Tile, choose, chunk
from fastencoder.kernels.linear.triton_gemm import persistent_kernel, tile_kernel
from fastencoder.kernels.linear.triton_parts import reduction_kernel

_GROUP_M = 8
_REDUCTION_BLOCK = 1024


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    residual: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T, K]``, ``[N, K]`` (gated: ``[2 N, K]``), ``[N]`` (``[2 N]``), name, ``[T, N]``, ``[N]`` -> ``[T, N]``."""
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    residual = None if residual is None else rows_contiguous(residual)
    limits = device_limits(x.device)
    out = torch.empty(x.shape[0], _columns(weight, gated), dtype=x.dtype, device=x.device)
    choice = _choice(x, weight, activation, residual is not None or scale is not None, gated, out, limits)
    if choice.splits == 1:
        plan(x, weight, bias, activation, residual, out, limits, gated, choice.tile, scale).run(x.device)
        return out
    partial = linear_partial(x, weight, choice.splits, choice.tile)
    plan_reduction(partial, bias, activation, residual, out, gated, scale).run(x.device)
    return out


def linear_partial(x: torch.Tensor, weight: torch.Tensor, splits: int, tile: Tile | None = None) -> torch.Tensor:
    """``[T, K]``, ``[N, K]`` -> ``[splits, T, N]`` float32, of which the sum over the first dimension is the product."""
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    partial = torch.empty(splits, x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    plan_partial(x, weight, partial, device_limits(x.device), tile).run(x.device)
    return partial


def plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    limits: DeviceLimits,
    gated: bool = False,
    tile: Tile | None = None,
    scale: torch.Tensor | None = None,
) -> Launch:
    """The one launch that fills ``out`` on a device with these limits, with the tile that the heuristics choose."""
    if tile is None:
        tile = _choice(x, weight, activation, residual is not None or scale is not None, gated, out, limits).tile
    m, n = out.shape
    block_n = tile.n // 2 if gated else tile.n
    tiles = cdiv(m, tile.m) * cdiv(n, block_n)
    constants = {
        "N": n,
        "ACTIVATION": activation,
        "GATED": gated,
        "PRECISION": dot_precision(x.dtype),
        "BLOCK_M": tile.m,
        "BLOCK_N": block_n,
        "BLOCK_K": tile.k,
        "GROUP_M": _GROUP_M,
    }
    arguments = {
        "bias_ptr": bias,
        "residual_ptr": residual,
        "scale_ptr": scale,
        "M": m,
        "residual_stride": 0 if residual is None else residual.stride(0),
    }
    if not tile.descriptors:
        arguments |= _pointers(x, weight, out)
        constants |= {"SPLIT_K": False, "WHOLE_STEPS": x.shape[1] % tile.k == 0}
        return Launch(tile_kernel, (tiles,), arguments, constants, tile.num_warps, tile.num_stages)
    parts = 1 if gated else tile.parts
    arguments |= {
        "x": TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        "weight": TensorDescriptor.from_tensor(weight, [block_n, tile.k]),
        "out": TensorDescriptor.from_tensor(out, [tile.m, block_n // parts]),
    }
    constants |= {"K": x.shape[1], "PARTS": parts}
    grid = (min(tiles, limits.multiprocessors),)
    return Launch(persistent_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)


def plan_partial(
    x: torch.Tensor, weight: torch.Tensor, partial: torch.Tensor, limits: DeviceLimits, tile: Tile | None = None
) -> Launch:
    """The launch that fills ``partial`` ``[splits, T, N]``: every program sums over its part of K."""
    (splits, m, n), k = partial.shape, x.shape[1]
    precision = dot_precision(x.dtype)
    if tile is None:
        tile = choose(m, n, k, x.dtype, precision, limits, partial=True, aligned=_aligned(x, weight)).tile
    arguments = _pointers(x, weight, partial)
    arguments |= {
        "bias_ptr": None,
        "residual_ptr": None,
        "scale_ptr": None,
        "M": m,
        "residual_stride": 0,
        "chunk": chunk(k, splits, tile),
    }
    constants = {
        "N": n,
        "SPLIT_K": True,
        "WHOLE_STEPS": k % tile.k == 0,
        "ACTIVATION": "identity",
        "GATED": False,
        "PRECISION": precision,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": _GROUP_M,
    }
    grid = (cdiv(m, tile.m) * cdiv(n, tile.n), splits)
    return Launch(tile_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)


def plan_reduction(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    gated: bool = False,
    scale: torch.Tensor | None = None,
) -> Launch:
    """The launch that adds up ``partial`` ``[splits, T, N]`` (gated: ``2 N``) and finishes ``out`` ``[T, N]``."""
    m, n = out.shape
    return Launch(
        kernel=reduction_kernel,
        grid=(cdiv(m * n, _REDUCTION_BLOCK),),
        arguments={
            "partial_ptr": partial,
            "bias_ptr": bias,
            "residual_ptr": residual,
            "scale_ptr": scale,
            "out_ptr": out,
            "M": m,
            "residual_stride": 0 if residual is None else residual.stride(0),
        },
        constants={
            "SPLITS": partial.shape[0],
            "N": n,
            "ACTIVATION": activation,
            "GATED": gated,
            "BLOCK": _REDUCTION_BLOCK,
        },
        num_warps=4,
        num_stages=1,
    )


def _choice(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation: str,
    with_epilogue: bool,
    gated: bool,
    out: torch.Tensor,
    limits: DeviceLimits,
) -> Choice:
    return choose(
        x.shape[0],
        _columns(weight, gated),
        x.shape[1],
        x.dtype,
        dot_precision(x.dtype),
        limits,
        activation=activation,
        with_residual=with_epilogue,
        gated=gated,
        descriptors=all(map(_has_descriptor, (x, weight, out))),
        aligned=_aligned(x, weight),
    )


def _columns(weight: torch.Tensor, gated: bool) -> int:
    return weight.shape[0] // 2 if gated else weight.shape[0]


def _has_descriptor(x: torch.Tensor) -> bool:
    """Whether the hardware can address this matrix: not empty, its beginning and every row on a multiple of 16 bytes."""
    return x.numel() > 0 and x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _aligned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the compiler sees that rows begin on multiples of 16 bytes: it looks for multiples of 16 elements."""
    rows = all(matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0 for matrix in (x, weight))
    return rows and x.shape[1] % 16 == 0


def _pointers(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor | int]:
    return {
        "x_ptr": x,
        "weight_ptr": weight,
        "out_ptr": out,
        "K": x.shape[1],
        "x_stride": x.stride(0),
        "weight_stride": weight.stride(0),
        "chunk": 0,
    }
