"""``varlen_attention``: attention inside each sequence of a packed batch."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import Dispatcher, register

__all__ = ["varlen_attention"]

_attention = Dispatcher(__name__, "varlen_attention")


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """``softmax(q kᵀ · scale) v`` for every head, inside each sequence, not causal; softmax in float32.

    Args:
        q: ``[T, H, d]``, ``16 <= d <= 256``. Like ``k`` and ``v`` it may be a strided view, e.g. of one packed ``[T, 3,
            H, d]``.
        k: ``[T, Hk, d]``, where ``Hk`` divides ``H``: head ``h`` of ``q`` reads head ``h // (H // Hk)`` of ``k`` and
            ``v``.
        v: ``[T, Hk, d]``.
        offsets: int32 ``[B + 1]``: sequence ``b`` is rows ``offsets[b]`` to ``offsets[b + 1]``. Empty sequences are
            allowed.
        max_seqlen: at least the length of the longest sequence, in tokens.
        scale: what the scores are multiplied by, usually ``d ** -0.5``; positive.

    Returns:
        ``[T, H, d]``, contiguous.

    Raises:
        ValueError: shapes that do not fit, or a scale that is not positive.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.varlen_attention(q, k, v, offsets, max_seqlen, scale)
    return _run(q, k, v, offsets, max_seqlen, scale)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    _check(q, k, v, offsets, scale)
    return _attention(q, k, v, offsets, max_seqlen, scale)


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    _check(q, k, v, offsets, scale)
    return q.new_empty(q.shape)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, scale: float) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be [T, H, d] and k and v [T, Hk, d], got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if offsets.dim() != 1 or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 [B + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    if not scale > 0:  # the kernels scale the largest score, which must stay the largest
        raise ValueError(f"scale must be positive, got {scale}")


register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, SymInt max_seqlen, float scale) -> Tensor",
    _run,
    _fake,
)
