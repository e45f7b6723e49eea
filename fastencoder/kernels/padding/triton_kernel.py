"""``read_mask`` and ``token_positions`` in Triton: one launch each; two for a mask that has memory for every query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastencoder.kernels._triton import Launch, cdiv
from fastencoder.kernels.padding import BIAS, DIFFERS, MASKED_BELOW
from fastencoder.kernels.padding.reference import is_materialised

_ROW_BLOCK = 512  # columns that a program takes at once of its row
_KEY_BLOCK = 256


def read_mask(mask: torch.Tensor, batch: int, seqlen: int, marks: str = "tokens") -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S]`` or ``[B or 1, 1, 1 or S, S]`` -> bool ``[B, S]``, int32 ``[B]``."""
    tokens = torch.empty((batch, seqlen), dtype=torch.bool, device=mask.device)
    summary = torch.empty(batch, dtype=torch.int32, device=mask.device)
    plan_rows(mask, marks, tokens, summary).run(mask.device)
    if mask.dim() == 4 and is_materialised(mask) and batch:
        plan_queries(mask, summary).run(mask.device)  # after the lengths, which it overwrites
    return tokens, summary


def token_positions(tokens: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """bool ``[B, S]``, int32 ``[B + 1]``, T -> int32 ``[T]``."""
    positions = torch.empty(count, dtype=torch.int32, device=tokens.device)
    plan_positions(tokens, offsets, positions).run(tokens.device)
    return positions


def plan_rows(mask: torch.Tensor, marks: str, tokens: torch.Tensor, summary: torch.Tensor) -> Launch:
    """The launch that fills ``tokens`` [B, S] and ``summary`` [B] from the first query's row of every sequence."""
    return Launch(
        kernel=_rows_kernel,
        grid=(tokens.shape[0],),
        arguments={
            "mask_ptr": mask,
            "tokens_ptr": tokens,
            "summary_ptr": summary,
            "seqlen": tokens.shape[1],
            "batch_stride": mask.stride(0) if mask.shape[0] > 1 else 0,  # one mask for all sequences
            "key_stride": mask.stride(-1),
        },
        constants={
            "ADDITIVE": mask.is_floating_point(),
            "MARKS_PADDING": mask.dim() == 2 and marks == "padding",
            "MASKED_BELOW": MASKED_BELOW,
            "BIAS": BIAS,
            "BLOCK": _ROW_BLOCK,
        },
        num_warps=4,
        num_stages=1,  # a row is rarely more than one block
    )


def plan_queries(mask: torch.Tensor, summary: torch.Tensor) -> Launch:
    """The launch that marks in ``summary`` [B] each sequence whose queries have different masks [B or 1, 1, S, S]; the
    first sequence where there is one mask for all."""
    sequences, _, queries, keys = mask.shape
    unit = 16 if _in_vectors(mask) else 1
    # 16 KiB in vectors of 16 bytes; element by element, as many as a thread can have on their way
    block_queries = 16384 // mask.element_size() // _KEY_BLOCK if unit > 1 else 8
    return Launch(
        kernel=_queries_kernel,
        grid=(cdiv(queries, block_queries), cdiv(keys, _KEY_BLOCK), sequences),
        arguments={
            "mask_ptr": mask,
            "summary_ptr": summary,
            "keys": keys // unit,
            "batch_stride": mask.stride(0) // unit,
            "query_stride": mask.stride(2) // unit,
            "key_stride": mask.stride(3),
        },
        constants={
            "UNIT": unit,
            "DIFFERS": DIFFERS,
            "BLOCK_QUERIES": block_queries,
            "BLOCK_KEYS": _KEY_BLOCK,
        },
        num_warps=4,
        num_stages=1,  # no loop to pipeline
    )


def _in_vectors(mask: torch.Tensor) -> bool:
    """Whether every row of keys is contiguous, and begins and ends at a multiple of 16 elements."""
    aligned = mask.storage_offset() % 16 == 0 and mask.stride(0) % 16 == 0 and mask.stride(2) % 16 == 0
    return aligned and mask.stride(3) == 1 and mask.shape[3] % 16 == 0


def plan_positions(tokens: torch.Tensor, offsets: torch.Tensor, positions: torch.Tensor) -> Launch:
    """The launch that fills ``positions`` [T]."""
    return Launch(
        kernel=_positions_kernel,
        grid=(tokens.shape[0],),
        arguments={
            "tokens_ptr": tokens,
            "offsets_ptr": offsets,
            "positions_ptr": positions,
            "count": positions.shape[0],
            "seqlen": tokens.shape[1],
            "batch_stride": tokens.stride(0),
            "key_stride": tokens.stride(1),
        },
        constants={"BLOCK": _ROW_BLOCK},
        num_warps=4,
        num_stages=1,  # each block continues the count of the one before
    )


@triton.jit
def _widened(value):
    """16-bit floating numbers as float32, so that a comparison does not round what it compares with."""
    return value.to(tl.float32) if value.dtype == tl.float16 or value.dtype == tl.bfloat16 else value


@triton.jit(do_not_specialize=["seqlen", "batch_stride", "key_stride"])
def _rows_kernel(
    mask_ptr,  # [B, ..., seqlen], any strides: the row of the first query
    tokens_ptr,  # bool [B, seqlen], contiguous
    summary_ptr,  # int32 [B]
    seqlen,
    batch_stride,
    key_stride,
    ADDITIVE: tl.constexpr,
    MARKS_PADDING: tl.constexpr,
    MASKED_BELOW: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    counts = tl.zeros([BLOCK], tl.int32)
    biases = tl.zeros([BLOCK], tl.int32)
    for start in range(0, seqlen, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = key < seqlen
        value = _widened(tl.load(mask_ptr + sequence * batch_stride + key.to(tl.int64) * key_stride, exists, other=0))
        if ADDITIVE or MARKS_PADDING:
            token = exists & (value == 0)
        else:
            token = exists & (value != 0)
        if ADDITIVE:  # NaN is neither
            biases += (exists & ~(token | (value <= MASKED_BELOW))).to(tl.int32)
        counts += token.to(tl.int32)
        tl.store(tokens_ptr + sequence * seqlen + key, token, mask=exists)
    length = tl.sum(counts)
    if ADDITIVE:
        length = tl.where(tl.sum(biases) > 0, BIAS, length)
    tl.store(summary_ptr + sequence, length)


@triton.jit(do_not_specialize=["keys", "batch_stride", "query_stride", "key_stride"])
def _queries_kernel(
    mask_ptr,  # [B, seqlen, seqlen], any strides
    summary_ptr,  # int32 [B]
    keys,  # in units, like the strides of sequences and queries: a factor of 16 tells the compiler what is aligned
    batch_stride,
    query_stride,
    key_stride,
    UNIT: tl.constexpr,
    DIFFERS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    sequence = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)[:, None]  # [BLOCK_QUERIES, 1]
    key = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)[None, :]  # [1, BLOCK_KEYS]
    column = key if UNIT > 1 else key.to(tl.int64) * key_stride  # the keys of units are contiguous
    first_ptr = mask_ptr + sequence * batch_stride * UNIT + column
    exists = key < keys * UNIT
    first = _widened(tl.load(first_ptr, mask=exists, other=0))
    exists = exists & (query < keys * UNIT)
    value = _widened(tl.load(first_ptr + query.to(tl.int64) * query_stride * UNIT, mask=exists, other=0))
    differs = tl.max((exists & (value != first)).to(tl.int32))  # NaN differs from itself
    tl.store(summary_ptr + sequence, DIFFERS, mask=differs > 0)  # whoever writes, writes the same


@triton.jit(do_not_specialize=["count", "seqlen", "batch_stride", "key_stride"])
def _positions_kernel(
    tokens_ptr,  # bool [B, seqlen], any strides
    offsets_ptr,  # int32 [B + 1]
    positions_ptr,  # int32 [count]
    count,
    seqlen,
    batch_stride,
    key_stride,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    before = tl.load(offsets_ptr + sequence)
    for start in range(0, seqlen, BLOCK):
        key = start + tl.arange(0, BLOCK)
        token_ptr = tokens_ptr + sequence * batch_stride + key.to(tl.int64) * key_stride
        token = tl.load(token_ptr, mask=key < seqlen, other=0).to(tl.int32)
        slot = before + tl.cumsum(token) - token
        inside = (token > 0) & (slot >= 0) & (slot < count)  # wrong offsets must not write elsewhere
        tl.store(positions_ptr + slot, sequence * seqlen + key, mask=inside)
        before += tl.sum(token)
