"""The fast layer: runs a `LayerSpec` on packed tokens, or hands the call to the layer's original forward."""

from .classes import fast_class
from .fast_embeddings import EmbeddingState, FastEmbeddings
from .fast_layer import FastLayer, LayerState
from .guards import Delegated
from .invariance import BatchVariantError, InvariantLinear
from .owners import OWNERS, FastOwner
from .stack import Stack

__all__ = [
    "OWNERS",
    "BatchVariantError",
    "Delegated",
    "EmbeddingState",
    "FastEmbeddings",
    "FastLayer",
    "FastOwner",
    "InvariantLinear",
    "LayerState",
    "Stack",
    "fast_class",
]
