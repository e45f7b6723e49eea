"""Fused operations on packed tokens. Each is one package: the API in ``__init__``, and its implementations beside it.

Importing this imports neither Triton nor anything of a GPU.
"""

from fastencoder.kernels._dispatch import implementation
from fastencoder.kernels.add_norm import add_norm
from fastencoder.kernels.embed_norm import embed_norm
from fastencoder.kernels.linear import ACTIVATIONS, linear, linear_partial, partial_splits
from fastencoder.kernels.pack import pack, unpack
from fastencoder.kernels.padding import read_mask, token_positions
from fastencoder.kernels.varlen_attention import query_block, tile_list, varlen_attention

__all__ = [
    "ACTIVATIONS",
    "add_norm",
    "embed_norm",
    "implementation",
    "linear",
    "linear_partial",
    "pack",
    "partial_splits",
    "query_block",
    "read_mask",
    "tile_list",
    "token_positions",
    "unpack",
    "varlen_attention",
]
