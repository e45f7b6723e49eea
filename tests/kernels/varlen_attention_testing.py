"""Attention in float64 from its definition, one query at a time, with a bound of the error; and random ragged batches."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from kernel_testing import assert_within, implementation, random, rounding

from fastencoder.kernels import varlen_attention


def offsets_of(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def qkv_of(lengths, heads, dim, dtype, device, seed=0):
    """Views of one packed buffer; scores of a few units, so that the softmax is neither flat nor a single one."""
    buffer = random(seed, sum(lengths), 3, heads, dim, dtype=dtype, device=device)
    return buffer.unbind(1)


def disentangled_of(names, tokens, heads, reach, width, dtype, device):
    """Products of positions under these names, in the layout that a batched product makes, and a table without order."""
    products = {
        name: random(seed, heads, tokens, width, dtype=dtype, device=device).transpose(0, 1)
        for seed, name in ((11, "c2p"), (12, "p2c"))
    }
    columns = torch.randint(0, width, (2 * reach - 1,), generator=torch.Generator().manual_seed(13), dtype=torch.int32)
    return products["c2p"] if "c2p" in names else None, products["p2c"] if "p2c" in names else None, columns.to(device)


def decomposed_of(longest, tokens, heads, width, dtype, device):
    """Products for a grid of this width that holds at least as many tokens; one of them in an odd layout."""
    rel_h = random(14, tokens, heads, longest // width + 1, dtype=dtype, device=device)
    return rel_h, random(15, heads, tokens, width, dtype=dtype, device=device).transpose(0, 1)


def ragged_lengths(longest):
    """Empty sequences, single tokens, one long sequence among short ones, equal lengths."""
    one_long = st.tuples(st.lists(st.integers(0, 3), max_size=4), st.integers(longest // 2, longest)).map(
        lambda parts: [*parts[0][:2], parts[1], *parts[0][2:]]
    )
    equal = st.tuples(st.integers(1, longest // 2), st.integers(1, 3)).map(lambda parts: [parts[0]] * parts[1])
    return st.one_of(st.lists(st.integers(0, longest // 2), max_size=5), one_long, equal)


def _turned(x, rope):
    """Each pair of dimensions as a complex number, turned; and a bound of what the rounding sees of it."""
    if rope is None:
        return x, x.abs()
    cos, sin, interleaved = rope
    half = cos.shape[1]
    turn = torch.complex(cos.double().cpu(), sin.double().cpu())[:, None]
    first, second = torch.arange(half) * 2, torch.arange(half) * 2 + 1
    if not interleaved:
        first, second = torch.arange(half), torch.arange(half) + half
    turned = torch.complex(x[..., first].contiguous(), x[..., second].contiguous()) * turn
    out, size = x.clone(), x.abs()
    out[..., first], out[..., second] = turned.real, turned.imag
    size[..., first] = size[..., second] = (x[..., first].abs() + x[..., second].abs()).contiguous()
    return out, size


def _position_terms(disentangled, start, head, i, j):
    """What every distance between a query and a key adds: one number from the query's row, one from the key's."""
    c2p, p2c, columns = disentangled
    reach = (len(columns) - 1) // 2
    column = columns.cpu()[(i - j).clamp(-reach, reach) + reach].long()
    c2p, p2c = (torch.zeros(()) if x is None else x.double().cpu()[:, head] for x in (c2p, p2c))
    of_query = c2p[start + i, column] if c2p.dim() else c2p
    of_key = p2c[start + j, column] if p2c.dim() else p2c
    return of_query + of_key, of_query.abs() + of_key.abs()


def expected_of(
    q, k, v, lengths, scale, causal=False, window=None, softcap=None, rope=None, relative_bias=None, bias=None,
    disentangled=None, decomposed=None,
):  # fmt: skip
    """Result and error bound in float64, written without softmax and one head at a time."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    (q, q_size), (k, k_size) = _turned(q, rope), _turned(k, rope)
    group = q.shape[1] // k.shape[1]
    left, right = (10**9 if side in (None, -1) else side for side in window or (None, None))
    right = 0 if causal else right
    out, spread = torch.zeros_like(q), torch.zeros_like(q)
    start = 0
    for sequence, length in enumerate(lengths):
        i, j = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
        for head in range(q.shape[1]) if length else ():
            rows, key_head = slice(start, start + length), head // group
            scores = q[rows, head] @ k[rows, key_head].T * scale
            sizes = q_size[rows, head] @ k_size[rows, key_head].T * scale + 1
            if softcap is not None:
                scores, sizes = softcap * torch.tanh(scores / softcap), sizes + softcap
            added = torch.zeros_like(scores)
            if relative_bias is not None:
                reach = (relative_bias.shape[1] - 1) // 2
                added += relative_bias.double().cpu()[head][(j - i).clamp(-reach, reach) + reach]
            if bias is not None:
                dense = bias.double().cpu()
                added += dense[sequence % dense.shape[0], head % dense.shape[1], :length, :length]
            if disentangled is not None:
                terms, size = _position_terms(disentangled, start, head, i, j)
                added, sizes = added + terms, sizes + size
            if decomposed is not None:
                rel_h, rel_w = (x.double().cpu()[rows, head] for x in decomposed)
                grid = rel_h[:, :, None] + rel_w[:, None, :]  # [length, Kh, Kw]
                added = added + grid.flatten(1)[:, :length]
                sizes = sizes + (rel_h.abs()[:, :, None] + rel_w.abs()[:, None, :]).flatten(1)[:, :length]
            scores = scores + added
            sizes = sizes + added.abs().nan_to_num(posinf=0, neginf=0)
            scores[(j < i - left) | (j > i + right)] = -torch.inf
            highest = scores.amax(1, keepdim=True)
            weights = torch.exp(scores - highest.clamp(min=torch.finfo(torch.float64).min))
            weights /= weights.sum(1, keepdim=True).clamp(min=1e-300)  # a query that sees nothing has the result zero
            out[rows, head] = weights @ v[rows, key_head]
            spread[rows, head] = (weights * sizes) @ v[rows, key_head].abs()
        start += length
    return out, spread


def bound_of(dtype, spread, features):
    bound = 16 * torch.finfo(torch.float32).eps * spread + 1e-37
    if dtype != torch.float32:
        bound = bound + (4 if features.get("rope") else 2) * rounding(dtype) * spread
    return bound


def check(name, q, k, v, lengths, scale, max_seqlen=None, tiles=None, **features):
    """Compare one call of an implementation with the definition, and return its result."""
    offsets = offsets_of(lengths, q.device)
    with implementation(name):
        out = varlen_attention(q, k, v, offsets, max_seqlen or max(lengths, default=0), scale, tiles=tiles, **features)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    expected, spread = expected_of(q, k, v, lengths, scale, **features)
    assert_within(out, expected, bound_of(q.dtype, spread, features))
    return out
