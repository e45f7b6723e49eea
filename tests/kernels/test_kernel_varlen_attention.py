"""``varlen_attention`` against float64, with the roundings of scores, probabilities and result as the bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import (
    ALL_IMPLEMENTATIONS,
    TRITON_DEVICE,
    assert_within,
    device_of,
    dot_works,
    implementation,
    random,
    rounding,
)
from varlen_attention_testing import check, expected_of, offsets_of, qkv_of, ragged_lengths

from fastencoder.kernels import varlen_attention

# NumPy under the interpreter warns of NaN and infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    lengths=ragged_lengths(40),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    dim=st.sampled_from([16, 40, 64, 72]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@example(lengths=[1], heads=(1, 1), dim=16, dtype=torch.float32)
@example(lengths=[0, 0], heads=(2, 2), dim=16, dtype=torch.float32)
@example(lengths=[], heads=(2, 2), dim=16, dtype=torch.float32)
@example(lengths=[0, 5, 0, 0, 9, 0], heads=(2, 2), dim=32, dtype=torch.float32)
@example(lengths=[16, 16, 16], heads=(2, 1), dim=32, dtype=torch.float16)
@example(lengths=[3, 1, 150, 1, 2], heads=(2, 2), dim=32, dtype=torch.float16)
@example(lengths=[3, 1, 70, 1, 2], heads=(2, 1), dim=40, dtype=torch.float32)
def test_any_lengths(name, lengths, heads, dim, dtype):
    device = device_of(name)
    q, _, _ = qkv_of(lengths, heads[0], dim, dtype, device)
    _, k, v = qkv_of(lengths, heads[1], dim, dtype, device)
    check(name, q, k, v, lengths, dim**-0.5)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "dtype, longest",
    [(torch.float16, 20), (torch.float16, 128), (torch.float16, 129), (torch.bfloat16, 129), (torch.float32, 40)],
)
@pytest.mark.parametrize("dim", [16, 72, 80, 128, 256])
def test_head_dims(name, dtype, dim, longest):
    """The boundary between a single block and a loop, and a last block of every fill."""
    if not dot_works(name, dtype):
        pytest.skip("the interpreter cannot multiply bfloat16 matrices")
    lengths = [7, longest]
    check(name, *qkv_of(lengths, 1, dim, dtype, device_of(name)), lengths, dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("longest", [20, 150, 300])
@pytest.mark.parametrize("dim", [64, 72])
def test_tf32_and_older_devices_take_other_blocks(monkeypatch, dtype, longest, dim):
    """TF32 sends float32 through the kernels of the 16-bit types; compute capability 8.0 has blocks of its own."""
    from fastencoder.kernels._triton import DeviceLimits
    from fastencoder.kernels.varlen_attention import heuristics, triton_kernel

    if TRITON_DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("TF32 is rounded on a GPU; the interpreter multiplies exactly")
    for module in (heuristics, triton_kernel):
        monkeypatch.setattr(module, "dot_precision", lambda _: "tf32")
    lengths = [9, longest, 1]
    q, k, v = qkv_of(lengths, 2, dim, dtype, TRITON_DEVICE)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    offsets = offsets_of(lengths, q.device)
    triton_kernel.plan(q, k, v, offsets, longest, 0.2, out, DeviceLimits((8, 0), 108)).run(q.device)
    expected, spread = expected_of(q, k, v, lengths, 0.2)
    assert_within(out, expected, 2 * rounding(dtype) * 8 * spread if dtype == torch.float32 else 2e-3 * spread)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype, longest", [(torch.float16, 40), (torch.float16, 150), (torch.float32, 40)])
def test_neighbours_never_leak(name, dtype, longest):
    """NaN in the sequences before and after, and behind the end of the buffer, stays where it is."""
    device, lengths = device_of(name), [30, longest, 5]
    q, k, v = (x.clone() for x in qkv_of([*lengths, 200], 2, 40, dtype, device))
    rows = slice(30, 30 + longest)
    for x in (q, k, v):
        keep = x[rows].clone()
        x.fill_(float("nan"))
        x[rows] = keep
    total = sum(lengths)
    with implementation(name):
        out = varlen_attention(q[:total], k[:total], v[:total], offsets_of(lengths, device), longest, 0.2)
    expected, spread = expected_of(q[rows], k[rows], v[rows], [longest], 0.2)
    bound = (1e-5 if dtype == torch.float32 else 4e-3) * spread
    assert_within(out[rows], expected, bound)
    assert out[:30].isnan().all()


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_large_scores(name):
    """Without the subtraction of the maximum these exponentials are infinite; the largest key is in the last block."""
    lengths = [150, 20]
    q, k, v = (x.clone() for x in qkv_of(lengths, 1, 32, torch.float32, device_of(name)))
    k[140] *= 8
    check(name, q * 10, k, v, lengths, 1.0)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale(name, scale):
    """1.0 is what T5 uses."""
    lengths = [33, 5]
    check(name, *qkv_of(lengths, 2, 32, torch.float32, device_of(name)), lengths, scale)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("max_seqlen", [40, 64, 128, 300])
def test_max_seqlen_is_only_a_bound(name, max_seqlen):
    lengths = [40, 3, 17]
    check(name, *qkv_of(lengths, 2, 32, torch.float32, device_of(name)), lengths, 0.2, max_seqlen)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_strided_layouts(name):
    """Heads before tokens, a last dimension that is not contiguous, and one buffer for keys and values."""
    device, lengths = device_of(name), [12, 30]
    q = random(0, 4, 42, 32, dtype=torch.float32, device=device).transpose(0, 1)
    k, v = random(1, 42, 2, 2, 32, dtype=torch.float32, device=device).unbind(2)
    check(name, q, k, v, lengths, 0.2)
    check(name, random(2, 42, 32, 4, dtype=torch.float32, device=device).transpose(1, 2), k, v, lengths, 0.2)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("dtype, lengths", [(torch.float32, [5, 40, 17]), (torch.float16, [5, 150, 60])])
def test_the_order_of_sequences_changes_no_bit(name, dtype, lengths):
    """Nor does the company of others: each sequence alone, at the same bound of length, gives the same bits."""
    device = device_of(name)
    q, k, v = qkv_of(lengths, 2, 40, dtype, device)
    longest = max(lengths)
    with implementation(name):
        together = varlen_attention(q, k, v, offsets_of(lengths, device), longest, 0.2)
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            alone = varlen_attention(q[rows], k[rows], v[rows], offsets_of([length], device), longest, 0.2)
            assert torch.equal(together[rows], alone)
            start += length


def test_wrong_arguments():
    x, offsets = torch.zeros(4, 6, 16), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"q must be \[T, H, d\]"):
        varlen_attention(x, x[:, :, :8], x, offsets, 4, 1.0)
    with pytest.raises(ValueError, match="4 key heads do not divide 6 query heads"):
        varlen_attention(x, x[:, :4], x[:, :4], offsets, 4, 1.0)
    with pytest.raises(ValueError, match="offsets must be int32"):
        varlen_attention(x, x, x, offsets.long(), 4, 1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        varlen_attention(x, x, x, offsets, 4, -1.0)
