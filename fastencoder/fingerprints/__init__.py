"""Layer classes known by what they compute, not by what they are called.

transformers copies layers from one another, and users copy them out of transformers. A class that is not registered, but has
the normalised source of one that is, is supported with its adapter. A registered class whose source is none of those that were
tested is not trusted: `layers.trial` compares it with its own forward before it runs fast.
"""

from .known import Known, find, find_all, fingerprint, has_known_loop

__all__ = ["Known", "find", "find_all", "fingerprint", "has_known_loop"]
