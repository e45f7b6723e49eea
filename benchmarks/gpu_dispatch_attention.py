"""Contests of `varlen_attention`: blocks of queries and keys, all keys at once where they fit, and the loop."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_dispatch import CHOSEN, DTYPE, Contest, Make, limits_of
from benchmarks.gpu_judge import find
from benchmarks.gpu_kernels_attention import attention
from benchmarks.models import lengths_of


def attention_contests(device: torch.device, quick: bool) -> Iterator[Contest]:
    """Blocks of queries and keys: all keys at once where they fit, and the loop."""
    for seqlen in (32, 64, 128, 256, 512, 1024) if not quick else (16,):
        for padded in (False, True):
            batch = max(16384 // seqlen, 2) if not quick else 2
            lengths = lengths_of(batch, seqlen, 0.5 if padded else 0.0)
            yield Contest(
                f"attention d=64 heads=12 {batch}x{seqlen}{' half padding' * padded}",
                partial(_attention_candidates, lengths, device),
                4 * 2 * 12 * 64 * float(sum(lengths)),
                float(sum(4 * s * s * 12 * 64 for s in lengths)),
                partial(_block_choice, max(lengths), device),
            )


def _attention_candidates(lengths: list[int], device: torch.device) -> dict[str, Make]:
    longest, dim = max(lengths), 64
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    def inputs(seed):
        generator = torch.Generator(device).manual_seed(seed)
        buffer = torch.randn(sum(lengths), 3, 12, dim, device=device, dtype=DTYPE, generator=generator)
        return (*buffer.unbind(1), offsets, longest, dim**-0.5)

    def chosen(seed):
        queries = find("query_block")(dim, DTYPE, longest, device)
        return partial(find("varlen_attention"), *inputs(seed), tiles=find("tile_list")(lengths, queries).to(device))

    if device.type == "cpu":
        return {CHOSEN: chosen, "sdpa": lambda seed: partial(attention, *inputs(seed))}
    return {CHOSEN: chosen, **block_candidates(lengths, inputs, device)}


def block_candidates(
    lengths: list[int], inputs: Callable[[int], tuple[Any, ...]], device: torch.device
) -> dict[str, Make]:
    """Our attention with each block; `inputs` makes its first arguments."""
    triton = importlib.import_module("fastencoder.kernels.varlen_attention.triton_kernel")

    def with_block(block):
        def make(seed):
            arguments, tiles = inputs(seed), find("tile_list")(lengths, block.queries).to(device)

            def call():
                original, triton.choose_block = triton.choose_block, lambda *_, **__: block
                try:
                    return triton.varlen_attention(*arguments, tiles=tiles)
                finally:
                    triton.choose_block = original

            return call

        return make

    return {_block_name(block): with_block(block) for block in _blocks(max(lengths))}


def _blocks(longest: int) -> list[Any]:
    block = importlib.import_module("fastencoder.kernels.varlen_attention.heuristics").Block
    keys = max(16, 1 << (longest - 1).bit_length())  # all of a sequence
    made = []
    if keys <= 128:
        shapes = ((keys, max(keys // 16, 1)), (min(keys, 64), 4), (min(keys, 32), 4))
        made += [block(queries, keys, warps, 2, single=True) for queries, warps in shapes]
    made += [block(64, 32, 4, 3), block(64, 64, 4, 3), block(128, 64, 8, 3), block(128, 128, 8, 2), block(128, 64, 4, 3)]
    return list(dict.fromkeys(made))


def _block_name(block: Any) -> str:
    kind = "single" if block.single else "looped"
    return f"{block.queries}x{block.keys} {block.num_warps} warps {block.num_stages} stages {kind}"


def _block_choice(longest: int, device: torch.device) -> str:
    heuristics = importlib.import_module("fastencoder.kernels.varlen_attention.heuristics")
    return _block_name(heuristics.choose_block(longest, 64, DTYPE, limits_of(device)))
