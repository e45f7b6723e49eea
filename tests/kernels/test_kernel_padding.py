"""``read_mask`` and ``token_positions`` against a plain reading of the mask, entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import IMPLEMENTATIONS, device_of

from fastencoder.kernels import implementation
from fastencoder.kernels.padding import BIAS, DIFFERS, read_mask, token_positions, unreadable

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

masks = st.tuples(st.integers(0, 5), st.integers(0, 9)).flatmap(
    lambda shape: st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)
LEFT, RIGHT, HOLES, NONE = [False, False, True], [True, False, False], [True, False, True], [False] * 3


def tensor_of(rows: list[list[bool]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(rows[0]) if rows else 3)


def run(name, mask, batch, seqlen, marks="tokens"):
    with implementation(name):
        return read_mask(mask, batch, seqlen, marks)


def assert_reads(name, mask, expected: torch.Tensor, marks="tokens"):
    """``mask`` is key padding, with tokens where ``expected`` ``[B, S]`` says."""
    tokens, summary = run(name, mask, *expected.shape, marks)
    assert tokens.dtype == torch.bool and summary.dtype == torch.int32
    assert torch.equal(tokens.cpu(), expected)
    assert summary.tolist() == [sum(row) for row in expected.tolist()]


def additive(tokens: torch.Tensor, dtype: torch.dtype, value: float) -> torch.Tensor:
    return torch.zeros(tokens.shape, dtype=dtype).masked_fill(~tokens, value)


def forms(rows: torch.Tensor) -> list[torch.Tensor]:
    """``[B, 1, 1, S]``, for all queries as a view, for all queries in memory, and in memory of another order."""
    batch, seqlen = rows.shape
    square = rows[:, None, None, :].expand(batch, 1, seqlen, seqlen)
    return [rows[:, None, None, :], square, square.contiguous(), square.transpose(2, 3).contiguous().transpose(2, 3)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=5, deadline=None)
@given(rows=masks)
@example(rows=[LEFT, RIGHT, HOLES, NONE])
@example(rows=[])
@example(rows=[[], []])
def test_every_form_of_padding(name, rows):
    device = device_of(name)
    expected = tensor_of(rows)
    for dtype in INTEGERS:
        marks = expected.to(dtype) if dtype == torch.bool else expected.to(dtype) * 3
        assert_reads(name, marks.to(device), expected)
        assert_reads(name, (~expected).to(dtype).to(device), expected, marks="padding")
    for mask in forms(expected):
        assert_reads(name, mask.to(device), expected)
        assert_reads(name, mask.to(device), expected, marks="padding")  # which says nothing about a mask of queries


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=5, deadline=None)
@given(rows=masks, value=st.sampled_from([float("-inf"), -10000.0, -9500.0, None]))
@example(rows=[LEFT, RIGHT, HOLES, NONE], value=None)
@example(rows=[], value=-10000.0)
@example(rows=[[], []], value=-10000.0)
def test_every_additive_form_of_padding(name, dtype, rows, value):
    expected = tensor_of(rows)
    rows = additive(expected, dtype, torch.finfo(dtype).min if value is None else value)
    rows[expected] *= -1  # minus zero is zero
    for mask in forms(rows):
        assert_reads(name, mask.to(device_of(name)), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, *FLOATS])
def test_one_mask_for_all_sequences(name, dtype):
    row = torch.tensor([[True, True, False, True]])
    source = row if dtype == torch.bool else additive(row, dtype, -10000.0)
    for mask in forms(source):
        assert_reads(name, mask.to(device_of(name)), row.expand(3, 4))
        assert_reads(name, mask.to(device_of(name)).expand(3, -1, -1, -1), row.expand(3, 4))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_strided_marks(name, dtype):
    """Transposed, every second column, and the same row for everybody."""
    device = device_of(name)
    marks = (torch.arange(60).view(6, 10) % 7 < 4).to(dtype).to(device)
    for mask in (marks.T, marks[:, ::2], marks[1:2].expand(4, 10), marks[:, :1].expand(6, 5)):
        assert_reads(name, mask, mask.bool().cpu())


def square_masks(seqlen: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of two sequences, and a mask ``[2, 1, S, S]`` that says so to every query."""
    expected = torch.arange(seqlen).expand(2, -1) < torch.tensor([[seqlen], [3]])
    rows = expected if dtype == torch.bool else additive(expected, dtype, -10000.0)
    return expected, rows[:, None, None, :].expand(2, 1, seqlen, seqlen).contiguous()


def flipped(mask: torch.Tensor, sequence: int, query: int, key: int) -> torch.Tensor:
    """The mask with one entry changed from a token to padding, or back."""
    wrong = mask.clone()
    entry = wrong[sequence, 0, query, key]
    wrong[sequence, 0, query, key] = ~entry if mask.dtype == torch.bool else (-10000.0 if entry == 0 else 0.0)
    return wrong


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, *FLOATS])
@pytest.mark.parametrize("seqlen", [5, 16, 48])
def test_a_difference_between_queries_is_found_anywhere(name, dtype, seqlen):
    """One entry at a time; 16 and 48 are read in vectors."""
    device, last = device_of(name), seqlen - 1
    expected, mask = square_masks(seqlen, dtype)
    assert_reads(name, mask.to(device), expected)
    for place in [(0, 1, 0), (1, last, last), (1, seqlen // 2, 2), (0, last, 0), (1, 1, last)]:
        wrong = flipped(mask, *place)
        assert min(run(name, wrong.to(device), 2, seqlen)[1].tolist()) == DIFFERS, place
    for_all = wrong[1:].to(device)
    assert min(run(name, for_all, 4, seqlen)[1].tolist()) == DIFFERS
    apart = wrong.repeat_interleave(2, dim=3).to(device)[..., ::2]  # keys that are not next to one another
    assert min(run(name, apart, 2, seqlen)[1].tolist()) == DIFFERS
    unaligned = torch.cat([torch.zeros(1, dtype=dtype), wrong.flatten()]).to(device)[1:].view_as(wrong)
    assert min(run(name, unaligned, 2, seqlen)[1].tolist()) == DIFFERS


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("seqlen", [271, 272])
def test_a_difference_in_a_later_block(name, dtype, seqlen):
    _, mask = square_masks(seqlen, dtype)
    wrong = flipped(mask, 1, seqlen - 1, seqlen - 1)[1:].to(device_of(name))
    assert run(name, wrong, 1, seqlen)[1].tolist() == [DIFFERS]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [-1.0, 1.0, float("inf"), float("nan"), -8900.0, 1e-3])
@pytest.mark.parametrize("expanded", [False, True])
def test_a_bias_is_no_padding(name, dtype, value, expanded):
    for place in [(0, 0), (2, 6)]:
        mask = torch.zeros(3, 7, dtype=dtype)
        mask[1] = -10000.0
        mask[place] = value
        mask = mask[:, None, None, :].expand(3, 1, 7 if expanded else 1, 7)
        summary = run(name, mask.to(device_of(name)), 3, 7)[1]
        assert min(summary.tolist()) == BIAS


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_mask_that_differs_is_reported_before_a_bias(name):
    mask = torch.zeros(2, 1, 4, 4)
    mask[0] = 1.0
    mask[1, 0, 2, 2] = -10000.0
    assert min(run(name, mask.to(device_of(name)), 2, 4)[1].tolist()) == DIFFERS


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_long_rows(name):
    """More columns than a program takes at once."""
    device = device_of(name)
    expected = torch.rand(3, 2500, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.9], [0.1], [1.0]])
    assert_reads(name, expected.long().to(device), expected)
    assert_reads(name, additive(expected, torch.float16, float("-inf"))[:, None, None].to(device), expected)
    for key in (7, 2499):
        wrong = additive(expected, torch.float32, float("-inf"))
        wrong[1, key] = -5.0
        assert min(run(name, wrong[:, None, None].to(device), 3, 2500)[1].tolist()) == BIAS
    assert_positions(name, expected)


def assert_positions(name, tokens: torch.Tensor, view=lambda tokens: tokens):
    expected = [place for place, token in enumerate(tokens.flatten().tolist()) if token]
    offsets = torch.tensor([0, *tokens.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    device = device_of(name)
    with implementation(name):
        positions = token_positions(view(tokens.to(device)), offsets.to(device), len(expected))
    assert positions.dtype == torch.int32
    assert positions.tolist() == expected


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None)
@given(rows=masks)
@example(rows=[LEFT, RIGHT, HOLES, NONE])
@example(rows=[NONE, NONE])
@example(rows=[])
@example(rows=[[], []])
def test_positions(name, rows):
    assert_positions(name, tensor_of(rows))
    assert_positions(name, tensor_of(rows), view=lambda tokens: tokens.T.contiguous().T)


def test_wrong_offsets_write_nothing_elsewhere():
    """The result means nothing, but it is the only memory that is written."""
    from fastencoder.kernels.padding.triton_kernel import plan_positions

    memory = torch.full((12,), -7, dtype=torch.int32, device=device_of("triton"))
    tokens = torch.ones(2, 4, dtype=torch.bool, device=memory.device)
    offsets = torch.tensor([-3, 2, 8], dtype=torch.int32, device=memory.device)
    plan_positions(tokens, offsets, memory[4:8]).run(memory.device)
    assert memory.tolist() == [-7] * 4 + [3, -7, 4, 5] + [-7] * 4


def test_wrong_count_on_the_cpu():
    with pytest.raises(ValueError, match="there are 3 tokens, not 2"):
        token_positions(torch.ones(1, 3, dtype=torch.bool), torch.tensor([0, 2], dtype=torch.int32), 2)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(2, 4, 4, dtype=torch.bool), r"shape \(2, 4, 4\)"),
        (torch.ones(2, 3, 4, 4, dtype=torch.bool), r"shape \(2, 3, 4, 4\)"),  # one per head
        (torch.ones(2, 1, 4, 5, dtype=torch.bool), r"shape \(2, 1, 4, 5\)"),
        (torch.ones(2, 1, 2, 4, dtype=torch.bool), r"shape \(2, 1, 2, 4\)"),
        (torch.ones(3, 1, 1, 4, dtype=torch.bool), r"shape \(3, 1, 1, 4\)"),
        (torch.ones(2, 3), r"shape \(2, 3\)"),
        (torch.ones(2, 4), r"shape \(2, 4\)"),  # what does 1.0 mean?
        (torch.ones(2, 1, 1, 4, dtype=torch.long), "dtype torch.int64"),
    ],
)
def test_unreadable_masks(mask, reason):
    with pytest.raises(ValueError, match=f"an attention mask of {reason}, for 2 sequences of 4"):
        read_mask(mask, 2, 4)
    assert unreadable(mask.to("meta"), 2, 4).startswith("an attention mask of ")
    assert unreadable(torch.ones(2, 4, dtype=torch.int32), 2, 4) is None


def test_wrong_arguments():
    with pytest.raises(ValueError, match="marks must be"):
        read_mask(torch.ones(2, 4, dtype=torch.bool), 2, 4, "nothing")
    with pytest.raises(ValueError, match="tokens must be boolean"):
        token_positions(torch.ones(2, 4), torch.zeros(3, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match=r"offsets must be int32 \[B \+ 1\] = \[3\]"):
        token_positions(torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, dtype=torch.int32), 8)


@pytest.mark.parametrize(
    ("mask", "launches"),
    [
        (torch.ones(2, 5, dtype=torch.long), 1),
        (torch.ones(2, 1, 1, 5), 1),
        (torch.ones(2, 1, 1, 5, dtype=torch.bool).expand(2, 1, 5, 5), 1),
        (torch.ones(2, 1, 5, 5, dtype=torch.bool), 2),
    ],
)
def test_launches(mask, launches):
    """One for the rows, one more where every query has memory of its own; nothing else that would fill or copy."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastencoder.kernels._triton import DeviceLimits, recording
    from fastencoder.kernels.padding import triton_kernel

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    offsets = torch.zeros(3, dtype=torch.int32)
    with recording(DeviceLimits((9, 0), 132)) as recorded, pytest.MonkeyPatch.context() as patch, Operations():
        patch.setattr(torch, "empty", torch.zeros)  # any name but that of the fixture's, which fills
        tokens, _ = triton_kernel.read_mask(mask, 2, 5)
        assert len(recorded) == launches
        triton_kernel.token_positions(tokens, offsets, 10)
    assert len(recorded) == launches + 1
    assert names == ["zeros"] * 3


def test_no_sequences_no_launch():
    """A mask for all of no sequences: there is no place for a verdict on it."""
    from fastencoder.kernels._triton import DeviceLimits, recording
    from fastencoder.kernels.padding import triton_kernel

    with recording(DeviceLimits((9, 0), 132)) as launches:
        tokens, summary = triton_kernel.read_mask(torch.ones(1, 1, 4, 4), 0, 4)
    assert tokens.shape == (0, 4) and summary.shape == (0,) and launches == []


def test_opcheck():
    marks = torch.tensor([[1, 1, 0], [1, 0, 0]])
    square = marks.bool()[:, None, None].expand(2, 1, 3, 3)
    operator = torch.ops.fastencoder.read_mask.default
    for mask in (marks, marks.bool(), square, additive(square, torch.bfloat16, -10000.0)):
        torch.library.opcheck(operator, (mask, 2, 3))
    torch.library.opcheck(operator, (marks, 2, 3, "padding"))
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fastencoder.token_positions.default, (marks.bool(), offsets, 3))
