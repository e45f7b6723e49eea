"""``read_mask`` and ``token_positions``: what an attention mask says about padding, without waiting for the device."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import Dispatcher, register

__all__ = ["BIAS", "DIFFERS", "read_mask", "token_positions", "unreadable"]

# What `summary` holds instead of a length where the mask is not key padding. The least entry is the one to report.
DIFFERS = -2  # from one query to another
BIAS = -1  # an additive mask with other values than 0 and those below MASKED_BELOW

# Additive masks mark padding with finfo.min, -inf or -10000 (-9984 once it is rounded to bfloat16). A less negative value
# would be a bias, not a mask.
MASKED_BELOW = -9000.0

_read_mask = Dispatcher(__name__, "read_mask")
_token_positions = Dispatcher(__name__, "token_positions")


def unreadable(mask: torch.Tensor, batch: int, seqlen: int) -> str | None:
    """What :func:`read_mask` cannot read in the shape or the dtype of a mask, in words; None if it can. Asks no device."""
    if mask.dim() == 2 and mask.shape == (batch, seqlen) and not mask.is_floating_point():
        return None
    if (
        mask.dim() != 4
        or mask.shape[1] != 1
        or mask.shape[3] != seqlen
        or mask.shape[0] not in (1, batch)
        or mask.shape[2] not in (1, seqlen)
    ):
        return f"an attention mask of shape {tuple(mask.shape)}"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"an attention mask of dtype {mask.dtype}"
    return None


def read_mask(mask: torch.Tensor, batch: int, seqlen: int, marks: str = "tokens") -> tuple[torch.Tensor, torch.Tensor]:
    """Find the real tokens in a mask, and whether it is key padding at all. Nothing waits for the device.

    Args:
        mask: ``[B, S]`` boolean or integer; or ``[B or 1, 1, 1 or S, S]``, boolean (True: attend) or additive (0: attend;
            -10000, finfo.min or -inf: do not). Any strides; of a view that is expanded over queries one is read.
        batch: ``B``.
        seqlen: ``S``.
        marks: what a nonzero ``[B, S]`` entry stands for: ``"tokens"`` or ``"padding"``.

    Returns:
        ``tokens``, boolean ``[B, S]``, True at real tokens (it may share the memory of ``mask``), and ``summary``, int32
        ``[B]``. If no entry of ``summary`` is negative, the mask is key padding, and they are the numbers of real tokens of
        the sequences. Otherwise at least one entry is :data:`DIFFERS` or :data:`BIAS`, and ``tokens`` means nothing.

    Raises:
        ValueError: the mask has another shape or dtype (what :func:`unreadable` says), or ``marks`` is another word.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.read_mask(mask, batch, seqlen, marks)
    _check_mask(mask, batch, seqlen, marks)
    return _read_mask(mask, batch, seqlen, marks)


def token_positions(tokens: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """Where the real tokens are in the padded batch.

    Args:
        tokens: boolean ``[B, S]``, True at real tokens.
        offsets: int32 ``[B + 1]``, the number of tokens before each sequence.
        count: the number of real tokens, ``T``.

    Returns:
        int32 ``[T]``: the flat positions ``b * S + s`` of the real tokens, ascending.

    Raises:
        ValueError: the shapes do not fit; on the CPU, too, if there are not ``count`` tokens. On a GPU such a call has an
            undefined result, but never writes outside of it.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.token_positions(tokens, offsets, count)
    return _run_token_positions(tokens, offsets, count)


def _run_read_mask(
    mask: torch.Tensor, batch: int, seqlen: int, marks: str = "tokens"
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_mask(mask, batch, seqlen, marks)
    tokens, summary = _read_mask(mask, batch, seqlen, marks)
    shared = tokens.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
    return tokens.clone(memory_format=torch.contiguous_format) if shared else tokens, summary


def _run_token_positions(tokens: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    _check_tokens(tokens, offsets)
    return _token_positions(tokens, offsets, count)


def _fake_read_mask(
    mask: torch.Tensor, batch: int, seqlen: int, marks: str = "tokens"
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_mask(mask, batch, seqlen, marks)
    return mask.new_empty((batch, seqlen), dtype=torch.bool), mask.new_empty(batch, dtype=torch.int32)


def _fake_token_positions(tokens: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    _check_tokens(tokens, offsets)
    return tokens.new_empty(count, dtype=torch.int32)


def _check_mask(mask: torch.Tensor, batch: int, seqlen: int, marks: str) -> None:
    if marks not in ("tokens", "padding"):
        raise ValueError(f"marks must be 'tokens' or 'padding', got {marks!r}")
    reason = unreadable(mask, batch, seqlen)
    if reason is not None:
        raise ValueError(f"{reason}, for {batch} sequences of {seqlen}")


def _check_tokens(tokens: torch.Tensor, offsets: torch.Tensor) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.bool:
        raise ValueError(f"tokens must be boolean [B, S], got {tokens.dtype} {tuple(tokens.shape)}")
    if offsets.shape != (tokens.shape[0] + 1,) or offsets.dtype != torch.int32:
        shape = tuple(offsets.shape)
        raise ValueError(f"offsets must be int32 [B + 1] = [{tokens.shape[0] + 1}], got {offsets.dtype} {shape}")


register(
    'read_mask(Tensor mask, SymInt batch, SymInt seqlen, str marks="tokens") -> (Tensor, Tensor)',
    _run_read_mask,
    _fake_read_mask,
)
register(
    "token_positions(Tensor tokens, Tensor offsets, SymInt count) -> Tensor",
    _run_token_positions,
    _fake_token_positions,
)
