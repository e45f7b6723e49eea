"""``pack`` and ``unpack`` move rows: everything is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import IMPLEMENTATIONS, device_of, random

from fastencoder.kernels import implementation, pack, unpack

masks = st.tuples(st.integers(0, 5), st.integers(1, 9)).flatmap(
    lambda shape: st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None)
@given(rows=masks, dim=st.sampled_from([1, 37, 64, 72]), wide_indices=st.booleans())
@example(rows=[[False, False], [False, False]], dim=8, wide_indices=False)
@example(rows=[[True, True, True]], dim=8, wide_indices=True)
@example(rows=[[False, True, False, True], [False] * 4, [True] * 4], dim=1, wide_indices=False)
def test_any_mask(name, rows, dim, wide_indices):
    """Padding is NaN and must not be read; positions without a token must be zero."""
    device = device_of(name)
    mask = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), -1 if rows else 3)
    batch, seqlen = mask.shape
    hidden = random(0, batch, seqlen, dim, dtype=torch.float32, device="cpu")
    padded = hidden.masked_fill(~mask[:, :, None], float("nan")).to(device)
    indices = mask.flatten().nonzero().flatten().to(torch.int64 if wide_indices else torch.int32).to(device)
    with implementation(name):
        values = pack(padded, indices)
        back = unpack(values, indices, batch, seqlen)
    assert torch.equal(values.cpu(), hidden[mask])
    assert torch.equal(back.cpu(), hidden.masked_fill(~mask[:, :, None], 0.0))
    assert back.is_contiguous()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(0, 100),
    padding=st.integers(0, 100),
    seed=st.integers(0, 1000),
)
@example(tokens=32, padding=1, seed=0)
@example(tokens=33, padding=40, seed=0)
@example(tokens=1055, padding=30, seed=0)
@example(tokens=1057, padding=50, seed=0)
def test_every_position_finds_its_token(name, tokens, padding, seed):
    """Around the numbers of tokens at which the search takes a step more (32, 1055), and in between."""
    device = device_of(name)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(tokens + padding, generator=generator)[:tokens].sort().values.int()
    values = torch.arange(1.0, tokens + 1)[:, None]
    with implementation(name):
        back = unpack(values.to(device), indices.to(device), 1, tokens + padding)
    expected = torch.zeros(tokens + padding, 1)
    expected[indices.long()] = values
    assert torch.equal(back[0].cpu(), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [760, 1500])
def test_wide_rows_and_dtypes(name, dtype, dim):
    device = device_of(name)
    hidden = random(0, 3, 20, dim, dtype=dtype, device=device)
    indices = torch.cat([torch.arange(0, 20), torch.arange(25, 26), torch.arange(40, 57)]).int().to(device)
    with implementation(name):
        values = pack(hidden, indices)
        back = unpack(values, indices, 3, 20)
    expected = hidden.reshape(60, dim)[indices.long()]
    assert torch.equal(values, expected)
    rest = torch.ones(60, dtype=torch.bool, device=device)
    rest[indices.long()] = False
    assert torch.equal(back.view(60, dim)[indices.long()], expected)
    assert not back.view(60, dim)[rest].any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_inputs(name):
    """A transposed hidden state, and values that are columns of something wider."""
    device = device_of(name)
    hidden = random(0, 7, 4, 24, dtype=torch.float32, device=device).transpose(0, 1)
    indices = torch.tensor([0, 1, 8, 13, 27], device=device)
    expected = hidden.contiguous().view(28, 24)[indices]
    wide = torch.full((5, 30), float("nan"), device=device)
    wide[:, 3:27] = expected
    with implementation(name):
        assert torch.equal(pack(hidden, indices), expected)
        assert torch.equal(unpack(wide[:, 3:27], indices, 4, 7).view(28, 24)[indices], expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_full_batch_is_copied(name):
    values = random(0, 6, 8, dtype=torch.float32, device=device_of(name))
    with implementation(name):
        back = unpack(values, torch.arange(6, device=values.device), 2, 3)
    assert back.data_ptr() != values.data_ptr()
    assert torch.equal(back.view(6, 8), values)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"hidden must be \[B, S, D\]"):
        pack(torch.zeros(2, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="indices must be int32 or int64"):
        pack(torch.zeros(1, 2, 3), torch.tensor([0.0]))
    with pytest.raises(ValueError, match="as many indices"):
        unpack(torch.zeros(2, 3), torch.tensor([0]), 1, 2)
