"""The fast layer: runs a `LayerSpec` on packed tokens, or hands the call to the layer's original forward."""

from .classes import fast_class
from .fast_layer import Delegated, FastLayer, LayerState
from .stack import Stack

__all__ = ["Delegated", "FastLayer", "LayerState", "Stack", "fast_class"]
