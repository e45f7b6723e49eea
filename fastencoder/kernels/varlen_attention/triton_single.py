"""Attention where all keys of a sequence fit one block: the softmax is taken at once.

Such short sequences are bound by memory, so a program takes several heads of its tile in turn, and the loads of the next
head are under way while the present one is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastencoder.kernels.varlen_attention.triton_parts import (
    LOG2_E,
    UNALIGNED,
    UNSPECIALISED,
    adjust_scores,
    hide_scores,
    load_rotated,
    load_tile,
    locate_tile,
    normalised,
    softmax_step,
    store_tile,
)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def single_block_kernel(
    q_ptr,  # [T, HEADS, DIM]
    k_ptr,  # [T, HEADS // QUERIES_PER_KEY_HEAD, DIM]
    v_ptr,  # [T, HEADS // QUERIES_PER_KEY_HEAD, DIM]
    offsets_ptr,  # [sequences + 1], int32
    tiles_ptr,  # [tiles, 2], int32, or None: query_blocks tiles of every sequence
    out_ptr,  # [T, HEADS, DIM], contiguous
    cos_ptr,  # [T, HALF] or None
    sin_ptr,  # [T, HALF] or None
    relative_ptr,  # [HEADS, 2 * reach + 1] or None
    bias_ptr,  # [sequences, HEADS, S, S], the last dimension contiguous, or None
    c2p_ptr,  # [T, HEADS, P], the last dimension contiguous, or None
    p2c_ptr,  # [T, HEADS, P], the last dimension contiguous, or None
    columns_ptr,  # [2 * columns_reach + 1], int32, or None
    rel_h_ptr,  # [T, HEADS, rows of the grid], the last dimension contiguous, or None
    rel_w_ptr,  # [T, HEADS, grid_width], the last dimension contiguous, or None
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    bias_sequence_stride,
    bias_head_stride,
    bias_query_stride,
    c2p_token_stride,
    c2p_head_stride,
    p2c_token_stride,
    p2c_head_stride,
    rel_h_token_stride,
    rel_h_head_stride,
    rel_w_token_stride,
    rel_w_head_stride,
    query_blocks,
    heads_per_program,
    scale,
    left,  # None without a window
    right,
    softcap,  # None without
    reach,
    columns_reach,
    grid_width,
    HEADS: tl.constexpr,
    QUERIES_PER_KEY_HEAD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of dimensions that are rotated
    INTERLEAVED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least the length of every sequence
    PRECISION: tl.constexpr,
):
    TOKEN_TERMS: tl.constexpr = columns_ptr is not None or rel_h_ptr is not None
    BIASED: tl.constexpr = relative_ptr is not None or bias_ptr is not None or TOKEN_TERMS
    ADJUSTED: tl.constexpr = softcap is not None or BIASED
    groups = tl.cdiv(HEADS, heads_per_program)
    program = tl.program_id(0)
    sequence, first, length, start = locate_tile(program // groups, offsets_ptr, tiles_ptr, query_blocks, BLOCK_Q)
    if start >= length:
        return
    q_ptr += first * q_token_stride
    k_ptr += first * k_token_stride
    v_ptr += first * v_token_stride
    rope = (cos_ptr, sin_ptr)
    if cos_ptr is not None:
        rope = (cos_ptr + first * HALF, sin_ptr + first * HALF)
    if bias_ptr is not None:
        bias_ptr += tl.cast(sequence, tl.int64) * bias_sequence_stride
    if c2p_ptr is not None:
        c2p_ptr += first * c2p_token_stride
    if p2c_ptr is not None:
        p2c_ptr += first * p2c_token_stride
    if rel_h_ptr is not None:
        rel_h_ptr += first * rel_h_token_stride
        rel_w_ptr += first * rel_w_token_stride
    rows = start + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)

    first_head = program % groups * heads_per_program
    for head in tl.range(first_head, tl.minimum(first_head + heads_per_program, HEADS)):
        key_head = head // QUERIES_PER_KEY_HEAD
        q_head, k_head = q_ptr + head * q_head_stride, k_ptr + key_head * k_head_stride
        v_head = v_ptr + key_head * v_head_stride
        q = load_rotated(
            q_head, q_token_stride, start, 0, length, rope, BLOCK_Q, BLOCK_DIM, DIM, BLOCK_DIM, HALF, INTERLEAVED, True
        )
        k = load_rotated(
            k_head, k_token_stride, 0, 0, length, rope, BLOCK_K, BLOCK_DIM, DIM, BLOCK_DIM, HALF, INTERLEAVED, True
        )
        v = load_tile(v_head, v_token_stride, 0, tl.arange(0, BLOCK_DIM), length, BLOCK_K, DIM, True)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        if ADJUSTED:
            relative, bias = (relative_ptr, reach), (bias_ptr, bias_query_stride)
            c2p, p2c = (c2p_ptr, c2p_token_stride), (p2c_ptr, p2c_token_stride)
            if relative_ptr is not None:
                relative = (relative_ptr + head * (2 * reach + 1), reach)
            if bias_ptr is not None:
                bias = (bias_ptr + tl.cast(head, tl.int64) * bias_head_stride, bias_query_stride)
            if c2p_ptr is not None:
                c2p = (c2p_ptr + tl.cast(head, tl.int64) * c2p_head_stride, c2p_token_stride)
            if p2c_ptr is not None:
                p2c = (p2c_ptr + tl.cast(head, tl.int64) * p2c_head_stride, p2c_token_stride)
            disentangled = (c2p, p2c, columns_ptr, columns_reach)
            rel_h, rel_w = (rel_h_ptr, rel_h_token_stride), (rel_w_ptr, rel_w_token_stride)
            if rel_h_ptr is not None:
                rel_h = (rel_h_ptr + tl.cast(head, tl.int64) * rel_h_head_stride, rel_h_token_stride)
                rel_w = (rel_w_ptr + tl.cast(head, tl.int64) * rel_w_head_stride, rel_w_token_stride)
            decomposed = (rel_h, rel_w, grid_width)
            scores = adjust_scores(scores, start, 0, length, scale, softcap, relative, bias, disentangled, decomposed)
            factor = LOG2_E
        else:
            factor = scale * LOG2_E
        scores = hide_scores(scores, rows, keys, length, left, right)
        nothing_yet = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        weights, _, _ = softmax_step(scores, nothing_yet, factor, ADJUSTED, ADJUSTED)
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        out = normalised(out, tl.sum(weights, axis=1), ADJUSTED)
        store_tile(out, out_ptr, first, head, start, length, HEADS, DIM)
