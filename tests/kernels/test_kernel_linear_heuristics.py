"""The dispatch table of ``linear``: complete, consistent, and within the limits of every device."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from fastencoder.kernels import implementation
from fastencoder.kernels._triton import DeviceLimits, cdiv, next_power_of_2
from fastencoder.kernels.linear import partial_splits
from fastencoder.kernels.linear.heuristics import ANY, TABLE, TOKEN_BUCKETS, choose, token_bucket

DEVICES = [
    DeviceLimits(capability, multiprocessors)
    for capability, multiprocessors in [
        ((7, 5), 40), ((8, 0), 108), ((8, 6), 82), ((8, 9), 58), ((9, 0), 132), ((10, 0), 148), ((12, 0), 170)
    ]
]  # fmt: skip
FORMATS = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
# (D, F) of BERT-base, BERT-large, MiniLM-L6 and L12, ViT-B and L, TinyBERT-312: QKV, out, FFN1, FFN2
SIZES = [(768, 3072), (1024, 4096), (384, 1536), (312, 1200)]
SHAPES = [shape for d, f in SIZES for shape in ((3 * d, d), (d, d), (f, d), (d, f))]
EPILOGUES = [
    {},
    {"activation": "gelu"},
    {"with_residual": True},
    {"activation": "silu", "gated": True},
    {"activation": "silu", "gated": True, "with_residual": True},
]


def ids(limits):
    return f"{limits.capability[0]}.{limits.capability[1]}"


def all_choices(limits, epilogues=EPILOGUES):
    for (dtype, precision), (n, k), epilogue, tokens in itertools.product(FORMATS, SHAPES, epilogues, TOKEN_BUCKETS):
        for descriptors, aligned in ((True, True), (True, False), (False, True), (False, False)):
            options = epilogue | {"descriptors": descriptors, "aligned": aligned}
            yield dtype, n, k, tokens, options, choose(tokens, n, k, dtype, precision, limits, **options)


@pytest.mark.parametrize("rows", TABLE.values(), ids=map(" ".join, TABLE))
def test_rows_are_complete(rows):
    """Rising numbers of tokens up to any; something for products whose strides no descriptor takes; evidence everywhere."""
    tokens = [row.tokens for row in rows]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == ANY
    for row in rows:
        assert row.evidence
        assert set(row.vendor) <= {"plain", "fused", "gated"}
        assert any(not tile.descriptors for tile in row.tiles)
        assert len(set(row.tiles)) == len(row.tiles)
        for tile in row.tiles:
            assert 0 < tile.rate <= 1
            assert all(size == next_power_of_2(size) for size in tile[:3])
            assert tile.m <= max(16, row.tokens), "the tile holds rows that never exist"


def test_descriptors_need_capability_9():
    for (generation, _), rows in TABLE.items():
        if generation in ("8.x", "any"):
            assert not any(tile.descriptors for row in rows for tile in row.tiles)


@pytest.mark.parametrize("limits", DEVICES, ids=ids)
def test_every_choice_fits_the_device(limits):
    for dtype, _, _, _, options, choice in all_choices(limits):
        tile, gated = choice.tile, options.get("gated", False)
        operands = tile.num_stages * (tile.m + tile.n) * tile.k * dtype.itemsize
        output = tile.m * (tile.n // 2 if gated else tile.n // tile.parts) * dtype.itemsize if tile.descriptors else 0
        if options.get("with_residual"):
            output *= 2
        assert operands + output <= limits.shared_bytes
        assert tile.num_stages >= 2, "nothing is loaded while something is multiplied"
        assert not tile.descriptors or options["descriptors"]
        assert tile.m * tile.n <= 128 * 32 * tile.num_warps, "too many accumulators a thread"


@pytest.mark.parametrize("limits", DEVICES, ids=ids)
def test_parts_of_k_cover_it_and_none_is_empty(limits):
    for _, _, k, _, _, choice in all_choices(limits):
        if choice.splits > 1 and not choice.vendor:
            part = cdiv(cdiv(k, choice.splits), choice.tile.k) * choice.tile.k
            assert (choice.splits - 1) * part < k <= choice.splits * part
            assert not choice.tile.descriptors


@pytest.mark.parametrize("limits", DEVICES, ids=ids)
def test_a_tile_holds_few_tokens_whole(limits):
    """Weights are read once for up to 64 tokens; beyond, waves decide, between tiles of no fewer rows."""
    for (dtype, precision), (n, k), epilogue in itertools.product(FORMATS, SHAPES, EPILOGUES):
        rows = [choose(tokens, n, k, dtype, precision, limits, **epilogue).tile.m for tokens in TOKEN_BUCKETS]
        assert rows[:3] == [16, 32, 64]
        assert min(rows[3:]) >= 64


def test_buckets():
    assert list(TOKEN_BUCKETS) == sorted(set(TOKEN_BUCKETS))
    assert [token_bucket(tokens) for tokens in (0, 1, 16, 17, 8192, 8193, 10**6)] == [16, 16, 16, 32, 8192, 8192, 8192]
    for tokens in (1, 100, 129, 5000):
        expected = choose(token_bucket(tokens), 3072, 768, torch.float16, "ieee", DEVICES[4], activation="gelu")
        assert choose(tokens, 3072, 768, torch.float16, "ieee", DEVICES[4], activation="gelu") == expected


def test_the_vendor_multiplies_where_it_is_better():
    def vendor(tokens, dtype=torch.bfloat16, precision="ieee", limits=DEVICES[4], **epilogue):
        return choose(tokens, 768, 768, dtype, precision, limits, **epilogue).vendor

    for limits in DEVICES:
        assert vendor(8192, limits=limits)
        assert not vendor(8192, limits=limits, activation="gelu")
        assert not vendor(8192, limits=limits, with_residual=True)
        assert not vendor(8192, limits=limits, gated=True)
        assert not vendor(16, limits=limits)
        for tokens, epilogue in itertools.product((1, 128, 8192), EPILOGUES):
            assert vendor(tokens, torch.float32, **epilogue)
            assert vendor(tokens, torch.float64, **epilogue)
    assert not vendor(8192, torch.float32, "tf32", activation="gelu")


def test_waves_decide_between_tiles():
    """The arithmetic of wave quantisation on 132 multiprocessors: 96 of 128 x 128 beat 48 of 128 x 256 and 384 of 64 x 64."""

    def tile(tokens, n, k=768):
        return choose(tokens, n, k, torch.bfloat16, "ieee", DEVICES[4], activation="gelu").tile[:2]

    assert tile(2048, 768) == (128, 128)
    assert tile(8192, 3072) == (128, 256)
    assert tile(128, 3072) == (64, 64)


def test_k_is_divided_where_few_tiles_would_leave_a_device_idle():
    device = torch.device("cpu")
    assert partial_splits(16, 768, 3072, torch.bfloat16, device) == 1
    with implementation("cuda"):  # limits of an H100
        few = [partial_splits(tokens, 768, 3072, torch.bfloat16, device) for tokens in (1, 16, 64, 128)]
        assert all(4 <= splits <= 8 for splits in few)
        assert partial_splits(16, 768, 768, torch.bfloat16, device) > 1
        assert partial_splits(16, 3072, 768, torch.bfloat16, device) == 1, "96 tiles without"
        assert partial_splits(2048, 768, 3072, torch.bfloat16, device) == 1
        assert partial_splits(16, 768, 3072, torch.float32, device) == 1
        assert partial_splits(16, 768, 3072, torch.float64, device) == 1
    # a second launch has to pay for itself
    options = {"dtype": torch.bfloat16, "precision": "ieee", "limits": DEVICES[4]}
    assert choose(16, 768, 768, **options).splits == 1
    assert choose(16, 768, 768, **options, partial=True).splits > 1
    assert choose(16, 768, 3072, **options).splits > 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("limits", DEVICES[1:], ids=ids)
def test_the_examination_has_every_tile(limits):
    """What the heuristics can choose for these models is among the configurations that are compiled without a GPU."""
    from fastencoder.kernels.linear.configurations import configurations

    def key(dtype, tile, gated, with_residual):
        with_residual = with_residual and tile.descriptors
        return (dtype.itemsize, tile.m, tile.n, tile.k, *tile[3:5], tile.descriptors, gated, with_residual)

    examined, names = set(), []
    for name, launch in configurations(limits):
        names.append(name)
        if launch.kernel.__name__ == "reduction_kernel":
            continue
        c, descriptors = launch.constants, launch.kernel.__name__ == "persistent_kernel"
        bias = launch.arguments["bias_ptr"]
        itemsize = 2 if name.split("-")[1] in ("fp16", "bf16") else 4
        with_residual = launch.arguments["residual_ptr"] is not None and descriptors
        columns = 2 * c["BLOCK_N"] if c["GATED"] else c["BLOCK_N"]
        shape = (itemsize, c["BLOCK_M"], columns, c["BLOCK_K"], launch.num_warps, launch.num_stages, descriptors)
        examined.add((*shape, c["GATED"], with_residual))
        assert bias is not None or c["SPLIT_K"]
    assert len(set(names)) == len(names)
    assert len(names) <= 60
    for dtype, _, _, _, options, choice in all_choices(limits):
        gated, with_residual = options.get("gated", False), options.get("with_residual", False)
        if choice.vendor or dtype == torch.float32 and gated or not options["aligned"] and gated:
            continue
        assert key(dtype, choice.tile, gated, with_residual) in examined or (
            gated and key(dtype, choice.tile, True, True) in examined
        ), (dtype, options, choice)
