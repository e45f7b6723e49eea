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
    ("rows", "outputs", "inputs"), [(1, 5, 3), (13, 70, 40), (65, 130, 33), (400, 64, 16), (7, 70, 900), (60, 70, 900)]
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
    bound = 1.2 * (8 + inputs) * eps * (terms + bias.double().abs() + 1)  # no activation is steeper than 1.2
    for out in outs:
        assert_within(
            out,
            expected * scale.double() + residual.double(),
            bound * scale.double().abs() + 4 * eps * (residual.abs().double() + (expected * scale.double()).abs()),
        )
    assert of_bf16.dtype == torch.bfloat16
    rounded = x.bfloat16().double() @ weight.double().T
    assert_within(of_bf16, rounded, rounding(torch.bfloat16) * rounded.abs() + inputs * eps * terms + 1e-30)


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
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_a_row_does_not_depend_on_its_neighbours(name):
    """Bit for bit: neither on how many there are nor on how many threads share the work."""
    x, weight = (
        random(0, 500, 96, dtype=torch.float32, device="cpu"),
        random(1, 100, 96, dtype=torch.float32, device="cpu"),
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
                assert torch.equal(whole[7:20], cpu_native.linear(x[7:20], weight, bias, "gelu"))
                mixed = varlen_attention(q, k, v, offsets_of(LENGTHS, "cpu"), 300, 0.2)
                start = sum(LENGTHS[:4])
                alone = [part[start : start + 130] for part in (q, k, v)]
                assert torch.equal(
                    mixed[start : start + 130], varlen_attention(*alone, offsets_of([130], "cpu"), 130, 0.2)
                )
                normed, _ = add_norm(x, None, weight[0], None, 1e-5)
                assert torch.equal(normed[3:4], add_norm(x[3:4], None, weight[0], None, 1e-5)[0])
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
