"""The fast layer: runs a `LayerSpec` on packed tokens, or hands the call to the layer's original forward."""

from .classes import fast_class
from .fast_embeddings import EmbeddingState, FastEmbeddings
from .fast_layer import FastLayer, LayerState
from .guards import Delegated
from .stack import Stack

__all__ = ["Delegated", "EmbeddingState", "FastEmbeddings", "FastLayer", "LayerState", "Stack", "fast_class"]
