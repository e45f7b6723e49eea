"""``linear`` against float64, with the error of float32 accumulation and one rounding as the bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import ALL_IMPLEMENTATIONS, assert_within, device_of, dot_works, implementation, random, rounding

from fastencoder.kernels import ACTIVATIONS, linear
from fastencoder.kernels.linear import cpu as linear_cpu
from fastencoder.kernels.linear import linear_partial, partial_splits

# NumPy under the interpreter warns of NaN and infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# Written out here, so that a wrong constant in the package cannot agree with itself.
EXPECTED = {
    "identity": lambda x: x,
    "gelu": lambda x: x * (1 + torch.special.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def check(name, x, weight, bias, activation, residual, gated=False):
    with implementation(name):
        out = linear(x, weight, bias, activation, residual, gated)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    x, weight, bias, residual = (None if t is None else t.double().cpu() for t in (x, weight, bias, residual))
    product = x @ weight.T
    if bias is not None:
        product += bias
    terms = x.abs() @ weight.abs().T + product.abs()
    up = torch.ones(())
    if gated:
        (product, up), (terms, up_terms) = product.chunk(2, dim=1), terms.chunk(2, dim=1)
    activated = EXPECTED[activation](product)
    expected = activated * up if residual is None else activated * up + residual
    # float32: the dot product's error grows with its absolute terms, and no activation is steeper than 1.2
    terms = (terms + activated.abs()) * up.abs()
    if gated:
        terms = terms + activated.abs() * up_terms
    bound = 8 * torch.finfo(torch.float32).eps * (terms + expected.abs()) + 1e-37
    # 16 bit: one rounding of the result; on CPU another one of what has been activated, and where oneDNN cannot finish a
    # product, one of the product
    parts = expected.abs()
    if name.startswith("cpu"):
        parts = parts + (activated * up).abs()
        if not linear_cpu._finishes(out.dtype) or activation == "quick_gelu":
            parts = parts + (product * up).abs() + (activated * up).abs()
    if out.dtype != torch.float32:
        bound = bound + rounding(out.dtype) * 1.3 * parts + 1e-7  # and the spacing of the smallest float16
    assert_within(out, expected, bound)


def test_every_activation_is_checked():
    assert set(EXPECTED) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_activations(name, dtype, activation, with_residual):
    """Outputs of about ten in size, so that both tails of every activation are reached."""
    if not dot_works(name, dtype):
        pytest.skip("the interpreter cannot multiply bfloat16 matrices")
    device = device_of(name)
    x = random(0, 37, 72, dtype=dtype, device=device)
    weight = random(1, 100, 72, dtype=dtype, device=device) / 2
    bias = random(2, 100, dtype=dtype, device=device) * 3
    residual = random(3, 37, 100, dtype=dtype, device=device) * 3 if with_residual else None
    check(name, x, weight, bias, activation, residual)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_constants(name, activation):
    """A product of one term has next to no error of its own: a constant that is wrong in the fourth digit shows."""
    device = device_of(name)
    x = torch.linspace(-8, 8, 257, device=device)[:, None]
    check(name, x, torch.ones(1, 1, device=device), None, activation, None)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 150),
    out_dim=st.sampled_from([1, 16, 37, 64, 130]),
    in_dim=st.sampled_from([1, 8, 37, 72, 128, 200]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    gated=st.booleans(),
)
@example(rows=0, out_dim=37, in_dim=16, dtype=torch.float32, with_bias=True, with_residual=True, gated=False)
@example(rows=0, out_dim=64, in_dim=64, dtype=torch.float16, with_bias=True, with_residual=True, gated=True)
@example(rows=1, out_dim=1, in_dim=1, dtype=torch.float32, with_bias=True, with_residual=False, gated=True)
@example(rows=1, out_dim=760, in_dim=768, dtype=torch.float16, with_bias=False, with_residual=False, gated=False)
@example(rows=260, out_dim=520, in_dim=72, dtype=torch.float16, with_bias=True, with_residual=True, gated=False)
def test_shapes(name, rows, out_dim, in_dim, dtype, with_bias, with_residual, gated):
    device = device_of(name)
    x = random(0, rows, in_dim, dtype=dtype, device=device)
    weight = random(1, 2 * out_dim if gated else out_dim, in_dim, dtype=dtype, device=device)
    bias = random(2, weight.shape[0], dtype=dtype, device=device) if with_bias else None
    residual = random(3, rows, out_dim, dtype=dtype, device=device) if with_residual else None
    check(name, x, weight, bias, "gelu", residual, gated)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gated(name, dtype, activation, with_residual):
    if not dot_works(name, dtype):
        pytest.skip("the interpreter cannot multiply bfloat16 matrices")
    device = device_of(name)
    x = random(0, 19, 72, dtype=dtype, device=device)
    weight = random(1, 2 * 40, 72, dtype=dtype, device=device) / 4
    bias = random(2, 2 * 40, dtype=dtype, device=device)
    residual = random(3, 19, 40, dtype=dtype, device=device) if with_residual else None
    check(name, x, weight, bias, activation, residual, gated=True)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_partial_sums(name, dtype, splits, rows):
    """Also in more parts than there are steps along K, and of a K that they do not divide."""
    device = device_of(name)
    x, weight = random(0, rows, 200, dtype=dtype, device=device), random(1, 37, 200, dtype=dtype, device=device)
    with implementation(name):
        partial = linear_partial(x, weight, splits)
    assert partial.shape == (splits, rows, 37)
    assert partial.dtype == torch.float32
    expected = x.double().cpu() @ weight.double().cpu().T
    terms = x.double().cpu().abs() @ weight.double().cpu().abs().T
    assert_within(partial.cpu().sum(0), expected, 8 * torch.finfo(torch.float32).eps * terms + 1e-37)


def test_partial_sums_without_a_gpu_have_one_part():
    x, weight = random(0, 3, 4096, dtype=torch.float32, device="cpu"), torch.ones(5, 4096)
    assert partial_splits(3, 5, 4096, torch.float32, x.device) == 1
    assert torch.equal(linear_partial(x, weight), (x @ weight.T)[None])


def test_partial_sums_of_float64_stay_float64():
    x, weight = torch.ones(3, 8, dtype=torch.float64), torch.ones(5, 8, dtype=torch.float64)
    for name in ("cpu", "cuda"):
        with implementation(name):
            assert linear_partial(x, weight).dtype == torch.float64


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_scale(name, gated, with_residual):
    device = device_of(name)
    x = random(0, 19, 24, dtype=torch.float32, device=device)
    weight = random(1, 80 if gated else 40, 24, dtype=torch.float32, device=device)
    bias = random(2, len(weight), dtype=torch.float32, device=device)
    scale = random(4, 40, dtype=torch.float32, device=device)
    residual = random(3, 19, 40, dtype=torch.float32, device=device) if with_residual else None
    with implementation(name):
        out = linear(x, weight, bias, "relu", residual, gated, scale)
    unscaled = linear(x.double(), weight.double(), bias.double(), "relu", None, gated).cpu()
    expected = unscaled * scale.double().cpu() + (0 if residual is None else residual.double().cpu())
    assert_within(out, expected, 1e-5 * (1 + expected.abs() + unscaled.abs()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_prepacked_weight_gives_the_same(dtype):
    if not linear_cpu.can_prepack(torch.zeros(1, 1, dtype=dtype)):
        pytest.skip("oneDNN does not multiply this type here")
    x, weight = random(0, 19, 72, dtype=dtype, device="cpu"), random(1, 80, 72, dtype=dtype, device="cpu") / 8
    bias = random(2, 80, dtype=dtype, device="cpu")
    packed = linear_cpu.prepack(weight)
    tolerance = {"rtol": 4 * rounding(dtype), "atol": 4 * rounding(dtype) + 4e-6}
    for gated, columns in ((False, 80), (True, 40)):
        residual = random(3, 19, columns, dtype=dtype, device="cpu")
        arguments = (bias, "gelu", residual, gated)
        expected = linear(x.double(), weight.double(), bias.double(), "gelu", residual.double(), gated)
        for out in (linear_cpu.linear_prepacked(x, packed, *arguments), linear_cpu.linear(x, weight, *arguments)):
            torch.testing.assert_close(out.double(), expected, **tolerance)


@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_16_bit_products_are_finished_before_they_are_rounded(activation):
    """On CPU too, where oneDNN can: no error is larger than half the spacing, with a hundredth for the float32 sum."""
    if not linear_cpu._finishes(torch.bfloat16):
        pytest.skip("oneDNN does not multiply bfloat16 here")
    x, weight, residual = (
        random(seed, *shape, dtype=torch.bfloat16, device="cpu")
        for seed, shape in enumerate([(64, 96), (48, 96), (64, 48)])
    )
    residual = residual if activation == "identity" else None
    out = linear_cpu.linear(x, weight, None, activation, residual).double()
    expected = EXPECTED[activation](x.double() @ weight.double().T) + (0 if residual is None else residual.double())
    assert_within(out, expected, 0.505 * rounding(torch.bfloat16) * expected.abs() + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [16, 33, 64, 200, 2100])
def test_every_tile(rows, dtype):
    """As many rows as it takes for each tile height, on a device so small that the large ones fill it."""
    from fastencoder.kernels._triton import DeviceLimits
    from fastencoder.kernels.linear.triton_kernel import plan

    device = device_of("triton")
    x, weight = random(0, rows, 136, dtype=dtype, device=device), random(1, 130, 136, dtype=dtype, device=device) / 8
    bias = random(2, 130, dtype=dtype, device=device)
    expected = EXPECTED["gelu"](x.double() @ weight.double().T + bias.double()).cpu()
    for capability in ((8, 0), (9, 0)):
        out = torch.empty(rows, 130, dtype=dtype, device=device)
        plan(x, weight, bias, "gelu", None, out, DeviceLimits(capability, 2)).run(x.device)
        assert_within(out, expected, 2e-5 + rounding(dtype) * expected.abs())


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_strided_inputs(name):
    """Rows out of wider buffers whose other columns are NaN, and a transposed weight."""
    device = device_of(name)
    wide = torch.full((150, 100), float("nan"), device=device)
    wide[:, 10:50] = random(0, 150, 40, dtype=torch.float32, device=device)
    residual = torch.full((150, 60), float("nan"), device=device)
    residual[:, 5:53] = random(1, 150, 48, dtype=torch.float32, device=device)
    weight = random(2, 40, 48, dtype=torch.float32, device=device).T
    check(name, wide[:, 10:50], weight, None, "relu", residual[:, 5:53])


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "identity"])
def test_extremes_do_not_overflow(name, activation):
    """exp of a large negated input is infinite, and the result must be zero all the same; NaN stays NaN."""
    device = device_of(name)
    x = torch.tensor([[-1e30], [-200.0], [0.0], [200.0], [1e30], [float("nan")]], device=device)
    with implementation(name):
        out = linear(x, torch.ones(1, 1, device=device), None, activation).flatten().cpu()
    assert torch.equal(out[:5], torch.tensor([0.0, 0.0, 0.0, 200.0, 1e30]))
    assert out[5].isnan()


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_nan_rows_stay_alone(name):
    device = device_of(name)
    x = random(0, 40, 72, dtype=torch.float32, device=device)
    x[17] = float("nan")
    with implementation(name):
        out = linear(x, random(1, 33, 72, dtype=torch.float32, device=device), None, "silu").cpu()
    assert out[17].isnan().all()
    assert out[torch.arange(40) != 17].isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
def test_operators(gated):
    x, weight = random(0, 5, 8, dtype=torch.float32, device="cpu"), random(1, 14, 8, dtype=torch.float32, device="cpu")
    bias, residual = torch.ones(14), torch.ones(5, 7 if gated else 14)
    torch.library.opcheck(torch.ops.fastencoder.linear.default, (x, weight, bias, "silu", residual, gated))
    torch.library.opcheck(torch.ops.fastencoder.linear_partial.default, (x, weight, 3))

    def function(x):
        return linear(x, weight, bias, "silu", residual, gated), linear_partial(x, weight)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for out, expected in zip(compiled(x), function(x), strict=True):
        torch.testing.assert_close(out, expected)


def test_wrong_arguments():
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="unknown activation 'gelu_new'; known: identity, gelu"):
        linear(x, weight, None, "gelu_new")
    with pytest.raises(ValueError, match=r"x must be \[T, K\]"):
        linear(x, weight.T)
    with pytest.raises(ValueError, match="bias must be"):
        linear(x, weight, torch.zeros(3))
    with pytest.raises(ValueError, match="residual must be"):
        linear(x, weight, None, "relu", torch.zeros(1, 4))
    with pytest.raises(ValueError, match="scale must be"):
        linear(x, weight, scale=torch.zeros(3))
    with pytest.raises(ValueError, match=r"a gated weight must be \[2 N, K\]"):
        linear(x, torch.zeros(5, 3), gated=True)
    with pytest.raises(ValueError, match=r"residual must be \[2, 2\]"):
        linear(x, weight, None, "relu", torch.zeros(2, 4), gated=True)
    with pytest.raises(ValueError, match=r"x must be \[T, K\]"):
        linear_partial(x, weight.T)
