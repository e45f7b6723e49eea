"""The rows, masks and cache of ``varlen_attention`` on CPU, in plain PyTorch."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import assert_within, random
from varlen_attention_testing import bound_of, check, decomposed_of, disentangled_of, expected_of, offsets_of, qkv_of

from fastencoder.kernels import native, varlen_attention
from fastencoder.kernels.varlen_attention import cpu, cpu_masks
from fastencoder.kernels.varlen_attention.features import PLAIN
from fastencoder.kernels.varlen_attention.rows import Limits, plan_rows

HEADS = 3
RAGGED = [5, 0, 40, 17, 1, 90, 33, 100, 130, 2, 8, 8, 260, 300]


@pytest.fixture(autouse=True)
def without_extension():
    with native.isa("none"):
        yield


def features_of(names, lengths, dtype=torch.float32):
    tokens, longest = sum(lengths), max(lengths)
    made = {
        "rope": lambda: {"rope": (random(1, tokens, 8, dtype=dtype, device="cpu"),) * 2 + (False,)},
        "window": lambda: {"window": (20, 30)},
        "relative": lambda: {"relative_bias": random(2, HEADS, 2 * 50 - 1, dtype=dtype, device="cpu")},
        "bias": lambda: {"bias": random(3, len(lengths), HEADS, longest, longest, dtype=dtype, device="cpu")},
        "shared_bias": lambda: {"bias": random(3, 1, 1, longest + 1, longest + 1, dtype=dtype, device="cpu")},
        "softcap": lambda: {"softcap": 2.0},
        "decomposed": lambda: {"decomposed": decomposed_of(longest, tokens, HEADS, 6, dtype, "cpu")},
        "disentangled": lambda: {"disentangled": disentangled_of(("c2p", "p2c"), tokens, HEADS, 50, 21, dtype, "cpu")},
    }
    return {key: value for name in names for key, value in made[name]().items()}


class Calls(list):
    """The shapes of queries, keys and masks of every dense call."""

    def __init__(self, monkeypatch):
        original = cpu._attend

        def noting(q, k, v, added, *rest):
            self.append((tuple(q.shape), tuple(k.shape), None if added is None else tuple(added.shape)))
            return original(q, k, v, added, *rest)

        monkeypatch.setattr(cpu, "_attend", noting)


@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    limits=st.builds(Limits, st.sampled_from([0, 24]), st.sampled_from([None, 20]), st.sampled_from([None, 1, 2000])),
)
@example(lengths=[0, 7, 7, 0, 7], limits=Limits(24, None, 100))
@example(lengths=[50, 49, 40, 30], limits=Limits(24, 20, None))
@example(lengths=[24, 12, 12, 3], limits=Limits(24, None, 600))
def test_rows(lengths, limits):
    """Every token in exactly one slot, among those of its own sequence; no call holds more than it may."""
    tokens = torch.arange(sum(lengths))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    seen = []
    for rows in plan_rows(tuple(lengths), limits):
        gather = tokens[rows.gather].view(rows.count, rows.length)
        scatter = tokens[rows.scatter] if isinstance(rows.scatter, slice) else rows.scatter
        used = scatter.view(gather.shape) < len(tokens)
        assert torch.equal(gather[used], scatter.view(gather.shape)[used])
        seen += gather[used].tolist()
        assert rows.segments is not None or used.all()
        for sequence, row, slots in rows.places:
            assert (numbers[gather[row, slots]] == sequence).all()
            assert torch.equal(gather[row, slots].diff(), torch.ones(slots.stop - slots.start - 1, dtype=torch.long))
            assert slots.stop - slots.start == lengths[sequence]
            if rows.segments is not None:
                same = rows.segments[row] == rows.segments[row, slots.start]
                assert torch.equal(same.nonzero().flatten(), torch.arange(rows.length)[slots])
        assert rows.shared == (len(rows.places) > rows.count)
        assert limits.cells is None or rows.count == 1 or rows.cells <= limits.cells
        if limits.similar is not None and rows.length > max(limits.similar, limits.shared):
            assert used.all()
    assert sorted(seen) == tokens.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names",
    [
        ["rope"], ["window"], ["relative"], ["bias"], ["shared_bias"], ["relative", "window", "rope"],
        ["relative", "shared_bias"], ["bias", "relative", "softcap"], ["rope", "softcap"],
        ["disentangled"], ["disentangled", "window", "shared_bias"], ["disentangled", "relative", "bias", "softcap"],
        ["decomposed"], ["decomposed", "window", "shared_bias"], ["decomposed", "disentangled"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("key_heads", [1, 3])
def test_ragged_batches(names, dtype, key_heads):
    """Shared rows, rows of similar lengths, and rows of several blocks of queries."""
    q, _, _ = qkv_of(RAGGED, HEADS, 16, dtype, "cpu")
    _, k, v = qkv_of(RAGGED, key_heads, 16, dtype, "cpu", seed=1)
    check("cpu", q, k, v, RAGGED, 0.25, **features_of(names, RAGGED, dtype))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=14),
    names=st.sets(st.sampled_from(["rope", "window", "relative", "bias", "softcap", "disentangled", "decomposed"])),
)
@example(lengths=[27, 70], names={"bias"})
def test_any_lengths_with_features(lengths, names):
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu")
    check("cpu", q, k, v, lengths, 0.25, **features_of(sorted(names), lengths))


@pytest.mark.parametrize(
    "names", [["rope"], ["relative"], ["bias"], ["window"], ["softcap"], ["disentangled"], ["decomposed"]]
)
def test_ragged_batches_take_few_calls(monkeypatch, names):
    lengths = [*range(1, 33), 110, 128]
    calls = Calls(monkeypatch)
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu")
    varlen_attention(q, k, v, offsets_of(lengths, "cpu"), 128, 0.25, **features_of(names, lengths))
    assert len(calls) == 2


def test_a_window_costs_what_it_shows(monkeypatch):
    calls = Calls(monkeypatch)
    q, k, v = qkv_of([2000], 1, 16, torch.float32, "cpu")
    varlen_attention(q, k, v, offsets_of([2000], "cpu"), 2000, 0.25, window=(10, 10))
    assert max(keys[2] for _, keys, _ in calls) <= 256 + 20


def test_long_rows_take_queries_that_fit(monkeypatch):
    calls = Calls(monkeypatch)
    monkeypatch.setattr(cpu, "_MASK_BYTES", 4 * HEADS * 700 * 40)
    lengths = [700, 700]
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu")
    check("cpu", q, k, v, lengths, 0.25, **features_of(["decomposed"], lengths))
    assert {queries[0] for queries, _, _ in calls} == {1}
    assert max(queries[2] for queries, _, _ in calls) == 40


def test_a_window_as_wide_as_the_sequences_is_none(monkeypatch):
    calls = Calls(monkeypatch)
    q, k, v = qkv_of([30] * 4, 2, 16, torch.float32, "cpu")
    for window, masked in (((29, 29), False), ((28, 29), True), ((29, 28), True), ((None, 29), False)):
        calls.clear()
        check("cpu", q, k, v, [30] * 4, 0.25, window=window)
        assert (calls[0][2] is not None) == masked


@pytest.mark.parametrize("names", [["relative"], ["bias"], ["window", "relative"], ["disentangled"], ["decomposed"]])
def test_masks_of_a_call_are_bounded(monkeypatch, names):
    calls = Calls(monkeypatch)
    monkeypatch.setattr(cpu, "_MASK_BYTES", 4 * 3 * 96 * 96 * 2)  # two shared rows
    lengths = [50, 40] * 6 + [97, 98]
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu")
    check("cpu", q, k, v, lengths, 0.25, **features_of(names, lengths))
    assert {queries[0] for queries, _, _ in calls} == {2, 1}
    assert len(calls) == 5


@pytest.mark.parametrize(
    "names", [["relative"], ["bias"], ["window", "rope"], ["disentangled", "softcap"], ["decomposed"]]
)
@pytest.mark.parametrize("lengths", [[30, 9, 12, 40], [200, 180, 190], [20, 20]])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_neighbour_of_the_row_never_leaks(names, lengths, bad):
    q, k, v = (x.clone() for x in qkv_of(lengths, HEADS, 16, torch.float32, "cpu"))
    features = features_of(names, lengths)
    if "bias" in features:
        features["bias"][1] = bad
    clean = slice(0, lengths[0])
    for x in (
        q,
        k,
        v,
        *features.get("rope", ())[:2],
        *features.get("disentangled", ())[:2],
        *features.get("decomposed", ()),
    ):
        x[clean.stop : clean.stop + lengths[1]] = bad
    out = varlen_attention(q, k, v, offsets_of(lengths, "cpu"), max(lengths), 0.25, **features)
    alone = dict(features)
    if "rope" in alone:
        alone["rope"] = (*(table[clean] for table in alone["rope"][:2]), False)
    if "disentangled" in alone:
        c2p, p2c, columns = alone["disentangled"]
        alone["disentangled"] = (c2p[clean], p2c[clean], columns)
    if "decomposed" in alone:
        alone["decomposed"] = tuple(x[clean] for x in alone["decomposed"])
    expected, spread = expected_of(q[clean], k[clean], v[clean], [lengths[0]], 0.25, **alone)
    assert_within(out[clean], expected, bound_of(torch.float32, spread, features))
    assert not out[clean.stop : clean.stop + lengths[1]].isfinite().any()


def test_products_of_distances_that_a_sequence_does_not_have():
    """Whatever they hold, also where unused slots of a row stand."""
    lengths, reach = [200, 170, 160], 256
    q, k, v = qkv_of(lengths, 2, 16, torch.float32, "cpu")
    columns = torch.arange(2 * reach - 1, dtype=torch.int32)
    products = random(4, 530, 2, 2 * reach - 1, dtype=torch.float32, device="cpu")
    products[370:, :, reach - 1 + 160 :] = products[370:, :, : reach - 160] = float("nan")
    assert products[370:].isnan().any()
    check("cpu", q, k, v, lengths, 0.25, disentangled=(products, products, columns))


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.contiguous(), lambda x: torch.cat((x, x), 2)[..., 2:21]])
def test_layouts_of_products(layout):
    c2p, p2c, columns = disentangled_of(("c2p", "p2c"), 42, HEADS, 40, 19, torch.float32, "cpu")
    q, k, v = qkv_of([30, 12], HEADS, 16, torch.float32, "cpu")
    check("cpu", q, k, v, [30, 12], 0.25, disentangled=(layout(c2p), layout(p2c), columns))


@pytest.fixture
def cache(monkeypatch):
    cache = cpu_masks.MaskCache()
    monkeypatch.setattr(cpu, "_masks", cache)
    return cache


def built_masks(monkeypatch):
    built = []
    original = cpu_masks.mask

    def noting(*args):
        built.append(args)
        return original(*args)

    for module in (cpu_masks, cpu):
        monkeypatch.setattr(module, "mask", noting)
    return built


@pytest.mark.parametrize("feature", ["relative", "bias", "window", None])
def test_a_mask_is_made_once_for_a_batch(monkeypatch, cache, feature):
    """Also if every layer brings its own tensor with the same biases by distance."""
    built = built_masks(monkeypatch)
    lengths = [30, 9, 12, 40]
    features = features_of([feature] if feature else [], lengths)
    for layer in range(3):
        q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu", seed=layer)
        check("cpu", q, k, v, lengths, 0.25, **features)
        if feature == "relative":
            features["relative_bias"] = features["relative_bias"].clone()
    assert len(built) == 1
    assert len(cache) == 1


@pytest.mark.parametrize("feature", ["relative", "bias"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_bias_is_seen(cache, feature, inference):
    lengths = [30, 9, 12, 40]
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu")
    with torch.inference_mode(inference):
        features = features_of([feature], lengths)
        (table,) = features.values()
        for change in (lambda: table.mul_(2), lambda: table[..., -9:].add_(1), lambda: table.zero_()):
            check("cpu", q, k, v, lengths, 0.25, **features)
            change()
        check("cpu", q, k, v, lengths, 0.25, **features)
        check("cpu", q, k, v, lengths, 0.25, **{name: table.clone() + 1 for name in features})
    other = features_of([feature], lengths, torch.float64)
    check("cpu", q, k, v, lengths, 0.25, **{name: table[:, :, :40, :40] if feature == "bias" else table[:, 40:-40]
                                            for name, table in other.items()})  # fmt: skip


def test_the_cache_keeps_no_bias_alive(cache):
    lengths = [30, 9, 12, 40]
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu")
    features = features_of(["bias"], lengths)
    check("cpu", q, k, v, lengths, 0.25, **features)
    assert len(cache) == 1
    del features
    gc.collect()
    assert len(cache) == 0


def test_the_cache_is_bounded():
    """The masks that were used last stay."""
    plans = [plan_rows((10, 20 + i), Limits(96, 256, None)) for i in range(6)]
    size = 4 * 35 * 35
    cache = cpu_masks.MaskCache(3 * size)

    def use(i):
        (rows,) = plans[i]
        everyone = range(rows.length)
        return cache.mask(rows, PLAIN, everyone, everyone, torch.float32)

    made = [use(i) for i in range(3)]
    assert use(0) is made[0]
    made += [use(i) for i in range(3, 4)]
    assert use(3) is made[3]
    assert use(0) is made[0]
    assert use(1) is not made[1]  # the one that had not been used for longest


def test_large_masks_are_not_kept(monkeypatch, cache):
    monkeypatch.setattr(cpu, "CACHE_BYTES", 1000)
    lengths = [30, 9, 12, 40]
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float32, "cpu")
    check("cpu", q, k, v, lengths, 0.25, **features_of(["relative"], lengths))
    assert len(cache) == 0
