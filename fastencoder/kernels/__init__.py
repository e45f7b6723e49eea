"""Fused operations on packed tokens. Each is one package: the API in ``__init__``, and its implementations beside it.

Importing this imports neither Triton nor anything of a GPU.
"""

from fastencoder.kernels._dispatch import implementation
from fastencoder.kernels.add_norm import add_norm
from fastencoder.kernels.linear import ACTIVATIONS, linear
from fastencoder.kernels.pack import pack, unpack
from fastencoder.kernels.varlen_attention import varlen_attention

__all__ = ["ACTIVATIONS", "add_norm", "implementation", "linear", "pack", "unpack", "varlen_attention"]
