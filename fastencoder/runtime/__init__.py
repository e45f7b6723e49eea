"""What surrounds the kernels at run time: CUDA graphs, and kernels compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

__all__ = ["load_bundle"]


def load_bundle(folder: str | Path) -> bool:
    """Lets Triton find the compiled kernels of a bundle (see `fastencoder compile`), instead of compiling them.

    The whole bundle is checked first. Call it before the model runs, in the process that runs it; or name the folder in the
    environment variable FASTENCODER_BUNDLE, which is read when the first kernel is launched.

    Returns:
        True if the bundle is used. Otherwise False, after one warning that says why; kernels are compiled when they are first
        needed, as ever.
    """
    from .bundle import load_bundle  # Triton exists on some platforms only

    return load_bundle(folder)
