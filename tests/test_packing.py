"""Packed batches: masks in every form, and the way there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastencoder.packing import NotAPaddingMask, PackedBatch, key_padding_mask

masks = st.integers(1, 5).flatmap(
    lambda batch: st.integers(1, 9).flatmap(
        lambda seqlen: st.lists(
            st.lists(st.booleans(), min_size=seqlen, max_size=seqlen), min_size=batch, max_size=batch
        )
    )
)


@settings(max_examples=200, deadline=None)
@given(masks)
def test_pack_and_unpack_any_mask(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    hidden = torch.randn(*mask.shape, 3).masked_fill(~mask[..., None], float("nan"))
    batch = PackedBatch.from_padded(hidden, mask)
    assert torch.equal(batch.values, hidden[mask])
    assert batch.offsets.dtype == torch.int32 and batch.offsets.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert batch.max_seqlen == int(mask.sum(1).max())
    padded = batch.to_padded()
    assert padded.shape == hidden.shape
    assert torch.equal(padded[mask], hidden[mask]) and (padded[~mask] == 0).all()


@settings(max_examples=100, deadline=None)
@given(masks)
def test_every_form_of_a_padding_mask_is_the_same_mask(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    batch, seqlen = mask.shape
    square = mask[:, None, None, :].expand(batch, 1, seqlen, seqlen)
    forms = [mask, mask.long(), mask.to(torch.uint8), square, square.clone(), mask[:, None, None, :]]
    for dtype in (torch.float32, torch.bfloat16):
        for value in (torch.finfo(dtype).min, float("-inf"), -10000.0):
            zeros = torch.zeros(batch, 1, seqlen, seqlen, dtype=dtype)
            forms += [zeros.masked_fill(~square, value), zeros.masked_fill(~square, value)[:, :, :1]]
    for form in forms:
        assert torch.equal(key_padding_mask(form, batch, seqlen), mask)
    assert torch.equal(key_padding_mask(~mask, batch, seqlen, marks="padding"), mask)
    assert torch.equal(key_padding_mask((~mask).long(), batch, seqlen, marks="padding"), mask)


def test_no_mask() -> None:
    assert key_padding_mask(None, 2, 3) is None
    batch = PackedBatch.from_padded(torch.randn(2, 3, 4))
    assert batch.indices is None and batch.offsets.tolist() == [0, 3, 6]


def test_a_mask_for_all_rows_at_once() -> None:
    row = torch.tensor([True, True, False])
    assert torch.equal(key_padding_mask(row[None, None, None], 2, 3), row.expand(2, 3))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 4, dtype=torch.bool).tril()[None, None].expand(2, 1, 4, 4),  # causal
        torch.ones(2, 4, 4, dtype=torch.bool),  # 3-D
        torch.ones(2, 3, 4, 4, dtype=torch.bool),  # one per head
        torch.ones(2, 1, 4, 5, dtype=torch.bool),  # more keys than tokens
        torch.ones(2, 1, 2, 4, dtype=torch.bool),  # fewer queries than tokens
        torch.ones(2, 4),  # what does 1.0 mean?
        torch.full((2, 1, 1, 4), -1.0),  # a bias
        torch.full((2, 1, 1, 4), float("nan")),
        torch.full((2, 1, 1, 4), 1.0),  # a bias upwards
        torch.ones(2, 1, 1, 4, dtype=torch.long),
    ],
)
def test_other_masks_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(NotAPaddingMask):
        key_padding_mask(mask, 2, 4)


def test_nested_tensors_share_their_memory() -> None:
    batch = PackedBatch.from_padded(
        torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
    )
    nested = batch.to_nested()
    assert nested.values().data_ptr() == batch.values.data_ptr()
    assert [row.shape[0] for row in nested.unbind()] == [2, 5, 1]
    assert nested.to_padded_tensor(0.0).shape == (3, 5, 4)
    again = PackedBatch.from_nested(nested)
    assert again.values.data_ptr() == batch.values.data_ptr() and torch.equal(again.offsets, batch.offsets)
    assert again.max_seqlen == 5
    with pytest.raises(ValueError, match="no padded form"):
        again.to_padded()


@pytest.mark.parametrize("offsets", [[0, 3], [1, 7], [0, 5, 4, 7], [], [7]])
def test_offsets_must_cover_the_tokens(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="cumulative sequence lengths"):
        PackedBatch.from_offsets(torch.randn(7, 2), torch.tensor(offsets, dtype=torch.int32))
