"""The position terms of ``varlen_attention`` against the attention of DeBERTa as transformers computes it."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import NATIVE, implementation
from varlen_attention_testing import offsets_of

from fastencoder.kernels import varlen_attention

HEADS, DIM = 3, 16
LENGTHS = [40, 1, 23]


def perturbed(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return module.double().eval()


def heads(x):
    return x.unflatten(-1, (HEADS, DIM))


def products(x, positions):
    """``[T, H, d]``, ``[P, H, d]`` -> ``[T, H, P]``."""
    return (x.transpose(0, 1) @ positions.permute(1, 2, 0)).transpose(0, 1)


def columns_of(bucket, span, reach):
    """The column of every distance, query minus key, from ``1 - reach`` to ``reach - 1``."""
    return (bucket(torch.arange(1 - reach, reach)).long() + span).clamp(0, 2 * span - 1).int()


def ours(name, q, k, v, scale, c2p, p2c, columns):
    offsets = offsets_of(LENGTHS, "cpu")
    with implementation(name):
        return varlen_attention(q, k, v, offsets, max(LENGTHS), scale, disentangled=(c2p, p2c, columns)).flatten(1)


def stock(attention, hidden, **arguments):
    """The module on every sequence alone, padded to the longest one."""
    longest, out = max(LENGTHS), []
    for x in hidden.split(LENGTHS):
        padded = torch.nn.functional.pad(x, (0, 0, 0, longest - len(x)), value=0.7)
        keep = torch.arange(longest) < len(x)
        mask = (keep[:, None] & keep)[None, None]
        out.append(attention(padded[None], mask, **arguments)[0][0, : len(x)])
    return torch.cat(out)


@pytest.mark.parametrize("name", ["reference", "cpu", *NATIVE])
@pytest.mark.parametrize("kinds", [["c2p", "p2c"], ["p2c"], ["c2p"]])
@pytest.mark.parametrize("buckets, longest", [(-1, 64), (-1, 9), (8, 32), (8, 12), (6, 512)])
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_deberta_v2(name, kinds, buckets, longest, shared):
    """With logarithmic buckets and without, and with distances beyond the last position."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

    config = deberta.DebertaV2Config(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, relative_attention=True, pos_att_type=kinds,
        position_buckets=buckets, max_relative_positions=longest, share_att_key=shared,
    )  # fmt: skip
    attention = perturbed(deberta.DisentangledSelfAttention(config))
    span = buckets if buckets > 0 else longest
    table = torch.randn(2 * span, HEADS * DIM, dtype=torch.float64)
    hidden = torch.randn(sum(LENGTHS), HEADS * DIM, dtype=torch.float64)
    square = torch.empty(1, max(LENGTHS), 1)
    relative = deberta.build_relative_position(square, square, buckets, longest)
    expected = stock(attention, hidden, relative_pos=relative, rel_embeddings=table)

    def bucket(distance):
        return deberta.make_log_bucket_position(distance, buckets, longest) if buckets > 0 else distance

    q, k, v = (heads(p(hidden)) for p in (attention.query_proj, attention.key_proj, attention.value_proj))
    scale = (DIM * (1 + len(kinds))) ** -0.5
    key = attention.key_proj if shared else getattr(attention, "pos_key_proj", None)
    query = attention.query_proj if shared else getattr(attention, "pos_query_proj", None)
    c2p = products(q, heads(key(table)) * scale) if "c2p" in kinds else None
    p2c = products(k, heads(query(table)) * scale) if "p2c" in kinds else None
    out = ours(name, q, k, v, scale, c2p, p2c, columns_of(bucket, span, max(LENGTHS)))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", "cpu", *NATIVE])
@pytest.mark.parametrize("kinds", [["c2p", "p2c"], ["p2c"], ["c2p"]])
@pytest.mark.parametrize("longest", [64, 9])
@torch.no_grad()
def test_deberta(name, kinds, longest):
    """Its positions are cut to the padded length, which changes nothing, or to the longest distance that it knows."""
    from transformers.models.deberta import modeling_deberta as deberta

    config = deberta.DebertaConfig(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, relative_attention=True, pos_att_type=kinds,
        max_relative_positions=longest,
    )  # fmt: skip
    attention = perturbed(deberta.DisentangledSelfAttention(config))
    table = torch.randn(2 * longest, HEADS * DIM, dtype=torch.float64)
    hidden = torch.randn(sum(LENGTHS), HEADS * DIM, dtype=torch.float64)
    square = torch.empty(1, max(LENGTHS), 1)
    relative = deberta.build_relative_position(square, square)
    expected = stock(attention, hidden, relative_pos=relative, rel_embeddings=table)

    q, k, v = attention.in_proj(hidden).unflatten(-1, (HEADS, 3 * DIM)).split(DIM, dim=-1)
    q, v = q + heads(attention.q_bias), v + heads(attention.v_bias)
    scale = (DIM * (1 + len(kinds))) ** -0.5
    c2p = products(q, heads(attention.pos_proj(table)) * scale) if "c2p" in kinds else None
    p2c = products(k, heads(attention.pos_q_proj(table)) * scale) if "p2c" in kinds else None
    out = ours(name, q, k, v, scale, c2p, p2c, columns_of(lambda distance: distance, longest, max(LENGTHS)))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
