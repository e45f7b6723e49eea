"""``varlen_attention`` in the C++ extension: no rows, no masks, each sequence and head by itself."""

from __future__ import annotations

import torch

from fastencoder.kernels import native
from fastencoder.kernels.native import address, float32
from fastencoder.kernels.varlen_attention.features import Features


def runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, features: Features) -> bool:
    """Whether the extension is there and understands these tensors and features."""
    products = [x for x in (features.c2p, features.p2c) if x is not None]
    return (
        native.current > 0
        and features.softcap is None
        and q.dtype in native.DTYPES
        and q.dtype == k.dtype == v.dtype
        and all(x.stride(-1) == 1 for x in (q, k, v, *products))
        and all(x.dtype == q.dtype for x in products)
    )


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    features: Features,
) -> torch.Tensor:
    """``[T, H, d]``, ``[T, Hk, d]``, ``[T, Hk, d]``, int32 ``[B + 1]`` -> ``[T, H, d]``.

    Raises:
        ValueError: sequences outside of the T tokens, or longer than ``max_seqlen``.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    f = features
    # Every tensor has a name until the end of the call: an address keeps nothing alive.
    offsets, cos, sin, relative = offsets.contiguous(), float32(f.cos), float32(f.sin), float32(f.relative_bias)
    bias = None if f.bias is None else f.bias.to(torch.float32)
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    columns = None if f.columns is None else f.columns.contiguous()
    rel_h, rel_w = float32(f.rel_h), float32(f.rel_w)
    native.library.attention(
        *(native.current, q.shape[0], max_seqlen),
        *(address(x) for x in (q, k, v, out, offsets)),
        *(native.DTYPES[q.dtype], len(offsets) - 1, q.shape[1], k.shape[1], q.shape[2]),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *(f.left, f.right),
        scale,
        *(address(cos), address(sin), 0 if cos is None else 2 * cos.shape[1], f.interleaved),
        *(address(relative), 0 if relative is None else (relative.shape[1] + 1) // 2),
        *(address(bias), *_steps(bias)),
        *(address(f.c2p), address(f.p2c), *_strides(f.c2p), *_strides(f.p2c)),
        *(address(columns), 0 if columns is None else (columns.shape[0] + 1) // 2),
        *(address(rel_h), address(rel_w), *_strides(rel_h), *_strides(rel_w), 0 if rel_w is None else rel_w.shape[2]),
        torch.get_num_threads(),
    )
    return out


def _strides(products: torch.Tensor | None) -> tuple[int, int]:
    """Of ``[T, H, n]``."""
    return (0, 0) if products is None else products.stride()[:2]


def _steps(bias: torch.Tensor | None) -> tuple[int, int, int]:
    """The strides of ``[B or 1, H or 1, S, S]``, none along a dimension of one."""
    if bias is None:
        return 0, 0, 0
    by_sequence, by_head, by_query, _ = bias.stride()
    return by_sequence if bias.shape[0] > 1 else 0, by_head if bias.shape[1] > 1 else 0, by_query
