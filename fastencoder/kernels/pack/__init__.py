"""``pack`` and ``unpack``: a padded batch to its real tokens and back."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import Dispatcher, register

__all__ = ["pack", "unpack"]

_pack = Dispatcher(__name__, "pack")
_unpack = Dispatcher(__name__, "unpack")


def pack(hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather the real tokens of a padded batch.

    Args:
        hidden: ``[B, S, D]``, any floating dtype.
        indices: int32 or int64 ``[T]``: the flat position ``b * S + s`` of every real token, ascending.

    Returns:
        ``[T, D]``, the rows of ``hidden`` at ``indices``. Padding is never read.

    Raises:
        ValueError: the shapes or the index dtype do not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.pack(hidden, indices)
    return _run_pack(hidden, indices)


def unpack(values: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Scatter packed tokens back to a padded batch; the inverse of :func:`pack`.

    Args:
        values: ``[T, D]``, any floating dtype.
        indices: int32 or int64 ``[T]``: the flat position ``b * S + s`` of every token, ascending, without repeats.
        batch: ``B``.
        seqlen: ``S``.

    Returns:
        ``[B, S, D]``, zero where there is no token.

    Raises:
        ValueError: the shapes or the index dtype do not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.unpack(values, indices, batch, seqlen)
    return _run_unpack(values, indices, batch, seqlen)


def _run_pack(hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    _check_pack(hidden, indices)
    return _pack(hidden, indices)


def _run_unpack(values: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    _check_unpack(values, indices)
    return _unpack(values, indices, batch, seqlen)


def _fake_pack(hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    _check_pack(hidden, indices)
    return hidden.new_empty(indices.shape[0], hidden.shape[2])


def _fake_unpack(values: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    _check_unpack(values, indices)
    return values.new_empty(batch, seqlen, values.shape[1])


def _check_pack(hidden: torch.Tensor, indices: torch.Tensor) -> None:
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [B, S, D], got shape {tuple(hidden.shape)}")
    _check_indices(indices)


def _check_unpack(values: torch.Tensor, indices: torch.Tensor) -> None:
    if values.dim() != 2:
        raise ValueError(f"values must be [T, D], got shape {tuple(values.shape)}")
    _check_indices(indices)
    if indices.shape[0] != values.shape[0]:
        raise ValueError(f"{values.shape[0]} tokens need as many indices, got {indices.shape[0]}")


def _check_indices(indices: torch.Tensor) -> None:
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be int32 or int64 [T], got {indices.dtype} {tuple(indices.shape)}")


register("pack(Tensor hidden, Tensor indices) -> Tensor", _run_pack, _fake_pack)
register("unpack(Tensor values, Tensor indices, SymInt batch, SymInt seqlen) -> Tensor", _run_unpack, _fake_unpack)
