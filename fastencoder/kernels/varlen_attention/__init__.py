"""``varlen_attention``: attention inside each sequence of a packed batch."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import Dispatcher, register
from fastencoder.kernels.varlen_attention.features import PLAIN, UNLIMITED, Features
from fastencoder.kernels.varlen_attention.tiles import query_block, tile_list

__all__ = ["query_block", "tile_list", "varlen_attention"]

_attention = Dispatcher(__name__, "varlen_attention")


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    rope: tuple[torch.Tensor, torch.Tensor, bool] | None = None,
    relative_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    disentangled: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor] | None = None,
    decomposed: tuple[torch.Tensor, torch.Tensor] | None = None,
    tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(q kᵀ · scale) v`` for every head, inside each sequence; softmax in float32.

    With all features a score is ``softcap · tanh(rope(q) rope(k)ᵀ · scale / softcap) + relative_bias + bias + disentangled +
    decomposed``, and a query takes part only in the keys that it sees. One that sees no key (every bias -inf) has the result
    zero.

    Args:
        q: ``[T, H, d]``, ``16 <= d <= 256``. Like ``k`` and ``v`` it may be a strided view, e.g. of one packed ``[T, 3,
            H, d]``.
        k: ``[T, Hk, d]``, where ``Hk`` divides ``H``: head ``h`` of ``q`` reads head ``h // (H // Hk)`` of ``k`` and
            ``v``.
        v: ``[T, Hk, d]``.
        offsets: int32 ``[B + 1]``: sequence ``b`` is rows ``offsets[b]`` to ``offsets[b + 1]``. Empty sequences are
            allowed, and so are tokens behind the last sequence, whose result is undefined.
        max_seqlen: at least the length of the longest sequence, in tokens.
        scale: what the scores are multiplied by, usually ``d ** -0.5``; positive.
        causal: a query sees no key behind its own position.
        window: ``(left, right)``: query ``i`` sees keys ``i - left`` to ``i + right``; None or -1 for no limit.
        softcap: scores are bent to stay between ``-softcap`` and ``softcap``; positive.
        rope: ``(cos, sin, interleaved)`` with tables ``[T, r / 2]``, ``r <= d``, for rotary position embedding of the
            first ``r`` dimensions of ``q`` and ``k``. It turns the pairs ``(2i, 2i + 1)`` if interleaved, otherwise ``(i,
            i + r / 2)``.
        relative_bias: ``[H, 2R - 1]``, a bias for every distance between key and query: ``relative_bias[h, j - i + R -
            1]`` is added to the score of query ``i`` and key ``j``; farther than ``R - 1`` counts as ``R - 1``.
        bias: ``[B or 1, H or 1, S, S]``, ``S >= max_seqlen``, added to the scores by position in the sequence.
        disentangled: ``(c2p, p2c, columns)`` for the attention of DeBERTa (He et al., arXiv 2006.03654): ``c2p[i, h, m] +
            p2c[j, h, m]`` is added to the score of query ``i`` and key ``j`` of a sequence, where ``m = columns[i - j + R -
            1]``; farther than ``R - 1`` counts as ``R - 1``. ``c2p`` ``[T, H, P]`` holds the products of every query with
            the position keys, ``p2c`` ``[T, H, P]`` those of every key with the position queries, both with their scale
            already in; one of the two may be None. ``columns`` is int32 ``[2R - 1]``, from 0 to ``P - 1``. Transposed views
            of ``[H, T, P]`` are read as they are, on CPU anything else is copied.
        decomposed: ``(rel_h, rel_w)`` for the relative positions of MViTv2, ViTDet and SAM (Li et al., arXiv 2112.01526):
            ``rel_h[i, h, j // Kw] + rel_w[i, h, j % Kw]`` is added to the score of query ``i`` and key ``j`` of a sequence,
            a grid of ``Kh`` rows of ``Kw`` tokens. ``rel_h`` ``[T, H, Kh]`` and ``rel_w`` ``[T, H, Kw]`` hold the products
            of every query with the positions of the grid's rows and columns as seen from it; ``Kh · Kw >= max_seqlen``.
        tiles: int32 ``[n, 2]`` on q's device, the work list of :func:`tile_list` for blocks of :func:`query_block`; more
            rows may name an empty sequence. Without it there is a program for every sequence and block of
            ``max_seqlen``, also for those that turn out to have nothing to do. Only the Triton kernels read it.

    Returns:
        ``[T, H, d]``, contiguous.

    Raises:
        ValueError: shapes that do not fit, a scale or softcap that is not positive, or a negative window.
    """
    features = PLAIN
    if causal or not (window is softcap is rope is relative_bias is bias is disentangled is decomposed is None):
        left, right = (UNLIMITED if side is None else side for side in window or (None, None))
        cos, sin, interleaved = rope or (None, None, False)
        c2p, p2c, columns = disentangled or (None, None, None)
        right = 0 if causal else right
        rel_h, rel_w = decomposed or (None, None)
        features = Features(
            left, right, softcap, cos, sin, interleaved, relative_bias, bias, c2p, p2c, columns, rel_h, rel_w
        )
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.varlen_attention(q, k, v, offsets, max_seqlen, scale, *features, tiles)
    return _run_checked(q, k, v, offsets, max_seqlen, scale, features, tiles)


def _run_checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    features: Features,
    tiles: torch.Tensor | None,
) -> torch.Tensor:
    _check(q, k, v, offsets, scale)
    if features is not PLAIN:
        _check_features(q, offsets, max_seqlen, features)
    return _attention(q, k, v, offsets, max_seqlen, scale, features, tiles)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    left: int = UNLIMITED,
    right: int = UNLIMITED,
    softcap: float | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    relative_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    c2p: torch.Tensor | None = None,
    p2c: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    rel_h: torch.Tensor | None = None,
    rel_w: torch.Tensor | None = None,
    tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    features = Features(
        left, right, softcap, cos, sin, interleaved, relative_bias, bias, c2p, p2c, columns, rel_h, rel_w
    )
    return _run_checked(q, k, v, offsets, max_seqlen, scale, features if features.any else PLAIN, tiles)


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, scale: float, *_
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


def _check_features(q: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, features: Features) -> None:
    tokens, heads, dim = q.shape
    if features.left < UNLIMITED or features.right < UNLIMITED:
        raise ValueError(f"a window reaches 0 tokens or more to each side, or -1 for all, got {features[:2]}")
    if features.softcap is not None and not features.softcap > 0:
        raise ValueError(f"softcap must be positive, got {features.softcap}")
    if features.cos is not None:
        shapes = tuple(features.cos.shape), tuple(features.sin.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != tokens or not 0 < 2 * shapes[0][1] <= dim:
            raise ValueError(f"rope's cos and sin must be [{tokens}, r / 2] with r from 2 to {dim}, got {shapes}")
    relative = features.relative_bias
    if relative is not None and (relative.dim() != 2 or relative.shape[0] != heads or relative.shape[1] % 2 == 0):
        raise ValueError(f"relative_bias must be [{heads}, 2R - 1], got {tuple(relative.shape)}")
    if features.bias is not None:
        shape = tuple(features.bias.shape)
        fits = len(shape) == 4 and shape[0] in (1, offsets.shape[0] - 1) and shape[1] in (1, heads)
        if not fits or min(shape[2:]) < max_seqlen:
            raise ValueError(
                f"bias must be [{offsets.shape[0] - 1} or 1, {heads} or 1, S, S] with S >= {max_seqlen}, got {shape}"
            )
    if not (features.c2p is features.p2c is features.columns is None):
        _check_disentangled(q, features)
    if not (features.rel_h is features.rel_w is None):
        _check_decomposed(q, max_seqlen, features)


def _check_disentangled(q: torch.Tensor, features: Features) -> None:
    given = [x for x in (features.c2p, features.p2c) if x is not None]
    shapes = [tuple(x.shape) for x in given]
    if not given or any(len(s) != 3 or s != (*q.shape[:2], shapes[0][2]) or not s[2] for s in shapes):
        raise ValueError(
            f"disentangled's c2p and p2c must be [{q.shape[0]}, {q.shape[1]}, P], or one of them None, got {shapes}"
        )
    columns = features.columns
    if columns is None or columns.dim() != 1 or columns.dtype != torch.int32 or columns.shape[0] % 2 == 0:
        got = None if columns is None else (columns.dtype, tuple(columns.shape))
        raise ValueError(f"disentangled's columns must be int32 [2R - 1], got {got}")


def _check_decomposed(q: torch.Tensor, max_seqlen: int, features: Features) -> None:
    shapes = [None if x is None else tuple(x.shape) for x in (features.rel_h, features.rel_w)]
    if any(s is None or len(s) != 3 or s[:2] != q.shape[:2] for s in shapes):
        raise ValueError(
            f"decomposed's rel_h and rel_w must be [{q.shape[0]}, {q.shape[1]}, Kh] and [.., Kw], got {shapes}"
        )
    if shapes[0][2] * shapes[1][2] < max_seqlen:
        raise ValueError(f"decomposed's grid of {shapes[0][2]} x {shapes[1][2]} has less than {max_seqlen} tokens")


register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, SymInt max_seqlen, float scale, int left=-1, "
    "int right=-1, float? softcap=None, Tensor? cos=None, Tensor? sin=None, bool interleaved=False, "
    "Tensor? relative_bias=None, Tensor? bias=None, Tensor? c2p=None, Tensor? p2c=None, Tensor? columns=None, "
    "Tensor? rel_h=None, Tensor? rel_w=None, Tensor? tiles=None) -> Tensor",
    _run,
    _fake,
)
