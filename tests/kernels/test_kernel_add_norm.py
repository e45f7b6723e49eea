"""``add_norm`` against float64, with the error of float32 statistics and one rounding as the bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import ALL_IMPLEMENTATIONS, assert_within, device_of, implementation, random, rounding

from fastencoder.kernels import add_norm


def check(name, x, residual, weight, bias, eps, scale, x_bias=None, rms=False, dtype=None, keep_sum=True):
    with implementation(name):
        normed, total = add_norm(x, residual, weight, bias, eps, scale, x_bias=x_bias, rms=rms, keep_sum=keep_sum)
    assert normed.dtype == total.dtype == (dtype or x.dtype)
    x, residual, weight, bias, scale, x_bias = (
        None if t is None else t.double().cpu() for t in (x, residual, weight, bias, scale, x_bias)
    )
    parts = x if x.dim() == 3 else x[None]
    product = parts.sum(0) + (0 if x_bias is None else x_bias)
    added = (product if scale is None else product * scale) + (0 if residual is None else residual)
    centred = added if rms else added - added.mean(-1, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    expected = centred / deviation * weight + (0 if bias is None else bias)
    single = torch.finfo(torch.float32).eps
    terms = parts.abs().sum(0) + (0 if x_bias is None else x_bias.abs())
    terms = terms * (1 if scale is None else scale.abs()) + (0 if residual is None else residual.abs())
    terms = terms * (len(parts) + 1) / 2  # so many roundings more
    size = terms.amax(-1, keepdim=True) / deviation  # what float32 rounding of the sum and the mean is relative to
    bound = 4 * single * ((size + 4 * (centred / deviation).abs()) * weight.abs() + expected.abs()) + 1e-37
    sum_bound = 2 * single * terms + 1e-37
    if normed.dtype != torch.float32:
        bound, sum_bound = (
            b + rounding(normed.dtype) * e.abs() + 1e-7 for b, e in ((bound, expected), (sum_bound, added))
        )
    assert_within(normed, expected, bound)
    if keep_sum:
        assert_within(total, added, sum_bound)
    else:
        assert total.shape == (0, added.shape[1])


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [1, 37, 72, 760, 1024])
@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_sizes_and_eps(name, dtype, dim, eps):
    """Rows of small variance, so that an eps of 0.1 changes everything; one column is always zero."""
    device = device_of(name)
    x, residual = (random(i, 19, dim, dtype=dtype, device=device) / 4 for i in (0, 1))
    weight, bias = (random(i, dim, dtype=dtype, device=device) for i in (2, 3))
    if dim == 1:
        eps = 0.1  # the variance is zero: nothing but eps keeps the result finite
    check(name, x, residual, weight, bias, eps, None)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    dim=st.sampled_from([8, 37, 64, 72, 130, 384]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    present=st.tuples(*[st.booleans()] * 6),
)
@example(rows=1, dim=37, dtype=torch.float32, present=(False,) * 6)
@example(rows=0, dim=8, dtype=torch.float32, present=(True,) * 6)
@example(rows=9, dim=64, dtype=torch.float16, present=(False, True, True, False, False, True))
@example(rows=9, dim=64, dtype=torch.float16, present=(False, True, False, True, False, True))
@example(rows=3, dim=37, dtype=torch.bfloat16, present=(False, False, False, False, True, False))
def test_optional_parts(name, rows, dim, dtype, present):
    with_residual, with_bias, with_scale, with_x_bias, rms, keep_sum = present
    device = device_of(name)
    x = random(0, rows, dim, dtype=dtype, device=device)
    weight = random(1, dim, dtype=dtype, device=device)
    residual = random(2, rows, dim, dtype=dtype, device=device) * 2 if with_residual else None
    bias = random(3, dim, dtype=dtype, device=device) if with_bias else None
    scale = random(4, dim, dtype=dtype, device=device) * 3 if with_scale else None
    x_bias = random(5, dim, dtype=dtype, device=device) * 2 if with_x_bias else None
    check(name, x, residual, weight, bias, 1e-5, scale, x_bias, rms, keep_sum=keep_sum)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@settings(max_examples=15, deadline=None)
@given(
    parts=st.integers(1, 9),
    rows=st.integers(0, 9),
    dim=st.sampled_from([8, 37, 64, 72, 130, 384]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    present=st.tuples(*[st.booleans()] * 5),
)
@example(parts=1, rows=1, dim=37, dtype=torch.float16, present=(False,) * 5)
@example(parts=4, rows=7, dim=72, dtype=torch.bfloat16, present=(False,) * 5)
@example(parts=4, rows=7, dim=64, dtype=torch.float16, present=(True,) * 5)
def test_partial_sums(name, parts, rows, dim, dtype, present):
    """Float32 parts of a product; the result has the dtype of the residual, or of the weights without one."""
    with_residual, with_scale, with_x_bias, rms, keep_sum = present
    device = device_of(name)
    x = random(0, parts, rows, dim, dtype=torch.float32, device=device)
    weight = random(1, dim, dtype=dtype, device=device)
    residual = random(2, rows, dim, dtype=dtype, device=device) * 2 if with_residual else None
    scale = random(4, dim, dtype=dtype, device=device) * 3 if with_scale else None
    x_bias = random(5, dim, dtype=dtype, device=device) * 2 if with_x_bias else None
    check(name, x, residual, weight, None, 1e-5, scale, x_bias, rms, dtype=dtype, keep_sum=keep_sum)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_partial_sums_are_added_before_rounding(name):
    """Parts that cancel: rounded one by one to float16 they would leave nothing of the small sum."""
    device = device_of(name)
    small = random(0, 6, 64, dtype=torch.float32, device=device)
    large = random(1, 6, 64, dtype=torch.float32, device=device).mul_(4096).round_()
    x = torch.stack([large, small, -large])
    residual = random(2, 6, 64, dtype=torch.float16, device=device)
    check(name, x, residual, torch.ones_like(residual[0]), None, 1e-5, None, dtype=torch.float16)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_partial_sums_that_are_a_view(name):
    device = device_of(name)
    wide = torch.full((3, 5, 80), float("nan"), device=device)
    wide[:, :, 8:72] = random(0, 3, 5, 64, dtype=torch.float32, device=device)
    check(name, wide[:, :, 8:72], None, torch.ones(64, device=device), None, 1e-5, None)


@pytest.mark.parametrize("dim", [1, 72, 128, 130, 384, 760, 1030, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_that_share_a_program(dim, dtype):
    """As many rows as make the launcher put several into one program, and one row more."""
    from fastencoder.kernels._triton import DeviceLimits
    from fastencoder.kernels.add_norm import triton_kernel
    from fastencoder.kernels.add_norm.triton_rows import row_tile

    device, limits = device_of("triton"), DeviceLimits((9, 0), 3)
    block_rows = row_tile(1 << 20, dim, dtype.itemsize, limits)[0]
    rows = 6 * block_rows + 1
    x, residual = (random(i, rows, dim, dtype=dtype, device=device) for i in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernel, "device_limits", lambda _: limits)
        assert row_tile(rows, dim, dtype.itemsize, limits)[0] == block_rows > 1
        check("triton", x, residual, torch.ones_like(x[0]), None, 0.1, None)


def test_a_row_must_fit_the_registers():
    from fastencoder.kernels._triton import DeviceLimits
    from fastencoder.kernels.add_norm.triton_rows import row_tile

    limits = DeviceLimits((9, 0), 132)
    assert row_tile(1, 16384, 4, limits) == (1, 16384, 16)
    with pytest.raises(NotImplementedError, match="up to 16384 columns"):
        row_tile(1, 16385, 2, limits)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_the_variance_is_centred(name):
    """A mean 2000 times the deviation: E[x^2] - E[x]^2 would leave nothing of float32."""
    device = device_of(name)
    x = random(0, 8, 256, dtype=torch.float32, device=device)
    residual = torch.full_like(x, 2048.0)
    check(name, x, residual, torch.ones(256, device=device), None, 1e-12, None)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_the_norm_sees_the_sum_before_rounding(name):
    """In float16 2048 + x is a multiple of two: a norm of the rounded sum would be of another row."""
    device = device_of(name)
    x = random(0, 8, 256, dtype=torch.float16, device=device)
    residual = torch.full_like(x, 2048.0)
    check(name, x, residual, torch.ones_like(x[0]), None, 1e-5, None)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_strided_rows(name):
    device = device_of(name)
    wide = torch.full((12, 90), float("nan"), device=device)
    wide[:, 7:79] = random(0, 12, 72, dtype=torch.float32, device=device)
    residual = random(1, 72, 12, dtype=torch.float32, device=device).T
    weight = random(2, 72, dtype=torch.float32, device=device)
    check(name, wide[:, 7:79], residual, weight, None, 1e-5, None)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_nothing_to_add_returns_the_input(name):
    x = random(0, 5, 16, dtype=torch.float32, device=device_of(name))
    before = x.clone()
    with implementation(name):
        normed, total = add_norm(x, None, torch.ones_like(x[0]), None, 1e-5)
    assert total is x
    assert torch.equal(x, before)
    assert normed.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_a_sum_that_nobody_reads(name):
    x = random(0, 5, 16, dtype=torch.float16, device=device_of(name))
    for residual in (None, x):
        with implementation(name):
            normed, total = add_norm(x, residual, torch.ones_like(x[0]), None, 1e-5, keep_sum=False)
        assert total.shape == (0, 16) and total.dtype == torch.float16
        assert normed.isfinite().all()


def test_wrong_arguments():
    x, vector = torch.zeros(2, 3), torch.zeros(3)
    for wrong in (torch.zeros(1, 3), torch.zeros(2, 2, 3)):
        with pytest.raises(ValueError, match="x and residual must both be"):
            add_norm(x, wrong, vector, None, 1e-5)
    for wrong in (torch.zeros(0, 2, 3), torch.zeros(2, 2, 3, dtype=torch.float16)):
        with pytest.raises(ValueError, match="partial sums must be float32"):
            add_norm(wrong, x, vector, None, 1e-5)
    for position, name in ((2, "weight"), (3, "bias"), (5, "scale"), (6, "x_bias")):
        arguments = [x, x, vector, vector, 1e-5, vector, vector]
        arguments[position] = torch.zeros(2)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            add_norm(*arguments[:6], x_bias=arguments[6])


def test_opcheck():
    parts, rows, vector = torch.randn(3, 5, 8), torch.randn(5, 8).bfloat16(), torch.randn(8).bfloat16()
    operator = torch.ops.fastencoder.add_norm.default
    torch.library.opcheck(operator, (parts, rows, vector, vector, 1e-5, vector), {"x_bias": vector, "rms": True})
    torch.library.opcheck(operator, (parts, None, vector, None, 1e-5), {"keep_sum": False})
    torch.library.opcheck(operator, (rows, None, vector, None, 1e-5))
