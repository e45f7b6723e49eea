"""Attention of any length: blocks of keys join a running softmax.

The output is rescaled as the maximum grows (Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691). Blocks of keys
that no query of the tile sees are skipped, and only blocks at an edge of the visible range are masked.

Exact float32 has no matrix unit, and there ``tl.dot`` keeps both of its operands in registers: queries and keys are fed to
it a few dimensions at a time.
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
def looped_kernel(
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
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXACT: tl.constexpr = PRECISION == "ieee" and q_ptr.dtype.element_ty == tl.float32
    WINDOW: tl.constexpr = left is not None
    program = tl.program_id(0)
    sequence, first, length, start = locate_tile(program // HEADS, offsets_ptr, tiles_ptr, query_blocks, BLOCK_Q)
    if start >= length:
        return
    head = program % HEADS
    key_head = head // QUERIES_PER_KEY_HEAD
    q_ptr += first * q_token_stride + head * q_head_stride
    k_ptr += first * k_token_stride + key_head * k_head_stride
    v_ptr += first * v_token_stride + key_head * v_head_stride
    rope = (cos_ptr, sin_ptr)
    if cos_ptr is not None:
        rope = (cos_ptr + first * HALF, sin_ptr + first * HALF)
    relative = (relative_ptr, reach)
    if relative_ptr is not None:
        relative = (relative_ptr + head * (2 * reach + 1), reach)
    bias = (bias_ptr, bias_query_stride)
    if bias_ptr is not None:
        head_bias = (
            bias_ptr + tl.cast(sequence, tl.int64) * bias_sequence_stride + tl.cast(head, tl.int64) * bias_head_stride
        )
        bias = (head_bias, bias_query_stride)
    c2p, p2c = (c2p_ptr, c2p_token_stride), (p2c_ptr, p2c_token_stride)
    if c2p_ptr is not None:
        c2p = (c2p_ptr + first * c2p_token_stride + tl.cast(head, tl.int64) * c2p_head_stride, c2p_token_stride)
    if p2c_ptr is not None:
        p2c = (p2c_ptr + first * p2c_token_stride + tl.cast(head, tl.int64) * p2c_head_stride, p2c_token_stride)
    disentangled = (c2p, p2c, columns_ptr, columns_reach)
    rel_h, rel_w = (rel_h_ptr, rel_h_token_stride), (rel_w_ptr, rel_w_token_stride)
    if rel_h_ptr is not None:
        head_rel_h = rel_h_ptr + first * rel_h_token_stride + tl.cast(head, tl.int64) * rel_h_head_stride
        head_rel_w = rel_w_ptr + first * rel_w_token_stride + tl.cast(head, tl.int64) * rel_w_head_stride
        rel_h, rel_w = (head_rel_h, rel_h_token_stride), (head_rel_w, rel_w_token_stride)
    decomposed = (rel_h, rel_w, grid_width)

    if EXACT:
        q = q_ptr
    else:
        q = load_rotated(
            q_ptr, q_token_stride, start, 0, length, rope, BLOCK_Q, BLOCK_DIM, DIM, BLOCK_DIM, HALF, INTERLEAVED, True
        )
    query = (q, q_token_stride, start)
    pair = (k_ptr, k_token_stride, v_ptr, v_token_stride)
    score = (scale, softcap, relative, bias, disentangled, decomposed)
    out = tl.full([BLOCK_Q, BLOCK_DIM], 0.0, tl.float32)  # not yet divided by total
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    if WINDOW:
        low, inner, outer, high = visible_range(start, length, left, right, BLOCK_Q, BLOCK_K)
    else:
        low, inner, outer, high = 0, 0, length // BLOCK_K * BLOCK_K, length
    visible = (length, high, left, right)
    if WINDOW:
        for key in range(low, inner, BLOCK_K):
            out, total, highest = _attend(
                out, total, highest, key, query, pair, visible, score, rope, DIM, HALF, INTERLEAVED, BLOCK_K,
                PRECISION, EXACT, True,
            )  # fmt: skip
    for key in range(inner, outer, BLOCK_K):
        out, total, highest = _attend(
            out, total, highest, key, query, pair, visible, score, rope, DIM, HALF, INTERLEAVED, BLOCK_K,
            PRECISION, EXACT, False,
        )  # fmt: skip
    for key in range(outer, high, BLOCK_K):
        out, total, highest = _attend(
            out, total, highest, key, query, pair, visible, score, rope, DIM, HALF, INTERLEAVED, BLOCK_K,
            PRECISION, EXACT, True,
        )  # fmt: skip
    TOKEN_TERMS: tl.constexpr = columns_ptr is not None or rel_h_ptr is not None
    SPARSE: tl.constexpr = relative_ptr is not None or bias_ptr is not None or TOKEN_TERMS
    store_tile(normalised(out, total, SPARSE), out_ptr, first, head, start, length, HEADS, DIM)


@triton.jit
def visible_range(start, length, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keys of one tile: blocks from `low` are masked, from `inner` whole, from `outer` to `high` masked again."""
    last = tl.minimum(start + BLOCK_Q, length) - 1
    low = tl.maximum(start - left, 0)
    high = tl.minimum(last + right + 1, length)
    # Every query of the tile sees the keys from last - left to start + right.
    inner = low + tl.cdiv(tl.maximum(last - left - low, 0), BLOCK_K) * BLOCK_K
    outer = inner + tl.maximum(tl.minimum(start + right + 1, length) - inner, 0) // BLOCK_K * BLOCK_K
    return low, tl.minimum(inner, high), tl.minimum(outer, high), high


@triton.jit
def _attend(
    out,  # [BLOCK_Q, BLOCK_DIM], not yet divided by total
    total,  # [BLOCK_Q]
    highest,  # [BLOCK_Q]
    first_key,
    query,  # (the tile [BLOCK_Q, BLOCK_DIM], or a pointer to its sequence if EXACT; token stride; first query)
    pair,  # (k pointer, its token stride, v pointer, its token stride)
    visible,  # (length of the sequence, end of the keys that the tile sees, left, right)
    score,  # (scale, softcap, relative, bias, disentangled, decomposed), see adjust_scores
    rope,  # (cos, sin)
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,  # whether some query does not see some key of this block
):
    """One block of keys joins the running softmax."""
    BLOCK_Q: tl.constexpr = out.shape[0]
    BLOCK_DIM: tl.constexpr = out.shape[1]
    q, q_token_stride, start = query
    k_ptr, k_token_stride, v_ptr, v_token_stride = pair
    length, end, left, right = visible
    scale, softcap, relative, bias, disentangled, decomposed = score
    TOKEN_TERMS: tl.constexpr = disentangled[2] is not None or decomposed[2] is not None
    BIASED: tl.constexpr = relative[0] is not None or bias[0] is not None or TOKEN_TERMS
    ADJUSTED: tl.constexpr = softcap is not None or BIASED
    rows = start + tl.arange(0, BLOCK_Q)
    keys = first_key + tl.arange(0, BLOCK_K)
    if EXACT:
        scores = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
        for first_dim in range(0, BLOCK_DIM, 16):
            q_part = load_rotated(
                q, q_token_stride, start, first_dim, length, rope, BLOCK_Q, 16, DIM, BLOCK_DIM, HALF, INTERLEAVED, True
            )
            k_part = load_rotated(
                k_ptr, k_token_stride, first_key, first_dim, end, rope, BLOCK_K, 16, DIM, BLOCK_DIM, HALF,
                INTERLEAVED, True,
            )  # fmt: skip
            scores = tl.dot(q_part, tl.trans(k_part), scores, input_precision="ieee")
    else:
        k = load_rotated(
            k_ptr, k_token_stride, first_key, 0, end, rope, BLOCK_K, BLOCK_DIM, DIM, BLOCK_DIM, HALF, INTERLEAVED,
            EDGE,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    if ADJUSTED:
        scores = adjust_scores(
            scores, start, first_key, length, scale, softcap, relative, bias, disentangled, decomposed
        )
        factor = LOG2_E
    else:
        factor = scale * LOG2_E
    if EDGE:
        scores = hide_scores(scores, rows, keys, end, left, right)
    SPARSE: tl.constexpr = ADJUSTED or left is not None
    weights, highest, rescale = softmax_step(scores, highest, factor, SPARSE, ADJUSTED)
    total = total * rescale + tl.sum(weights, axis=1)
    v = load_tile(v_ptr, v_token_stride, first_key, tl.arange(0, BLOCK_DIM), end, BLOCK_K, DIM, EDGE)
    out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
    return out, total, highest
