"""The work list of ``varlen_attention``, the blocks that the heuristics choose, and how a launch is specialised."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_testing import device_of
from varlen_attention_testing import check, offsets_of, qkv_of

from fastencoder.kernels import implementation, varlen_attention
from fastencoder.kernels._triton import DeviceLimits, cdiv, recording
from fastencoder.kernels.varlen_attention import heuristics, query_block, tile_list

# NumPy under the interpreter warns of NaN and infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICES = [DeviceLimits(c, 132) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))]


@given(lengths=st.lists(st.integers(0, 300), max_size=12), queries=st.sampled_from([16, 64, 128]))
def test_tile_list(lengths, queries):
    """Every block of every sequence once, none empty, the longest sequences first, equal ones in their order."""
    tiles = tile_list(lengths, queries)
    assert tiles.dtype == torch.int32
    assert tiles.shape == (sum(cdiv(length, queries) for length in lengths), 2)
    expected = [(s, block) for s in range(len(lengths)) for block in range(cdiv(lengths[s], queries))]
    assert tiles.tolist() == [list(tile) for tile in sorted(expected, key=lambda tile: -lengths[tile[0]])]


@pytest.mark.parametrize("dtype, longest", [(torch.float16, 30), (torch.float16, 150), (torch.float32, 40)])
def test_a_work_list_changes_no_bit(dtype, longest):
    """Entries for an empty sequence do nothing, and the order of the entries does not matter."""
    device, lengths = device_of("triton"), [3, longest, 0, 1]
    q, k, v = qkv_of(lengths, 2, 40, dtype, device)
    queries = query_block(40, dtype, longest, q.device)
    tiles = torch.cat((tile_list(lengths, queries), torch.tensor([[2, 0]] * 3, dtype=torch.int32))).to(device)
    out = check("triton", q, k, v, lengths, 0.2)
    assert torch.equal(check("triton", q, k, v, lengths, 0.2, tiles=tiles), out)
    assert torch.equal(check("triton", q, k, v, lengths, 0.2, tiles=tiles.flip(0)), out)


def test_only_listed_tiles_are_computed():
    device, lengths = device_of("triton"), [5, 9]
    q, k, v = qkv_of(lengths, 2, 16, torch.float16, device)
    only = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    with implementation("triton"):
        out = varlen_attention(q, k, v, offsets_of(lengths, device), 9, 0.2, tiles=only)
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()


def test_several_heads_a_program():
    """More tiles than multiprocessors: a program takes heads in turn, the last one what is left."""
    device, lengths = device_of("triton"), [2] * 6
    q, k, v = qkv_of(lengths, 5, 16, torch.float16, device)
    limits = DeviceLimits((9, 0), 1)
    assert heuristics.choose_heads(len(lengths), 5, limits) == 3
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    from fastencoder.kernels.varlen_attention.triton_kernel import plan

    launch = plan(q, k, v, offsets_of(lengths, device), 2, 0.25, out, limits)
    assert launch.grid == (6 * 2,)
    launch.run(q.device)
    assert torch.equal(out, check("triton", q, k, v, lengths, 0.25))


@given(tiles=st.integers(1, 10_000), heads=st.integers(1, 32), multiprocessors=st.sampled_from([1, 84, 132]))
def test_heads_of_a_program(tiles, heads, multiprocessors):
    """At most four, and one where there is not work enough for the whole device."""
    chosen = heuristics.choose_heads(tiles, heads, DeviceLimits((9, 0), multiprocessors))
    assert 1 <= chosen <= min(heads, 4)
    if tiles * heads <= 4 * multiprocessors:
        assert chosen == 1


def launches(q, max_seqlen, limits, **arguments):
    with recording(limits) as recorded:
        varlen_attention(q, q, q, torch.empty(5, dtype=torch.int32, device="meta"), max_seqlen, 0.2, **arguments)
    return recorded


def test_every_block_on_every_device():
    """A block for every length, head dimension and dtype; the queries are those of query_block, with features or not."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for limits, dtype, dim, seqlen in product(DEVICES, dtypes, (16, 72, 80, 128, 256), (1, 100, 129, 1000)):
        q = torch.empty(4 * seqlen, 3, dim, dtype=dtype, device="meta")
        (plain,) = launches(q, seqlen, limits)
        (featured,) = launches(q, seqlen, limits, causal=True, softcap=2.0)
        with recording(limits):
            queries = query_block(dim, dtype, seqlen, q.device)
        assert plain.constants["BLOCK_Q"] == featured.constants["BLOCK_Q"] == queries
        assert plain.constants["BLOCK_DIM"] >= dim


def test_numbers_that_vary_from_batch_to_batch_specialise_nothing():
    """Only what a model fixes is compiled in; the rest is among the arguments that the kernels declare as unspecialised."""
    from fastencoder.kernels.varlen_attention.triton_parts import UNSPECIALISED

    def made(batch, seqlen, reach):
        q = torch.empty(batch * seqlen, 3, 64, dtype=torch.float16, device="meta")
        bias = torch.empty(1, 3, 2 * seqlen + reach, 2 * seqlen + reach, device="meta")
        relative = torch.empty(3, 2 * reach + 1, device="meta")
        products = torch.empty(3, batch * seqlen, 8 + reach, device="meta").transpose(0, 1)
        columns = torch.empty(2 * reach + 1, dtype=torch.int32, device="meta")
        others = {"bias": bias, "relative_bias": relative, "disentangled": (products, products, columns)}
        others["decomposed"] = products, torch.empty(3, batch * seqlen, seqlen, device="meta").transpose(0, 1)
        (launch,) = launches(q, seqlen, DEVICES[3], window=(reach, reach), **others)
        return launch

    for few, many in ((made(4, 33, 1), made(4, 64, 16)), (made(4, 300, 1), made(40, 1024, 64))):
        assert few.constants == many.constants
        changed = {n for n, x in few.arguments.items() if isinstance(x, int | float) and x != many.arguments[n]}
        assert changed
        assert changed <= set(UNSPECIALISED)
