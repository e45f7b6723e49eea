"""What the attention kernels share: where a program's sequence and heads begin, and how it stores its rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_sequence(offsets_ptr, query_blocks):
    """First token (64 bit, because it is multiplied by strides) and length of this program's sequence."""
    sequence = tl.program_id(0) // query_blocks
    first = tl.load(offsets_ptr + sequence)
    return first.to(tl.int64), tl.load(offsets_ptr + sequence + 1) - first


@triton.jit
def locate_heads(
    q_ptr, k_ptr, v_ptr, first, q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride,
    v_head_stride, QUERIES_PER_KEY_HEAD: tl.constexpr,
):  # fmt: skip
    """Pointers to this program's heads at the first token of its sequence."""
    head = tl.program_id(1)
    key_head = head // QUERIES_PER_KEY_HEAD
    q_ptr += first * q_token_stride + head * q_head_stride
    k_ptr += first * k_token_stride + key_head * k_head_stride
    v_ptr += first * v_token_stride + key_head * v_head_stride
    return q_ptr, k_ptr, v_ptr


@triton.jit
def store_rows(out, out_ptr, first, rows, dims, mask, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Round and store one program's rows of the output [T, HEADS, DIM]."""
    out_ptr += first * (HEADS * DIM) + tl.program_id(1) * DIM
    tl.store(out_ptr + rows[:, None] * (HEADS * DIM) + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
