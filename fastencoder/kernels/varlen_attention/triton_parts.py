"""What the attention kernels share: which tile a program computes, loads with rotary embedding, and scores and softmax.

A feature that is not asked for comes as None, which the compiler knows: plain attention is compiled without a trace of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that vary from batch to batch: nothing about their values is compiled in, and neither is the alignment of lists.
UNSPECIALISED = [
    "query_blocks", "heads_per_program", "left", "right", "reach", "bias_sequence_stride", "bias_head_stride",
    "bias_query_stride", "c2p_token_stride", "c2p_head_stride", "p2c_token_stride", "p2c_head_stride", "columns_reach",
    "rel_h_token_stride", "rel_h_head_stride", "rel_w_token_stride", "rel_w_head_stride", "grid_width",
]  # fmt: skip
UNALIGNED = ["offsets_ptr", "tiles_ptr"]
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate_tile(tile, offsets_ptr, tiles_ptr, query_blocks, BLOCK_Q: tl.constexpr):
    """Sequence, its first token (64 bit, because it is multiplied by strides), its length, and the tile's first query."""
    if tiles_ptr is None:
        sequence = tile // query_blocks
        block = tile % query_blocks
    else:
        sequence = tl.load(tiles_ptr + 2 * tile)
        block = tl.load(tiles_ptr + 2 * tile + 1)
    first = tl.load(offsets_ptr + sequence)
    return sequence, first.to(tl.int64), tl.load(offsets_ptr + sequence + 1) - first, block * BLOCK_Q


@triton.jit
def load_tile(
    ptr,  # one head at the first token of the sequence
    token_stride,
    start,  # first token of the tile, inside the sequence
    dims,  # [COLUMNS], dimensions of the head
    length,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    EDGE: tl.constexpr,  # whether tokens may lie behind the end of the sequence
):
    """Queries, keys or values [BLOCK, COLUMNS] in their own dtype, zero where there are none."""
    WHOLE_DIMS: tl.constexpr = DIM & (DIM - 1) == 0  # tiles are padded to powers of two
    offset = tl.arange(0, BLOCK)
    # The first token's offset in 64 bit, so that those inside a tile stay 32 bit.
    ptrs = ptr + tl.cast(start, tl.int64) * token_stride + (offset[:, None] * token_stride + dims[None, :])
    if EDGE:
        x = tl.load(ptrs, mask=(start + offset < length)[:, None] & (dims < DIM)[None, :], other=0.0)
    elif WHOLE_DIMS:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(dims < DIM)[None, :], other=0.0)
    return x


@triton.jit
def load_rotated(
    ptr,
    token_stride,
    start,
    first_column,
    length,
    rope,  # (cos [length, HALF], sin [length, HALF]) from the first token of the sequence, or (None, None)
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of dimensions that are rotated
    INTERLEAVED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Queries or keys [BLOCK, COLUMNS] as in load_tile, with rotary embedding if there are tables.

    Rotated columns come as pairs of dimensions, which may be in another order: the same one for queries and keys.
    """
    dims = first_column + tl.arange(0, COLUMNS)
    if rope[0] is None:
        x = load_tile(ptr, token_stride, start, dims, length, BLOCK, DIM, EDGE)
    else:
        pairs = first_column // 2 + tl.arange(0, COLUMNS // 2)
        if INTERLEAVED:
            x = load_tile(ptr, token_stride, start, dims, length, BLOCK, DIM, EDGE)
            first, second = tl.split(tl.reshape(x, [BLOCK, COLUMNS // 2, 2]))
        else:  # behind the pairs follow the dimensions that are not rotated
            dims = tl.where(pairs < HALF, pairs, pairs + HALF)
            first = load_tile(ptr, token_stride, start, dims, length, BLOCK, DIM, EDGE)
            dims = tl.where(pairs < HALF, pairs + HALF, pairs + BLOCK_DIM // 2)
            second = load_tile(ptr, token_stride, start, dims, length, BLOCK, DIM, EDGE)
        tokens = start + tl.arange(0, BLOCK)
        x = tl.reshape(_rotate(first, second, tokens, pairs, length, rope, HALF), [BLOCK, COLUMNS])
    return x


@triton.jit
def _rotate(first, second, tokens, pairs, length, rope, HALF: tl.constexpr):
    """Both dimensions of every pair, [BLOCK, COLUMNS / 2] each, turned in float32 -> [BLOCK, COLUMNS / 2, 2]."""
    mask = (tokens < length)[:, None] & (pairs < HALF)[None, :]
    table = tokens.to(tl.int64)[:, None] * HALF + pairs[None, :]
    cos = tl.load(rope[0] + table, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(rope[1] + table, mask=mask, other=0.0).to(tl.float32)
    x, y = first.to(tl.float32), second.to(tl.float32)
    return tl.join((x * cos - y * sin).to(first.dtype), (y * cos + x * sin).to(first.dtype))


@triton.jit
def adjust_scores(scores, start, first_key, length, scale, softcap, relative, bias, disentangled, decomposed):
    """Products of the queries from `start` and the keys from `first_key` -> scores in natural units, with cap and biases.

    `relative` is (one head's biases [2 * reach + 1] or None, reach), `bias` (one head's biases [length, length] or None, their
    query stride), `disentangled` ((one head's c2p [length, P] or None, its token stride), the same of p2c, columns
    [2 * reach + 1] or None, reach), `decomposed` ((one head's rel_h [length, Kh] or None, its token stride), the same of
    rel_w, Kw).
    """
    queries, others = tl.arange(0, scores.shape[0]), tl.arange(0, scores.shape[1])
    rows, keys = start + queries, first_key + others
    scores = scores * scale
    if softcap is not None:
        scores = softcap * _tanh(scores / softcap)
    if relative[0] is not None:
        reach = relative[1]
        distance = tl.minimum(tl.maximum(keys[None, :] - rows[:, None], -reach), reach)
        scores += tl.load(relative[0] + reach + distance).to(tl.float32)
    if bias[0] is not None:
        mask = (rows < length)[:, None] & (keys < length)[None, :]
        row_ptrs = bias[0] + rows.to(tl.int64) * bias[1]
        scores += tl.load(row_ptrs[:, None] + keys[None, :], mask=mask, other=0.0).to(tl.float32)
    c2p, p2c, columns_ptr, columns_reach = disentangled
    if columns_ptr is not None:
        mask = (rows < length)[:, None] & (keys < length)[None, :]
        distance = tl.minimum(tl.maximum(rows[:, None] - keys[None, :], -columns_reach), columns_reach)
        column = tl.load(columns_ptr + columns_reach + distance)
        if c2p[0] is not None:
            ptrs = c2p[0] + tl.cast(start, tl.int64) * c2p[1] + (queries[:, None] * c2p[1] + column)
            scores += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        if p2c[0] is not None:
            ptrs = p2c[0] + tl.cast(first_key, tl.int64) * p2c[1] + (others[None, :] * p2c[1] + column)
            scores += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    rel_h, rel_w, grid_width = decomposed
    if rel_h[0] is not None:
        mask = (rows < length)[:, None] & (keys < length)[None, :]
        ptrs = rel_h[0] + tl.cast(start, tl.int64) * rel_h[1]
        offsets = queries[:, None] * rel_h[1] + (keys // grid_width)[None, :]
        scores += tl.load(ptrs + offsets, mask=mask, other=0.0).to(tl.float32)
        ptrs = rel_w[0] + tl.cast(start, tl.int64) * rel_w[1]
        offsets = queries[:, None] * rel_w[1] + (keys % grid_width)[None, :]
        scores += tl.load(ptrs + offsets, mask=mask, other=0.0).to(tl.float32)
    return scores


@triton.jit
def _tanh(x):
    """The odd polynomial where 1 - 2 / (1 + exp(2x)) would lose digits; its next term is below 1e-7 of the result."""
    square = x * x
    small = 0.021869488536155202  # 62 / 2835
    small = small * square - 0.053968253968253971  # 17 / 315
    small = small * square + 0.13333333333333333
    small = small * square - 0.33333333333333333
    large = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
    return tl.where(square < 0.09, x * (small * square + 1.0), large)


@triton.jit
def hide_scores(scores, rows, keys, end, left, right):
    """-inf where a key lies behind the end, or outside the window of its query."""
    visible = (keys < end)[None, :]
    if left is not None:
        distance = keys[None, :] - rows[:, None]
        visible = visible & (distance >= -left) & (distance <= right)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def softmax_step(scores, highest, factor, SPARSE: tl.constexpr, ADJUSTED: tl.constexpr):
    """exp((scores - maximum) * factor * ln 2), the new maximum, and what the sums so far have to be multiplied by.

    `highest` is the maximum of the scores so far. SPARSE: a query may have seen no key yet, and then its maximum is -inf.
    ADJUSTED: a bias may be the lowest number that there is, which overflows if it is multiplied first.
    """
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    shift = new_highest
    if SPARSE:
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    if ADJUSTED:
        weights = tl.exp2((scores - shift[:, None]) * factor)
    else:
        shift_scaled = shift * factor
        weights = tl.exp2(scores * factor - shift_scaled[:, None])
    return weights, new_highest, tl.exp2((highest - shift) * factor)


@triton.jit
def normalised(out, total, SPARSE: tl.constexpr):
    """Weighted sums divided by the sum of the weights; zero where a query has seen no key."""
    if SPARSE:
        total = tl.where(total == 0.0, 1.0, total)
    return out / total[:, None]


@triton.jit
def store_tile(out, out_ptr, first, head, start, length, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Round and store one head's rows of the output [T, HEADS, DIM], from row `start` of the sequence."""
    rows = start + tl.arange(0, out.shape[0])
    dims = tl.arange(0, out.shape[1])
    ptrs = out_ptr + first * (HEADS * DIM) + head * DIM + (rows[:, None] * (HEADS * DIM) + dims[None, :])
    mask = (rows < length)[:, None] & (dims < DIM)[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
