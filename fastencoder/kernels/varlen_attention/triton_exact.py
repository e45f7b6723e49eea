"""Exact float32 attention in Triton, of any length.

Without matrix units ``tl.dot`` keeps both of its operands in registers, so this kernel feeds it in small steps: 16 keys
at a time, and the head dimension of the scores in chunks of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastencoder.kernels.varlen_attention.triton_parts import locate_heads, locate_sequence, store_rows


@triton.jit
def exact_kernel(
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
):
    first, length = locate_sequence(offsets_ptr, query_blocks)
    start = tl.program_id(0) % query_blocks * BLOCK_Q
    if start >= length:
        return
    q_ptr, k_ptr, v_ptr = locate_heads(
        q_ptr, k_ptr, v_ptr, first, q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride,
        v_head_stride, QUERIES_PER_KEY_HEAD,
    )  # fmt: skip
    CHUNK: tl.constexpr = 16
    rows = start + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_DIM)
    chunk = tl.arange(0, CHUNK)
    row_exists = (rows < length)[:, None]

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # of scores * scale_log2 so far
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    out = tl.full([BLOCK_Q, BLOCK_DIM], 0.0, tl.float32)
    for first_key in range(0, length, BLOCK_K):
        key_exists = first_key + keys < length
        scores = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
        for first_dim in range(0, BLOCK_DIM, CHUNK):
            dim = first_dim + chunk
            q_mask = row_exists & (dim < DIM)[None, :]
            q = tl.load(q_ptr + rows[:, None] * q_token_stride + dim[None, :], mask=q_mask, other=0.0)
            k_mask = key_exists[None, :] & (dim < DIM)[:, None]
            k = tl.load(k_ptr + keys[None, :] * k_token_stride + dim[:, None], mask=k_mask, other=0.0)
            scores = tl.dot(q, k, scores, input_precision="ieee")
        scores = tl.where(key_exists[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)  # zero for the first block, where highest is -inf
        total = total * rescale + tl.sum(weights, axis=1)
        v_mask = key_exists[:, None] & (dims < DIM)[None, :]
        v = tl.load(v_ptr + keys[:, None] * v_token_stride + dims[None, :], mask=v_mask, other=0.0)
        out = tl.dot(weights, v, out * rescale[:, None], input_precision="ieee")
        highest = new_highest
        k_ptr += BLOCK_K * k_token_stride
        v_ptr += BLOCK_K * v_token_stride
    row_mask = row_exists & (dims < DIM)[None, :]
    store_rows(out / total[:, None], out_ptr, first, rows, dims, row_mask, HEADS, DIM)
