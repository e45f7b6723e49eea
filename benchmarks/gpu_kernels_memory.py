"""Rows of the operations that only move memory: add_norm, embed_norm, pack and unpack, and what reads a mask."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.common import DTYPES
from benchmarks.gpu_judge import compare, normal
from benchmarks.store import Row


def add_norm(x, residual, weight, bias, eps, scale, x_bias=None, rms=False):
    """What a stock model computes; partial sums are added up in their own precision first."""
    result = weight.dtype if x.dim() == 3 else x.dtype
    total = x.sum(0) if x.dim() == 3 else x
    if x_bias is not None:
        total = total + x_bias
    total = total.to(result)
    total = total if scale is None else total * scale
    total = total if residual is None else residual + total
    if rms:
        normed = F.rms_norm(total, total.shape[-1:], weight, eps)
        return normed if bias is None else normed + bias, total
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def add_norm_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Widths, what is added, rows whose mean is far larger than their spread, partial sums, and RMSNorm."""
    # tokens, width, residual, bias, scale, mean, partial sums (0: none), x_bias, rms
    plain = (0, False, False)
    cases = [(37, dim, True, True, False, 0.0, *plain) for dim in (48, 312, 384, 768, 1000, 1024, 1280, 4096)]
    cases += [(t, 768, True, True, False, 0.0, *plain) for t in (0, 1, 4096)]
    cases += [(37, 768, r, b, s, 0.0, *plain) for r, b, s in product((False, True), repeat=3)]
    cases += [(37, 768, True, True, False, 300.0, *plain), (37, 1000, False, True, True, 300.0, *plain)]
    cases += [(t, d, True, True, False, 0.0, p, True, False) for t, d, p in ((1, 768, 4), (37, 1000, 3), (128, 1024, 8))]
    cases += [(37, 768, False, True, True, 0.0, 2, True, False), (16, 768, True, True, False, 0.0, 1, False, False)]
    cases += [(37, 768, True, True, False, 0.0, 0, True, False), (0, 768, True, True, False, 0.0, 2, True, False)]
    cases += [(37, d, r, b, False, 0.0, 0, False, True) for d, r, b in ((768, True, False), (1000, False, True))]
    cases += [(37, 1024, True, False, True, 0.0, 4, True, True), (37, 768, True, False, False, 300.0, *plain[:2], True)]
    if quick:
        cases = [(min(t, 5), min(d, 64), *rest) for t, d, *rest in cases[8:]]
    for dtype, case in product(DTYPES, dict.fromkeys(cases)):
        tokens, dim, residual, bias, scale, mean, parts, x_bias, rms = case
        extras = [" residual" * residual, " bias" * bias, " scale" * scale, f" mean={mean:g}" * bool(mean)]
        extras += [f" partial={parts}" * bool(parts), " x_bias" * x_bias, " rms" * rms]
        name = f"add_norm {dtype} {tokens}x{dim}{''.join(extras)}"

        def run(dtype=DTYPES[dtype], case=case):
            t, dim, residual, bias, scale, mean, parts, x_bias, rms = case

            def make(seed, *shape):
                return normal(seed, *shape, dtype=dtype, device=device)

            if parts:
                x = normal(1, parts, t, dim, dtype=torch.float32, device=device) + mean
            else:
                x = (make(1, t, dim) + mean).to(dtype)
            arguments = (
                x,
                make(2, t, dim) if residual else None,
                1 + 0.4 * make(3, dim),
                make(4, dim) if bias else None,
                0.3,  # far from 0, so that a dropped eps shows
                1 + 0.5 * make(5, dim) if scale else None,
            )
            options = {"x_bias": make(6, dim) if x_bias else None, "rms": rms}
            return compare("add_norm", arguments, add_norm, add_norm, device, options)

        yield Row(name, run)


def pack(hidden, indices):
    return hidden.flatten(0, 1)[indices.long()]


def unpack(values, indices, batch, seqlen):
    padded = values.new_zeros(batch * seqlen, values.shape[1])
    padded[indices.long()] = values
    return padded.view(batch, seqlen, -1)


def pack_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Holes anywhere, no token at all, no padding; both index types. Torch moves rows exactly, and so must we."""
    cases = [(5, 37, 48, 0.5), (32, 128, 768, 0.7), (1, 1, 80, 0.0), (3, 20, 64, 1.0), (4, 512, 1024, 0.25), (7, 9, 33, 0.0)]
    if quick:
        cases = [(b, min(s, 20), min(d, 48), share) for b, s, d, share in cases]
    for dtype, index, (batch, seqlen, dim, share) in product(DTYPES, (torch.int64, torch.int32), cases):
        for operation in ("pack", "unpack"):
            name = f"{operation} {dtype} {str(index)[6:]} {batch}x{seqlen}x{dim} padding={share:g}"

            def run(op=operation, dtype=DTYPES[dtype], index=index, b=batch, s=seqlen, d=dim, share=share):
                real = _real(b, s, share).flatten()
                indices = real.nonzero().flatten().to(device=device, dtype=index)
                if op == "pack":
                    hidden = normal(1, b, s, d, dtype=dtype, device=device)
                    hidden.view(b * s, d)[~real.to(device)] = float("nan")  # padding is never read
                    return compare("pack", (hidden, indices), pack, pack, device, same_bits=True)
                values = normal(1, len(indices), d, dtype=dtype, device=device)
                return compare("unpack", (values, indices, b, s), unpack, unpack, device, same_bits=True)

            yield Row(name, run)


def _real(batch: int, seqlen: int, share: float) -> torch.Tensor:
    return torch.rand(batch, seqlen, generator=torch.Generator().manual_seed(7)) >= share


def token_positions(tokens, offsets, count):
    return tokens.flatten().nonzero().flatten().to(torch.int32)


def padding_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Masks of every form that reaches a layer, and the positions of the real tokens."""
    forms = ("tokens", "padding", "bool expanded", "bool materialised", "additive", "a bias", "differs")
    shapes = [(5, 37, 0.5), (32, 128, 0.7), (1, 1, 0.0), (3, 20, 1.0), (128, 512, 0.5), (7, 1000, 0.1)]
    if quick:
        shapes = [(min(b, 5), min(s, 20), share) for b, s, share in shapes]
    for form, (batch, seqlen, share) in product(forms, dict.fromkeys(shapes)):
        if form == "differs" and seqlen == 1:
            continue

        def run(form=form, batch=batch, seqlen=seqlen, share=share):
            real = _real(batch, seqlen, share).to(device)
            mask, marks = _mask(form, real), "padding" if form == "padding" else "tokens"
            counts = real.sum(1, dtype=torch.int32)

            def plain(*_):
                return real, counts

            def outputs(found):  # where the mask is no padding, the summary's least entry says so, and nothing else counts
                tokens, summary = found
                if form in ("a bias", "differs"):
                    refused = torch.full_like(counts, -1 if form == "a bias" else -2)
                    return real, torch.where(summary.min() == refused[0], counts, summary - 100)
                return tokens, summary

            arguments = (mask, batch, seqlen, marks)
            return compare("read_mask", arguments, plain, plain, device, same_bits=True, outputs=outputs)

        yield Row(f"read_mask {form} {batch}x{seqlen} padding={share:g}", run)
    for batch, seqlen, share in dict.fromkeys(shapes):

        def positions(batch=batch, seqlen=seqlen, share=share):
            real = _real(batch, seqlen, share).to(device)
            offsets = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
            arguments = (real, offsets, int(real.sum()))
            return compare("token_positions", arguments, token_positions, token_positions, device, same_bits=True)

        yield Row(f"token_positions {batch}x{seqlen} padding={share:g}", positions)


def _mask(form: str, real: torch.Tensor) -> torch.Tensor:
    """A mask in one of its forms; `real` is `[B, S]`."""
    batch, seqlen = real.shape
    if form in ("tokens", "padding"):
        return (real if form == "tokens" else ~real).long()
    rows = real[:, None, None]
    if form == "bool expanded":
        return rows.expand(batch, 1, seqlen, seqlen)
    full = rows.expand(batch, 1, seqlen, seqlen).clone()
    if form == "bool materialised":
        return full
    if form == "differs":
        full[-1, 0, -1, 0] ^= True
        return full
    additive = torch.where(rows, 0.0, torch.finfo(torch.float32).min)
    if form == "a bias":
        additive[-1, 0, 0, -1] = -3.0
    return additive


def embed_norm(
    ids, table, weight, bias, eps, position_ids=None, position_table=None, type_ids=None, type_table=None
):
    """What a stock model computes, in the order of BERT's code."""
    total = table[ids.long()]
    if type_table is not None:
        total = total + type_table[type_ids.long()]
    if position_table is not None:
        total = total + position_table[position_ids.long()]
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def embed_norm_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Widths, with and without positions and types, both index types."""
    cases = [(37, dim, True, True, True, torch.int64) for dim in (48, 384, 768, 1000, 1024)]
    cases += [(t, 768, True, True, True, torch.int64) for t in (0, 1, 4096)]
    cases += [(37, 768, p, t, b, torch.int32) for p, t, b in product((False, True), repeat=3)]
    if quick:
        cases = [(min(t, 5), min(d, 64), *rest) for t, d, *rest in cases[3:]]
    for dtype, (tokens, dim, positions, types, bias, index) in product(DTYPES, dict.fromkeys(cases)):
        extras = "".join([" positions" * positions, " types" * types, " bias" * bias])
        name = f"embed_norm {dtype} {str(index)[6:]} {tokens}x{dim}{extras}"

        def run(dtype=DTYPES[dtype], t=tokens, dim=dim, positions=positions, types=types, bias=bias, index=index):
            def make(seed, *shape):
                return normal(seed, *shape, dtype=dtype, device=device)

            def chosen(seed, below):
                generator = torch.Generator().manual_seed(seed)
                return torch.randint(below, (t,), generator=generator).to(device=device, dtype=index)

            arguments = (chosen(1, 1000), make(2, 1000, dim), 1 + 0.4 * make(3, dim), make(4, dim) if bias else None, 0.3)
            options = {
                "position_ids": chosen(5, 512) if positions else None,
                "position_table": make(6, 512, dim) if positions else None,
                "type_ids": chosen(7, 2) if types else None,
                "type_table": make(8, 2, dim) if types else None,
            }
            return compare("embed_norm", arguments, embed_norm, embed_norm, device, options)

        yield Row(name, run)
