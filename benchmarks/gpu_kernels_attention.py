"""Rows of varlen_attention: lengths, head sizes, strided views, and each of its features, alone and together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import DTYPES
from benchmarks.gpu_judge import absent, compare, find, normal, not_available
from benchmarks.store import Row

RAGGED = (0, 1, 17, 64, 0, 128, 127, 63, 2, 0)
LONG = (700, 0, 1, 512, 257)
DENSE = (128, 128, 128, 128)


@dataclass(frozen=True)
class Case:
    """What attention is called with; the tensors are made when the row runs."""

    dim: int
    lengths: tuple[int, ...]
    heads: int = 4
    key_heads: int = 4
    spread: float = 1.0  # of the scores
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    rope: tuple[int, bool] | None = None  # how many dimensions rotate, and whether pairs are interleaved
    relative: int | None = None  # distances from -(R - 1) to R - 1
    bias: bool = False
    tiles: bool = False

    @property
    def name(self) -> str:
        """As in the tables."""
        words = [f"d={self.dim} heads={self.heads}/{self.key_heads} lengths={','.join(map(str, self.lengths))}"]
        words += [f"scores x{self.spread:g}"] * (self.spread != 1)
        words += [
            f"{name}={str(value).replace(' ', '')}" if value is not True else name
            for name in ("causal", "window", "softcap", "rope", "relative", "bias", "tiles")
            if (value := getattr(self, name))
        ]
        return " ".join(words)


def cases() -> list[Case]:
    """Each of them in every dtype."""
    dims = (32, 64, 72, 80, 128)
    plain = [Case(dim, lengths) for dim in dims for lengths in (RAGGED, LONG)]
    plain += [Case(64, RAGGED, 8, 2), Case(64, LONG, 8, 1), Case(64, DENSE, 12, 12), Case(64, (1,)), Case(64, (0, 0))]
    plain += [Case(64, (9, 0, 31, 16)), Case(16, RAGGED), Case(256, RAGGED, 2, 2)]
    plain += [Case(64, RAGGED, spread=8.0), Case(64, LONG, spread=8.0)]  # softmax close to one-hot
    features = [
        Case(64, LONG, causal=True),
        Case(80, RAGGED, causal=True),
        Case(64, LONG, window=(64, 64)),
        Case(64, RAGGED, window=(5, 5)),
        Case(72, LONG, window=(100, 0)),
        Case(64, RAGGED, window=(0, -1)),
        Case(64, LONG, softcap=5.0),
        Case(64, RAGGED, rope=(64, False)),
        Case(64, LONG, rope=(32, False)),
        Case(80, RAGGED, rope=(80, True)),
        Case(128, LONG, 8, 2, rope=(128, False)),
        Case(64, LONG, relative=128),
        Case(64, RAGGED, relative=9),
        Case(64, (130, 0, 1, 97), bias=True),
        Case(64, RAGGED, 12, 12, tiles=True),
        Case(64, LONG, tiles=True),
        Case(64, LONG, 8, 2, causal=True, window=(200, -1), softcap=10.0, rope=(64, False)),
        Case(72, RAGGED, window=(40, 40), rope=(72, False), tiles=True),
        Case(64, LONG, causal=True, relative=64, tiles=True),
    ]
    return plain + features


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """All rows; a dry run shortens the sequences and leaves every second plain case out."""
    chosen = cases()
    if quick:
        shortened = [
            replace(
                case,
                lengths=tuple(min(n, 20) for n in case.lengths),
                window=case.window and tuple(min(side, 5) for side in case.window),
            )
            for case in chosen
        ]
        chosen = list(dict.fromkeys(shortened[:20:2] + shortened[20:]))
    for dtype, case in product(DTYPES, chosen):

        def run(dtype=DTYPES[dtype], case=case):
            return _check(case, dtype, device)

        yield Row(f"varlen_attention {dtype} {case.name}", run)


def _check(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    if why := absent("varlen_attention", *_features(case)):
        return not_available(why)
    tokens, longest = sum(case.lengths), max(case.lengths)
    offsets = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(torch.int32)
    # One buffer, as a fused projection of queries, keys and values leaves it.
    buffer = normal(1, tokens, case.heads + 2 * case.key_heads, case.dim, dtype=dtype, device=device)
    q, k, v = buffer.split([case.heads, case.key_heads, case.key_heads], dim=1)
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    if case.rope:
        rotated, interleaved = case.rope
        places = torch.cat([torch.arange(n, device=device) for n in case.lengths])
        angles = places[:, None] * 10_000.0 ** -(torch.arange(0, rotated, 2, device=device) / rotated)
        options["rope"] = (angles.cos().to(dtype), angles.sin().to(dtype), interleaved)
    if case.relative:
        shape = (case.heads, 2 * case.relative - 1)
        options["relative_bias"] = normal(2, *shape, dtype=dtype, device=device)
    if case.bias:
        shape = (len(case.lengths), case.heads, longest, longest)
        options["bias"] = normal(3, *shape, dtype=dtype, device=device)
    if case.tiles:
        listed = find("tile_list")(case.lengths, find("query_block")(case.dim, dtype, longest, device))
        spare = torch.tensor([[case.lengths.index(0), 0]], dtype=torch.int32).repeat(3, 1)  # of an empty sequence
        options["tiles"] = torch.cat([listed, spare]).to(device)
    arguments = (q, k, v, offsets, longest, case.spread * case.dim**-0.5)
    return compare("varlen_attention", arguments, attention, attention, device, options)


def _features(case: Case) -> list[str]:
    names = {"causal": case.causal, "window": case.window, "softcap": case.softcap, "rope": case.rope}
    names |= {"relative_bias": case.relative, "bias": case.bias, "tiles": case.tiles}
    return [name for name, value in names.items() if value]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    rope: tuple[torch.Tensor, torch.Tensor, bool] | None = None,
    relative_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a stock model computes, in the dtype of `q`: sdpa where it can, else eager attention; one sequence at a time."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    bounds = offsets.tolist()
    eager = softcap is not None or relative_bias is not None or bias is not None
    for index, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == end:
            continue
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))  # [H, s, d]
        if rope is not None:
            cos, sin, interleaved = rope
            query, key = (rotate(x, cos[start:end], sin[start:end], interleaved) for x in (query, key))
        visible = visible_keys(end - start, causal, window, q.device)
        if not eager:
            mixed = F.scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )[0]
        else:
            key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (key, value))
            scores = query @ key.transpose(1, 2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if relative_bias is not None:
                places, reach = torch.arange(end - start, device=q.device), relative_bias.shape[1] // 2
                distance = (places[None] - places[:, None]).clamp(-reach, reach) + reach
                scores = scores + relative_bias[:, distance]
            if bias is not None:
                scores = scores + bias[index % bias.shape[0], :, : end - start, : end - start]
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
            mixed = scores.softmax(-1) @ value
        out[start:end] = mixed.transpose(0, 1)
    return out


def visible_keys(
    length: int, causal: bool, window: tuple[int, int] | None, device: torch.device
) -> torch.Tensor | None:
    """`[s, s]`, True where query i sees key j; None if everything is seen."""
    if not causal and window is None:
        return None
    places = torch.arange(length, device=device)
    ahead = places[None] - places[:, None]
    left, right = (length if side is None or side < 0 else side for side in window or (None, None))
    return (ahead >= -left) & (ahead <= (0 if causal else right))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of the first `2 cos.shape[1]` dimensions of `[H, s, d]`."""
    rotated, rest = x[..., : 2 * cos.shape[1]], x[..., 2 * cos.shape[1] :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1)
