"""Every code path of the Triton kernels of ``linear``: persistent programs on descriptors, split-K, what is launched when."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import TRITON_DEVICE, assert_within, random, rounding

from fastencoder.kernels import ACTIVATIONS, implementation, linear
from fastencoder.kernels._triton import DeviceLimits, recording
from fastencoder.kernels.linear import heuristics, linear_partial, partial_splits
from fastencoder.kernels.linear.heuristics import Tile

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

H100 = DeviceLimits((9, 0), 132)
THREE_PROGRAMS = DeviceLimits((9, 0), 3)
# Small, because the interpreter is slow.
WHOLE, IN_PARTS = (Tile(16, 32, 32, 4, 2, 1.0, descriptors=True, parts=parts) for parts in (1, 2))
POINTERS = Tile(16, 32, 32, 4, 2, 1.0)
EDGE_ROWS = [1, 15, 16, 17, 127, 129]

EXPECTED = {
    "identity": lambda x: x,
    "gelu": lambda x: x * (1 + torch.special.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def operands(rows, n, k, dtype=torch.float16, gated=False, bias=True, residual=False):
    """x, weight, bias and residual of a size that keeps results near one."""
    device, width = TRITON_DEVICE, 2 * n if gated else n
    return (
        random(0, rows, k, dtype=dtype, device=device),
        random(1, width, k, dtype=dtype, device=device) / k**0.5,
        random(2, width, dtype=dtype, device=device) if bias else None,
        random(3, rows, n, dtype=dtype, device=device) if residual else None,
    )


def exact(x, weight, bias, activation, residual, gated):
    """The result in float64, and a bound on the error of float32 accumulation and one rounding."""
    product = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if gated:
        half, up = product.chunk(2, dim=1)
        expected = EXPECTED[activation](half) * up
    else:
        expected = EXPECTED[activation](product)
    expected = expected if residual is None else expected + residual.double()
    return expected.cpu(), (1e-5 + 0.51 * rounding(x.dtype) * expected.abs()).cpu()


def run_tile(tile, limits, x, weight, bias, activation, residual, gated):
    """One launch with this tile, into an output of NaN."""
    from fastencoder.kernels.linear.triton_kernel import plan

    n = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype, device=x.device)
    launch = plan(x, weight, bias, activation, residual, out, limits, gated, tile)
    launch.run(x.device)
    return out, launch


def check_tile(tile, x, weight, bias, activation, residual, gated):
    out, launch = run_tile(tile, THREE_PROGRAMS, x, weight, bias, activation, residual, gated)
    assert_within(out, *exact(x, weight, bias, activation, residual, gated))
    return launch


@pytest.mark.parametrize("tile", [WHOLE, IN_PARTS, POINTERS], ids=["whole", "in parts", "pointers"])
@pytest.mark.parametrize("rows", EDGE_ROWS)
def test_edges_of_every_kernel(tile, rows):
    """Rows around the tile's height, N and K that no tile divides, more tiles than programs."""
    for gated in (False, True):
        x, weight, bias, residual = operands(rows, 72, 88, gated=gated, residual=True)
        launch = check_tile(tile, x, weight, bias, "gelu", residual, gated)
        if rows >= 127 and tile.descriptors:
            assert launch.grid == (3,)


@pytest.mark.parametrize("tile", [WHOLE, IN_PARTS, POINTERS], ids=["whole", "in parts", "pointers"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue_of_every_kernel(tile, activation):
    for gated in (False, True):
        for with_residual in (False, True):
            x, weight, bias, residual = operands(
                20, 64, 32, gated=gated, bias=not with_residual, residual=with_residual
            )
            check_tile(tile, x, weight, bias, activation, residual, gated)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 140),
    n=st.integers(1, 20),
    k=st.integers(1, 20),
    tile=st.sampled_from([WHOLE, IN_PARTS]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    gated=st.booleans(),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
)
@example(rows=129, n=1, k=1, tile=WHOLE, dtype=torch.float16, gated=True, with_bias=True, with_residual=True)
def test_descriptors_at_any_shape(rows, n, k, tile, dtype, gated, with_bias, with_residual):
    """N and K in units of the 16 bytes that a descriptor asks for."""
    n, k = n * 16 // dtype.itemsize, k * 16 // dtype.itemsize
    x, weight, bias, residual = operands(rows, n, k, dtype, gated, with_bias, with_residual)
    check_tile(tile, x, weight, bias, "silu", residual, gated)


@pytest.mark.parametrize("tile", [WHOLE, IN_PARTS])
def test_descriptors_of_rows_in_wider_buffers(tile):
    """What lies beside the rows is NaN."""
    x, weight, bias, residual = operands(33, 72, 40, residual=True)
    wide = [F.pad(t, (8, 8, 0, 1), value=float("nan")) for t in (x, weight, residual)]
    x, weight, residual = (buffer[:-1, 8:-8] for buffer in wide)
    check_tile(tile, x, weight, bias, "gelu", residual, False)


def test_a_persistent_program_does_every_tile_once():
    """With 1, 2, ... programs, and with one for each tile."""
    x, weight, bias, _ = operands(70, 72, 32)
    for programs in (1, 2, 7, 15, 200):
        out, launch = run_tile(WHOLE, DeviceLimits((9, 0), programs), x, weight, bias, "relu", None, False)
        assert launch.grid == (min(programs, 15),)
        assert_within(out, *exact(x, weight, bias, "relu", None, False))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("k", [1024, 1400])
def test_split_k_inside_linear(gated, with_residual, k):
    """Few tokens and a long sum: partial sums, and a second launch that adds and finishes them; no bit ever differs."""
    x, weight, bias, residual = operands(17, 24, k, gated=gated, residual=with_residual)
    arguments = (x, weight, bias, "gelu", residual, gated)
    with recording(H100) as launches:
        linear(*arguments)
    assert [launch.kernel.__name__ for launch in launches] == ["tile_kernel", "reduction_kernel"]
    assert launches[0].grid[1] == launches[1].constants["SPLITS"] > 1
    with implementation("triton"):
        outs = [linear(*arguments) for _ in range(2)]
    assert torch.equal(*outs)
    assert_within(outs[0], *exact(x, weight, bias, "gelu", residual, gated))


def test_the_reduction_over_several_programs():
    """3,003 elements in programs of 1,024."""
    from fastencoder.kernels.linear.triton_kernel import plan_reduction

    for activation in ACTIVATIONS:
        partial = random(0, 3, 21, 286, dtype=torch.float32, device=TRITON_DEVICE)
        _, _, bias, residual = operands(21, 143, 1, gated=True, residual=True)
        out = torch.full((21, 143), float("nan"), dtype=torch.float16, device=TRITON_DEVICE)
        plan_reduction(partial, bias, activation, residual, out, gated=True).run(out.device)
        half, up = (partial.double().sum(0) + bias.double()).chunk(2, dim=1)
        expected = (EXPECTED[activation](half) * up + residual.double()).cpu()
        assert_within(out, expected, 1e-5 + 0.51 * rounding(torch.float16) * expected.abs())


def test_partial_sums_as_many_as_announced():
    x, weight, _, _ = operands(5, 40, 2000, bias=False)
    with implementation("triton"):
        partial = linear_partial(x, weight)
        splits = partial_splits(5, 40, 2000, x.dtype, x.device)
        assert torch.equal(partial, linear_partial(x, weight))
    assert partial.shape == (splits, 5, 40)
    assert splits > 1
    expected, bound = exact(x, weight, None, "identity", None, False)
    assert_within(partial.sum(0), expected, 1e-5 + 1e-6 * bound)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("tokens", "n", "k", "activation", "kernels"),
    [
        (8192, 3072, 768, "gelu", ["persistent_kernel"]),
        (8192, 2304, 768, "identity", []),
        (16, 2304, 768, "identity", ["tile_kernel"]),
        (16, 768, 3072, "identity", ["tile_kernel", "reduction_kernel"]),
        (0, 3072, 768, "gelu", []),
        (8192, 3070, 768, "gelu", ["tile_kernel"]),
    ],
)
def test_what_is_launched(tokens, n, k, activation, kernels):
    """The vendor's GEMM launches nothing of ours."""
    with recording(H100) as launches:
        out = linear(meta(tokens, k), meta(n, k), meta(n), activation)
    assert out.shape == (tokens, n)
    assert [launch.kernel.__name__ for launch in launches] == kernels
    if kernels == ["persistent_kernel"]:
        assert launches[0].grid == (132,)


def test_descriptors_only_where_the_hardware_takes_them():
    """Rows and the beginning on multiples of 16 bytes; on older devices never."""

    def kernel(x, weight, limits=H100):
        with recording(limits) as launches:
            linear(x, weight, None, "gelu")
        (launch,) = launches
        return launch.kernel.__name__

    x, weight = meta(4096, 768), meta(768, 768)
    assert kernel(x, weight) == "persistent_kernel"
    assert kernel(x, weight, DeviceLimits((8, 0), 108)) == "tile_kernel"
    assert kernel(meta(4096, 800)[:, 32:], weight) == "persistent_kernel"
    assert kernel(meta(4096, 769)[:, :768], weight) == "tile_kernel"
    assert kernel(meta(4096, 800)[:, 1:769], weight) == "tile_kernel"
    assert kernel(x, meta(768, 772)[:, :768]) == "tile_kernel"
    assert kernel(x, meta(772, 768)) == "tile_kernel"


def test_a_specialisation_does_not_depend_on_the_number_of_tokens():
    """Triton compiles anew for every new value of a constant, and for 1 and multiples of 16 of other numbers."""
    from fastencoder.kernels.linear import triton_gemm, triton_parts

    with recording(H100) as launches:
        for tokens in (4097, 5000, 8191, 8192, 100_000):
            linear(meta(tokens, 768), meta(3072, 768), meta(3072), "gelu")
    assert len(launches) == 5
    assert len({tuple(launch.constants.items()) for launch in launches}) == 1
    for kernel in (triton_gemm.tile_kernel, triton_gemm.persistent_kernel, triton_parts.reduction_kernel):
        if hasattr(kernel, "params"):  # not when interpreted
            assert next(p for p in kernel.params if p.name == "M").do_not_specialize


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("tile", [WHOLE, IN_PARTS, POINTERS], ids=["whole", "in parts", "pointers"])
def test_no_worse_than_torch(tile, activation):
    """At most twice the error of torch's own float16 product and activation, by the largest and by the mean."""
    x, weight, bias, _ = operands(64, 64, 768)
    out, _ = run_tile(tile, THREE_PROGRAMS, x, weight, bias, activation, None, False)
    expected, _ = exact(x, weight, bias, activation, None, False)
    ours = (out.double().cpu() - expected).abs()
    torchs = (ACTIVATIONS[activation](F.linear(x, weight, bias)).double().cpu() - expected).abs()
    assert ours.max() <= 2 * torchs.max()
    assert ours.mean() <= 2 * torchs.mean()


def test_the_choice_is_what_linear_launches():
    """The tile of the table reaches the kernel."""
    choice = heuristics.choose(4096, 3072, 768, torch.bfloat16, "ieee", H100, activation="gelu")
    with recording(H100) as launches:
        linear(meta(4096, 768), meta(3072, 768), meta(3072), "gelu")
    constants = launches[0].constants
    assert (constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_K"]) == choice.tile[:3]
    assert (launches[0].num_warps, launches[0].num_stages) == choice.tile[3:5]


@pytest.mark.parametrize("tile", [WHOLE, IN_PARTS, POINTERS, None], ids=["whole", "in parts", "pointers", "split over K"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_layer_scale(tile, with_residual, gated):
    """Scaled after activation and gate, before the residual."""
    from fastencoder.kernels.linear.triton_kernel import plan, plan_reduction

    x, weight, bias, residual = operands(37, 72, 40, gated=gated, residual=with_residual)
    scale = random(4, 72, dtype=torch.float16, device=TRITON_DEVICE)
    out = torch.full((37, 72), float("nan"), dtype=x.dtype, device=x.device)
    if tile is None:
        halves = zip(x.float().chunk(2, dim=1), weight.float().chunk(2, dim=1), strict=True)
        partial = torch.stack([part @ part_weight.T for part, part_weight in halves])
        plan_reduction(partial, bias, "silu", residual, out, gated, scale).run(out.device)
    else:
        plan(x, weight, bias, "silu", residual, out, THREE_PROGRAMS, gated, tile, scale).run(out.device)
    unscaled, bound = exact(x, weight, bias, "silu", None, gated)
    expected = unscaled * scale.double().cpu() + (0 if residual is None else residual.double().cpu())
    bound = bound * scale.double().abs().cpu() + 0.51 * rounding(x.dtype) * expected.abs() + 1e-5
    assert_within(out, expected, bound)
