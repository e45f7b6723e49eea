"""The attention-only level: layers of an unknown class keep their code, and their self-attention skips padding."""

from .classes import varlen_class
from .find import AttentionSite, find_sites, own_class
from .interface import NAME, register_functions
from .varlen import AttentionState, VarlenAttention
from .window import Window

__all__ = [
    "NAME",
    "AttentionSite",
    "AttentionState",
    "VarlenAttention",
    "Window",
    "find_sites",
    "own_class",
    "register_functions",
    "varlen_class",
]
