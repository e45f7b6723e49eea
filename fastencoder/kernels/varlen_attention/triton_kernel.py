"""``varlen_attention`` in Triton: one kernel for short sequences, one with an online softmax for any length.

A program computes a block of queries of one sequence, and one head of it or several in turn. Both kernels take the softmax
in base 2, which is what the hardware computes. Tiles are read with plain pointers, not with tensor descriptors: those
would read on into the next sequence, and zero times its NaN is NaN.
"""

from __future__ import annotations

from typing import Any

import torch

from fastencoder.kernels._triton import (
    DeviceLimits,
    Launch,
    cdiv,
    device_limits,
    dot_precision,
    next_power_of_2,
    rows_contiguous,
)
from fastencoder.kernels.varlen_attention.features import PLAIN, UNLIMITED, Features
from fastencoder.kernels.varlen_attention.heuristics import choose_block, choose_heads
from fastencoder.kernels.varlen_attention.triton_looped import looped_kernel
from fastencoder.kernels.varlen_attention.triton_single import single_block_kernel

_FAR = 2**30  # tokens: an unlimited side of a window, as a number that can still be added to a position


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    features: Features = PLAIN,
    tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, ``[B + 1]`` -> ``[T, H, d]``."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    limits = device_limits(q.device)
    plan(q, k, v, offsets.contiguous(), max_seqlen, scale, out, limits, features, tiles).run(q.device)
    return out


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    out: torch.Tensor,
    limits: DeviceLimits,
    features: Features = PLAIN,
    tiles: torch.Tensor | None = None,
) -> Launch:
    """The launch that fills ``out`` on a device with these limits."""
    heads, dim = q.shape[1:]
    block = choose_block(max_seqlen, dim, q.dtype, limits, features)
    query_blocks = cdiv(max_seqlen, block.queries)
    count = query_blocks * (offsets.shape[0] - 1) if tiles is None else tiles.shape[0]
    arguments: dict[str, Any] = {"out_ptr": out, "offsets_ptr": offsets}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments |= _by_token_and_head(name, tensor)
    arguments |= {"tiles_ptr": tiles, "query_blocks": query_blocks if tiles is None else None, "scale": float(scale)}
    heads_per_program = 1
    if block.single:
        heads_per_program = choose_heads(count, heads, limits)
        arguments["heads_per_program"] = heads_per_program
    return Launch(
        kernel=single_block_kernel if block.single else looped_kernel,
        grid=(count * cdiv(heads, heads_per_program),),
        arguments=arguments | _feature_arguments(features),
        constants={
            "HEADS": heads,
            "QUERIES_PER_KEY_HEAD": heads // k.shape[1],
            "DIM": dim,
            "BLOCK_DIM": max(16, next_power_of_2(dim)),
            "HALF": 0 if features.cos is None else features.cos.shape[1],
            "INTERLEAVED": features.interleaved,
            "BLOCK_Q": block.queries,
            "BLOCK_K": block.keys,
            "PRECISION": dot_precision(q.dtype),
        },
        num_warps=block.num_warps,
        num_stages=block.num_stages,
    )


def _feature_arguments(features: Features) -> dict[str, Any]:
    """Arguments of what is asked for, and None for the rest."""
    names = ("cos_ptr", "sin_ptr", "relative_ptr", "reach", "left", "right", "softcap", "bias_ptr")
    names += ("bias_sequence_stride", "bias_head_stride", "bias_query_stride")
    names += ("c2p_ptr", "c2p_token_stride", "c2p_head_stride", "p2c_ptr", "p2c_token_stride", "p2c_head_stride")
    names += ("columns_ptr", "columns_reach", "rel_h_ptr", "rel_h_token_stride", "rel_h_head_stride")
    names += ("rel_w_ptr", "rel_w_token_stride", "rel_w_head_stride", "grid_width")
    arguments = dict.fromkeys(names)
    if features.left != UNLIMITED or features.right != UNLIMITED:
        for side in ("left", "right"):
            reach = getattr(features, side)
            arguments[side] = _FAR if reach == UNLIMITED else min(reach, _FAR)
    if features.cos is not None:
        arguments |= {"cos_ptr": features.cos.contiguous(), "sin_ptr": features.sin.contiguous()}
    if features.softcap is not None:
        arguments["softcap"] = float(features.softcap)
    if features.relative_bias is not None:
        relative = features.relative_bias.contiguous()
        arguments |= {"relative_ptr": relative, "reach": relative.shape[1] // 2}
    if features.bias is not None:
        bias = rows_contiguous(features.bias)
        sequence, head, query = (
            0 if size == 1 else stride for size, stride in zip(bias.shape[:3], bias.stride(), strict=False)
        )
        arguments |= {
            "bias_ptr": bias,
            "bias_sequence_stride": sequence,
            "bias_head_stride": head,
            "bias_query_stride": query,
        }
    if features.columns is not None:
        columns = features.columns.contiguous()
        arguments |= {"columns_ptr": columns, "columns_reach": columns.shape[0] // 2}
        for name, products in (("c2p", features.c2p), ("p2c", features.p2c)):
            if products is not None:
                arguments |= _by_token_and_head(name, rows_contiguous(products))
    if features.rel_h is not None:
        arguments |= _by_token_and_head("rel_h", rows_contiguous(features.rel_h))
        arguments |= _by_token_and_head("rel_w", rows_contiguous(features.rel_w))
        arguments["grid_width"] = features.rel_w.shape[2]
    return arguments


def _by_token_and_head(name: str, x: torch.Tensor) -> dict[str, Any]:
    return {f"{name}_ptr": x, f"{name}_token_stride": x.stride(0), f"{name}_head_stride": x.stride(1)}
