"""``varlen_attention`` in Triton: one kernel for short sequences, one with an online softmax for any length.

A program computes a block of queries of one head of one sequence. Up to 128 tokens all keys fit one block, so the
softmax is taken at once; above, key blocks are visited in turn and the output is rescaled as the maximum grows (Milakov
and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691). Both work in base 2, which is what the hardware computes.
Exact float32, which has no matrix unit, takes the looped kernel of ``triton_exact`` at every length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastencoder.kernels._triton import (
    DeviceLimits,
    Launch,
    cdiv,
    device_limits,
    dot_precision,
    next_power_of_2,
    rows_contiguous,
)
from fastencoder.kernels.varlen_attention.triton_exact import exact_kernel
from fastencoder.kernels.varlen_attention.triton_parts import locate_heads, locate_sequence, store_rows

_SINGLE_BLOCK_LIMIT = 128  # tokens


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, ``[B + 1]`` -> ``[T, H, d]``."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plan(q, k, v, offsets.contiguous(), max_seqlen, scale, out, device_limits(q.device)).run(q.device)
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
) -> Launch:
    """The launch that fills ``out`` on a device with these limits."""
    heads, dim = q.shape[1:]
    block = choose_block(max_seqlen, dim, q.dtype, limits)
    query_blocks = cdiv(max_seqlen, block.queries)
    arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "offsets_ptr": offsets, "out_ptr": out}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments[f"{name}_token_stride"], arguments[f"{name}_head_stride"] = tensor.stride(0), tensor.stride(1)
    constants = {
        "HEADS": heads,
        "QUERIES_PER_KEY_HEAD": heads // k.shape[1],
        "DIM": dim,
        "BLOCK_DIM": max(16, next_power_of_2(dim)),
        "BLOCK_Q": block.queries,
        "BLOCK_K": block.keys,
    }
    if _is_exact(q.dtype):
        kernel = exact_kernel
    else:
        kernel = _single_block_kernel if max_seqlen <= block.keys else _looped_kernel
        constants["PRECISION"] = dot_precision(q.dtype)
    return Launch(
        kernel=kernel,
        grid=(query_blocks * (offsets.shape[0] - 1), heads),
        arguments=arguments | {"query_blocks": query_blocks, "scale_log2": scale * math.log2(math.e)},
        constants=constants,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
    )


class Block(NamedTuple):
    """Queries of one program and keys of one step, in tokens, and how they are computed."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def choose_block(max_seqlen: int, dim: int, dtype: torch.dtype, limits: DeviceLimits) -> Block:
    """Blocks that leave queries, scores and output of a program in registers."""
    if _is_exact(dtype):
        return Block(queries=16, keys=16, num_warps=4 if dim <= 64 else 8, num_stages=1)
    wide = dim > (128 if dtype.itemsize == 2 else 32)
    if max_seqlen <= _SINGLE_BLOCK_LIMIT and not wide:
        keys = max(16, next_power_of_2(max_seqlen))
        queries = min(keys, 64)
        return Block(queries, keys, num_warps=queries // 16, num_stages=1)
    before_hopper = limits.capability < (9, 0)  # there the operands of matrix instructions live in registers
    if wide:
        return Block(queries=32 if before_hopper else 64, keys=32, num_warps=8, num_stages=2)
    queries = 64 if max_seqlen <= 256 else 128
    keys = 32 if before_hopper and dim > 64 else 64
    return Block(queries, keys, num_warps=queries // 16, num_stages=3 if dim <= 64 else 2)


def _is_exact(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and dot_precision(dtype) == "ieee"


@triton.jit
def _single_block_kernel(
    q_ptr,  # [T, HEADS, DIM]
    k_ptr,  # [T, HEADS // QUERIES_PER_KEY_HEAD, DIM]
    v_ptr,  # [T, HEADS // QUERIES_PER_KEY_HEAD, DIM]
    offsets_ptr,  # [sequences + 1], int32
    out_ptr,  # [T, HEADS, DIM], contiguous
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    query_blocks,
    scale_log2,
    HEADS: tl.constexpr,
    QUERIES_PER_KEY_HEAD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least the length of every sequence
    PRECISION: tl.constexpr,
):
    first, length = locate_sequence(offsets_ptr, query_blocks)
    start = tl.program_id(0) % query_blocks * BLOCK_Q
    if start >= length:
        return
    q_ptr, k_ptr, v_ptr = locate_heads(
        q_ptr, k_ptr, v_ptr, first, q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride,
        v_head_stride, QUERIES_PER_KEY_HEAD,
    )  # fmt: skip
    rows = start + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_DIM)
    row_mask = (rows < length)[:, None] & (dims < DIM)[None, :]
    key_mask = (keys < length)[:, None] & (dims < DIM)[None, :]

    q = tl.load(q_ptr + rows[:, None] * q_token_stride + dims[None, :], mask=row_mask, other=0.0)
    k = tl.load(k_ptr + keys[:, None] * k_token_stride + dims[None, :], mask=key_mask, other=0.0)
    v = tl.load(v_ptr + keys[:, None] * v_token_stride + dims[None, :], mask=key_mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    scores = tl.where((keys < length)[None, :], scores, float("-inf"))
    highest = tl.max(scores, axis=1) * scale_log2  # [BLOCK_Q]
    weights = tl.exp2(scores * scale_log2 - highest[:, None])
    out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) / tl.sum(weights, axis=1)[:, None]
    store_rows(out, out_ptr, first, rows, dims, row_mask, HEADS, DIM)


@triton.jit
def _looped_kernel(
    q_ptr,  # [T, HEADS, DIM]
    k_ptr,  # [T, HEADS // QUERIES_PER_KEY_HEAD, DIM]
    v_ptr,  # [T, HEADS // QUERIES_PER_KEY_HEAD, DIM]
    offsets_ptr,  # [sequences + 1], int32
    out_ptr,  # [T, HEADS, DIM], contiguous
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    query_blocks,
    scale_log2,
    HEADS: tl.constexpr,
    QUERIES_PER_KEY_HEAD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, length = locate_sequence(offsets_ptr, query_blocks)
    start = tl.program_id(0) % query_blocks * BLOCK_Q
    if start >= length:
        return
    q_ptr, k_ptr, v_ptr = locate_heads(
        q_ptr, k_ptr, v_ptr, first, q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride,
        v_head_stride, QUERIES_PER_KEY_HEAD,
    )  # fmt: skip
    rows = start + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_DIM)
    row_mask = (rows < length)[:, None] & (dims < DIM)[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_token_stride + dims[None, :], mask=row_mask, other=0.0)
    # One tile of keys and of values; the loop moves the base, so that the offsets inside a tile stay 32 bit.
    k_tile = keys[:, None] * k_token_stride + dims[None, :]
    v_tile = keys[:, None] * v_token_stride + dims[None, :]

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # of scores * scale_log2 so far
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    out = tl.full([BLOCK_Q, BLOCK_DIM], 0.0, tl.float32)
    whole = length // BLOCK_K * BLOCK_K
    for _ in range(0, whole, BLOCK_K):
        out, total, highest = _attend(
            q, k_ptr + k_tile, v_ptr + v_tile, out, total, highest, BLOCK_K, scale_log2, DIM, PRECISION, False
        )
        k_ptr += BLOCK_K * k_token_stride
        v_ptr += BLOCK_K * v_token_stride
    if whole < length:
        out, total, highest = _attend(
            q, k_ptr + k_tile, v_ptr + v_tile, out, total, highest, length - whole, scale_log2, DIM, PRECISION, True
        )
    store_rows(out / total[:, None], out_ptr, first, rows, dims, row_mask, HEADS, DIM)


@triton.jit
def _attend(
    q,  # [BLOCK_Q, BLOCK_DIM]
    k_tile,  # pointers [BLOCK_K, BLOCK_DIM]
    v_tile,  # pointers [BLOCK_K, BLOCK_DIM]
    out,  # [BLOCK_Q, BLOCK_DIM], not yet divided by total
    total,  # [BLOCK_Q]
    highest,  # [BLOCK_Q]
    valid,  # keys of this block that belong to the sequence
    scale_log2,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether valid < BLOCK_K
):
    """One block of keys joins the running softmax."""
    BLOCK_K: tl.constexpr = k_tile.shape[0]
    BLOCK_DIM: tl.constexpr = k_tile.shape[1]
    keys = tl.arange(0, BLOCK_K)
    mask = (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    if PARTIAL:
        mask = mask & (keys < valid)[:, None]
    if PARTIAL or BLOCK_DIM != DIM:
        k = tl.load(k_tile, mask=mask, other=0.0)
    else:
        k = tl.load(k_tile)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    if PARTIAL:
        scores = tl.where((keys < valid)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)  # zero for the first block, where highest is -inf
    total = total * rescale + tl.sum(weights, axis=1)
    if PARTIAL or BLOCK_DIM != DIM:
        v = tl.load(v_tile, mask=mask, other=0.0)
    else:
        v = tl.load(v_tile)
    out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
    return out, total, new_highest
