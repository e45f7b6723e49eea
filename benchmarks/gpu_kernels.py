"""Part "kernels": every operation, compiled, in fp16, bf16 and fp32, and the kernel tests where pytest is."""

from __future__ import annotations

import torch

from benchmarks import gpu_kernels_attention, gpu_kernels_linear, gpu_kernels_memory, gpu_tests
from benchmarks.gpu_judge import unique
from benchmarks.store import Row

# By the operation that their names begin with. An operation that is missing here fails a test.
MAKERS = {
    "varlen_attention": gpu_kernels_attention.rows,
    "linear": gpu_kernels_linear.rows,
    "linear_partial": gpu_kernels_linear.rows,
    "add_norm": gpu_kernels_memory.add_norm_rows,
    "pack": gpu_kernels_memory.pack_rows,
    "unpack": gpu_kernels_memory.pack_rows,
    "read_mask": gpu_kernels_memory.padding_rows,
    "token_positions": gpu_kernels_memory.padding_rows,
    "embed_norm": gpu_kernels_memory.embed_norm_rows,
}


def rows(device: torch.device, quick: bool, deadline: float) -> list[Row]:
    """All rows of the part; the tests come first, because each file is one long row."""
    operations = unique(row for maker in dict.fromkeys(MAKERS.values()) for row in maker(device, quick))
    return [*gpu_tests.rows(device, deadline), *operations]
