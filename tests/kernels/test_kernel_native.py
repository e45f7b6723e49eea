"""The C++ extension: what the tests of the operations do not reach."""

from __future__ import annotations

import platform
import shutil

import pytest
import torch
from kernel_testing import NATIVE, assert_within, implementation, random, rounding
from varlen_attention_testing import offsets_of, qkv_of

from fastencoder.kernels import ACTIVATIONS, add_norm, native, varlen_attention
from fastencoder.kernels.linear import cpu_native

LENGTHS = [3, 0, 17, 1, 130, 64, 300, 2]


def test_it_was_built_where_it_can_be():
    """Or every test of it would be skipped in silence."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("no x86 processor, or no C++ compiler")
    assert native.library is not None


def test_only_known_instructions_can_be_chosen():
    with pytest.raises(ValueError, match="isa must be one of"), native.isa("sse"):
        pass
    before = native.current
    with native.isa("none"):
        assert native.current == 0
    assert native.current == before


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(0, 5, 3), (1, 5, 3), (13, 70, 40), (65, 130, 33), (400, 64, 16), (7, 70, 900), (60, 70, 900)],
)
def test_linear(name, dtype, activation, rows, outputs, inputs):
    """Packed and as it is, with everything that is fused; sizes that fill no tile, panel or vector."""
    x, residual = (random(seed, rows, n, dtype=torch.float32, device="cpu") for seed, n in enumerate((inputs, outputs)))
    weight = random(2, outputs, inputs, dtype=dtype, device="cpu") * 3 / inputs**0.5
    bias, scale = (random(seed, outputs, dtype=dtype, device="cpu") for seed in (3, 4))
    with implementation(name):
        outs = [
            cpu_native.linear(x, form, bias, activation, residual, scale) for form in (weight, cpu_native.pack(weight))
        ]
        plain = cpu_native.linear(x, weight, None)
        of_bf16 = cpu_native.linear(x.bfloat16(), weight, None)
    product = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    eps = torch.finfo(torch.float32).eps
    assert_within(plain, product, inputs * eps * terms + 1e-30)
    expected = ACTIVATIONS[activation](product + bias.double())
    bound = (8 + inputs) * eps * (terms + bias.double().abs() + 1)
    fixed_point = _fixed_point_bound(x, weight) if _is_fixed_point(name, dtype) else 0
    for out, product_bound in zip(outs, (bound, bound + fixed_point), strict=True):
        assert_within(
            out,
            expected * scale.double() + residual.double(),
            1.2 * product_bound * scale.double().abs()  # no activation is steeper than 1.2
            + 4 * eps * (residual.abs().double() + (expected * scale.double()).abs()),
        )
    assert of_bf16.dtype == torch.bfloat16
    rounded = x.bfloat16().double() @ weight.double().T
    assert_within(of_bf16, rounded, rounding(torch.bfloat16) * rounded.abs() + inputs * eps * terms + 1e-30)


def _is_fixed_point(name: str, dtype: torch.dtype) -> bool:
    return name == "cpu avx512_vnni" and dtype == torch.bfloat16


def _fixed_point_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far a product in fixed point may be off: in each block of 128 both factors by half of what their scales count."""
    bound = 0
    for a, b in zip(x.double().abs().split(128, dim=1), weight.double().abs().split(128, dim=1), strict=True):
        step_a = a.amax(1, keepdim=True) / 32767 / 2
        step_b = torch.maximum(b.amax(1, keepdim=True) / 32767, b.sum(1, keepdim=True) / (65535 - 128)) / 2
        bound = bound + a.sum(1, keepdim=True) * step_b.T + step_a * (b.sum(1) + a.shape[1] * step_b.T)
    return bound


needs_vnni = pytest.mark.skipif(native.best < 3, reason="no extension, or no VNNI here")


@needs_vnni
@pytest.mark.parametrize("signs", ["alike", "random"])
@pytest.mark.parametrize(
    ("size_x", "size_weight"), [(1.0, 1.0), (1e-20, 1e20), (1e25, 1e-25), (3e38, 1e-5), (1e-38, 1.0), (0.0, 1.0), (1.0, 0.0)]
)
def test_fixed_point_leaves_no_sum_of_products_outside_of_32_bits(signs, size_x, size_weight):
    """Factors that are all alike add up to the most that a block can hold."""
    x, weight = torch.full((7, 300), size_x), torch.full((70, 300), size_weight).to(torch.bfloat16)
    if signs == "random":
        x = x * random(0, *x.shape, dtype=x.dtype, device="cpu").sign()
        weight = weight * random(1, *weight.shape, dtype=weight.dtype, device="cpu").sign()
    x[1], weight[3] = -x[1], -weight[3]
    x[2, :128], weight[5, 128:] = 0, 0
    with implementation("cpu avx512_vnni"):
        out = cpu_native.linear(x, cpu_native.pack(weight), None)
    eps = torch.finfo(torch.float32).eps
    terms = x.double().abs() @ weight.double().abs().T
    assert_within(out, x.double() @ weight.double().T, _fixed_point_bound(x, weight) + 8 * eps * terms + 1e-27)


@needs_vnni
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost_in_fixed_point(value):
    """In its own row or column, and nowhere else."""
    x, weight = (random(seed, n, 300, dtype=torch.bfloat16, device="cpu") for seed, n in ((0, 9), (1, 70)))
    x, sound = x.float(), torch.ones(9, 70, dtype=torch.bool)
    x[4, 200], weight[66, 7] = value, value
    sound[4], sound[:, 66] = False, False
    with implementation("cpu avx512_vnni"):
        out = cpu_native.linear(x, cpu_native.pack(weight), None)
    assert torch.equal(out.isfinite(), sound)


@pytest.mark.parametrize("name", NATIVE)
def test_a_weight_may_be_a_view(name):
    """Half of a gated weight, or rows of a larger one."""
    whole, x = (
        random(0, 90, 100, dtype=torch.float32, device="cpu"),
        random(1, 9, 40, dtype=torch.float32, device="cpu"),
    )
    with implementation(name):
        out = cpu_native.linear(x, whole[30:60, 20:60], None)
    torch.testing.assert_close(out, x @ whole[30:60, 20:60].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_vectors_of_other_dtypes(name):
    """As where float32 is computed in beside parameters in bfloat16."""
    x, weight = random(0, 9, 40, dtype=torch.float32, device="cpu"), random(1, 30, 40, dtype=torch.bfloat16, device="cpu")
    bias, scale = random(2, 30, dtype=torch.float32, device="cpu"), random(3, 30, dtype=torch.bfloat16, device="cpu")
    with implementation(name):
        out = cpu_native.linear(x, cpu_native.pack(weight), bias, scale=scale)
    expected = (x.double() @ weight.double().T + bias.double()) * scale.double()
    fixed_point = _fixed_point_bound(x, weight) * scale.double().abs() if _is_fixed_point(name, weight.dtype) else 0
    assert_within(out, expected, 1e-5 * expected.abs() + 1e-4 + fixed_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NATIVE)
def test_a_row_does_not_depend_on_its_neighbours(name, dtype):
    """Bit for bit: neither on how many there are nor on how many threads share the work."""
    x, weight = (
        random(0, 500, 196, dtype=torch.float32, device="cpu"),
        random(1, 100, 196, dtype=dtype, device="cpu"),
    )
    bias, q, k, v = weight[:, 0].contiguous(), *qkv_of(LENGTHS, 3, 24, torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with implementation(name):
                whole = cpu_native.linear(x, cpu_native.pack(weight), bias, "gelu")
                assert torch.equal(whole[7:20], cpu_native.linear(x[7:20], cpu_native.pack(weight), bias, "gelu"))
                as_it_is = cpu_native.linear(x[7:20], weight, bias, "gelu")
                assert torch.equal(whole[7:20], as_it_is) != _is_fixed_point(name, dtype)
                mixed = varlen_attention(q, k, v, offsets_of(LENGTHS, "cpu"), 300, 0.2)
                start = sum(LENGTHS[:4])
                alone = [part[start : start + 130] for part in (q, k, v)]
                assert torch.equal(
                    mixed[start : start + 130], varlen_attention(*alone, offsets_of([130], "cpu"), 130, 0.2)
                )
                normed, _ = add_norm(x, None, weight[0].float(), None, 1e-5)
                assert torch.equal(normed[3:4], add_norm(x[3:4], None, weight[0].float(), None, 1e-5)[0])
            results.append((whole, mixed, normed))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_nan_and_infinity_stay_in_their_sequence(name):
    q, k, v = (x.clone() for x in qkv_of(LENGTHS, 2, 16, torch.float32, "cpu"))
    bounds = offsets_of(LENGTHS, "cpu")
    q[bounds[2]], k[bounds[4]], v[bounds[5]] = float("nan"), float("inf"), float("nan")
    with implementation(name):
        out = varlen_attention(q, k, v, bounds, 300, 0.3)
    with implementation("reference"):
        expected = varlen_attention(q, k, v, bounds, 300, 0.3)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any() and not out.isnan().all()


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("bounds", [[0, 5, 11], [0, 7, 3], [-1, 4, 9], [0, 9, 10]])
def test_offsets_outside_of_the_tokens_are_refused(name, bounds):
    """Ten tokens, and no sequence longer than eight: nothing may be read or written elsewhere."""
    q, k, v = qkv_of([10], 2, 16, torch.float32, "cpu")
    with implementation(name), pytest.raises(ValueError, match="offsets must rise from 0 to the number of tokens"):
        varlen_attention(q, k, v, torch.tensor(bounds, dtype=torch.int32), 8, 0.3)
