"""``add_norm`` against float64, with the error of float32 statistics and one rounding as the bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import IMPLEMENTATIONS, assert_within, device_of, random, rounding

from fastencoder.kernels import add_norm, implementation


def check(name, x, residual, weight, bias, eps, scale):
    with implementation(name):
        normed, total = add_norm(x, residual, weight, bias, eps, scale)
    assert normed.dtype == total.dtype == x.dtype
    x, residual, weight, bias, scale = (
        None if t is None else t.double().cpu() for t in (x, residual, weight, bias, scale)
    )
    added = (x if scale is None else x * scale) + (0 if residual is None else residual)
    centred = added - added.mean(-1, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    expected = centred / deviation * weight + (0 if bias is None else bias)
    single = torch.finfo(torch.float32).eps
    terms = x.abs() * (1 if scale is None else scale.abs()) + (0 if residual is None else residual.abs())
    size = terms.amax(-1, keepdim=True) / deviation  # what float32 rounding of the sum and the mean is relative to
    bound = 4 * single * ((size + 4 * (centred / deviation).abs()) * weight.abs() + expected.abs()) + 1e-37
    sum_bound = 2 * single * terms + 1e-37
    if normed.dtype != torch.float32:
        bound, sum_bound = (
            b + rounding(normed.dtype) * e.abs() + 1e-7 for b, e in ((bound, expected), (sum_bound, added))
        )
    assert_within(normed, expected, bound)
    assert_within(total, added, sum_bound)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
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


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 40),
    dim=st.sampled_from([8, 37, 64, 72, 130, 384]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@example(rows=1, dim=37, dtype=torch.float32, parts=(False, False, False))
@example(rows=0, dim=8, dtype=torch.float32, parts=(True, True, True))
@example(rows=9, dim=64, dtype=torch.float16, parts=(False, True, True))
def test_optional_parts(name, rows, dim, dtype, parts):
    device = device_of(name)
    x = random(0, rows, dim, dtype=dtype, device=device)
    weight = random(1, dim, dtype=dtype, device=device)
    residual = random(2, rows, dim, dtype=dtype, device=device) * 2 if parts[0] else None
    bias = random(3, dim, dtype=dtype, device=device) if parts[1] else None
    scale = random(4, dim, dtype=dtype, device=device) * 3 if parts[2] else None
    check(name, x, residual, weight, bias, 1e-5, scale)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_variance_is_centred(name):
    """A mean 2000 times the deviation: E[x^2] - E[x]^2 would leave nothing of float32."""
    device = device_of(name)
    x = random(0, 8, 256, dtype=torch.float32, device=device)
    residual = torch.full_like(x, 2048.0)
    check(name, x, residual, torch.ones(256, device=device), None, 1e-12, None)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_norm_sees_the_sum_before_rounding(name):
    """In float16 2048 + x is a multiple of two: a norm of the rounded sum would be of another row."""
    device = device_of(name)
    x = random(0, 8, 256, dtype=torch.float16, device=device)
    residual = torch.full_like(x, 2048.0)
    check(name, x, residual, torch.ones_like(x[0]), None, 1e-5, None)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_rows(name):
    device = device_of(name)
    wide = torch.full((12, 90), float("nan"), device=device)
    wide[:, 7:79] = random(0, 12, 72, dtype=torch.float32, device=device)
    residual = random(1, 72, 12, dtype=torch.float32, device=device).T
    weight = random(2, 72, dtype=torch.float32, device=device)
    check(name, wide[:, 7:79], residual, weight, None, 1e-5, None)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_to_add_returns_the_input(name):
    x = random(0, 5, 16, dtype=torch.float32, device=device_of(name))
    before = x.clone()
    with implementation(name):
        normed, total = add_norm(x, None, torch.ones_like(x[0]), None, 1e-5)
    assert total is x
    assert torch.equal(x, before)
    assert normed.data_ptr() != x.data_ptr()


def test_wrong_arguments():
    x, vector = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match="x and residual must both be"):
        add_norm(x, torch.zeros(1, 3), vector, None, 1e-5)
    for position, name in ((2, "weight"), (3, "bias"), (5, "scale")):
        arguments = [x, x, vector, vector, 1e-5, vector]
        arguments[position] = torch.zeros(2)
        with pytest.raises(ValueError, match=f"{name} must be"):
            add_norm(*arguments)
