"""Everything that ``varlen_attention`` offers beside plain attention, alone and together, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import ALL_IMPLEMENTATIONS, NATIVE, assert_within, device_of, dot_works, implementation, random
from varlen_attention_testing import (
    bound_of,
    check,
    decomposed_of,
    disentangled_of,
    expected_of,
    offsets_of,
    qkv_of,
    ragged_lengths,
)

from fastencoder.kernels import varlen_attention

# NumPy under the interpreter warns of NaN and infinity
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HEADS = 2
DIM = 24  # not a power of two
LOOPED = 129  # as a bound of the lengths it sends short sequences through the kernel for long ones


def rope_of(tokens, pairs, interleaved, device, dtype=torch.float32):
    """Random angles, so that no two tokens or pairs are confused."""
    angles = 3 * random(5, tokens, pairs, dtype=torch.float64, device="cpu")
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype), interleaved


def features_of(names, lengths, heads, device, dtype=torch.float32):
    """Keyword arguments for the features with these names."""
    tokens, longest = sum(lengths), max(lengths, default=0)
    made = {
        "causal": lambda: {"causal": True},
        "window": lambda: {"window": (9, 5)},
        "left": lambda: {"window": (20, None)},
        "right": lambda: {"window": (-1, 0)},
        "wide": lambda: {"window": (100, 90)},
        "softcap": lambda: {"softcap": 1.5},
        "rope": lambda: {"rope": rope_of(tokens, DIM // 2, False, device, dtype)},
        "interleaved": lambda: {"rope": rope_of(tokens, DIM // 2, True, device, dtype)},
        "partial": lambda: {"rope": rope_of(tokens, 5, False, device, dtype)},
        "partial_interleaved": lambda: {"rope": rope_of(tokens, 5, True, device, dtype)},
        "relative": lambda: {"relative_bias": random(6, heads, 2 * 7 - 1, dtype=dtype, device=device)},
        "bias": lambda: {"bias": random(7, len(lengths), heads, longest + 3, longest + 3, dtype=dtype, device=device)},
        "shared_bias": lambda: {"bias": random(8, 1, 1, longest, longest, dtype=dtype, device=device)},
    }
    made["decomposed"] = lambda: {"decomposed": decomposed_of(max(longest, LOOPED), tokens, heads, 7, dtype, device)}
    for kinds in (("c2p",), ("p2c",), ("c2p", "p2c")):
        made["+".join(kinds)] = lambda kinds=kinds: {
            "disentangled": disentangled_of(kinds, tokens, heads, 12, 9, dtype, device)
        }
    return {key: value for name in names for key, value in made[name]().items()}


ALONE = ["causal", "window", "left", "right", "softcap", "rope", "interleaved", "partial", "partial_interleaved"]
ALONE += ["relative", "bias", "shared_bias", "c2p", "p2c", "c2p+p2c", "decomposed"]


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_seqlen", [30, LOOPED])
@pytest.mark.parametrize("feature", ALONE)
def test_one_feature(name, dtype, max_seqlen, feature):
    """On the single-block kernel, the looped one (float32 always takes that), and the other implementations."""
    if not dot_works(name, dtype):
        pytest.skip("the interpreter cannot multiply bfloat16 matrices")
    if max_seqlen == LOOPED and (name != "triton" or dtype == torch.float32):
        pytest.skip("the bound changes nothing here")
    device, lengths = device_of(name), [7, 0, 30, 1]
    features = features_of([feature], lengths, HEADS, device, dtype)
    if "bias" in features:  # at least as large as max_seqlen
        bias = features["bias"]
        features["bias"] = torch.nn.functional.pad(bias, (0, max_seqlen, 0, max_seqlen))
    q, k, v = qkv_of(lengths, HEADS, DIM, dtype, device)
    check(name, q, k, v, lengths, DIM**-0.5, max_seqlen, **features)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    lengths=ragged_lengths(40),
    key_heads=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    positions=st.sampled_from(["rope", "interleaved", "partial", "partial_interleaved", None]),
    sight=st.sampled_from(["causal", "window", "left", "right", None]),
    others=st.sets(st.sampled_from(["softcap", "relative", "shared_bias", "c2p+p2c", "decomposed"])),
)
@example(
    lengths=[3, 150, 0], key_heads=1, dtype=torch.float16, positions="interleaved", sight="window", others={"softcap"}
)
@example(
    lengths=[40], key_heads=1, dtype=torch.float32, positions="rope", sight="causal", others={"relative", "softcap"}
)
def test_features_together(name, lengths, key_heads, dtype, positions, sight, others):
    device = device_of(name)
    names = [feature for feature in (positions, sight, *sorted(others)) if feature]
    features = features_of(names, lengths, HEADS, device)
    q, _, _ = qkv_of(lengths, HEADS, DIM, dtype, device)
    _, k, v = qkv_of(lengths, key_heads, DIM, dtype, device, seed=1)
    check(name, q, k, v, lengths, DIM**-0.5, **features)


@pytest.mark.parametrize("name", ["cpu", "triton", *NATIVE])
@pytest.mark.parametrize("feature", ["causal", "wide", "window"])
def test_windows_of_long_sequences(name, feature):
    """Masked blocks at both edges, whole blocks between them, and blocks that are skipped; several blocks of queries."""
    lengths = [300, 3]
    device = device_of(name)
    check(
        name,
        *qkv_of(lengths, 1, 16, torch.float16, device),
        lengths,
        0.25,
        **features_of([feature], lengths, 1, device),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_keys_outside_the_window_of_a_tile_are_not_read(dtype):
    """NaN that is only masked would come through as zero times NaN."""
    device, length, tile = device_of("triton"), 200, slice(64, 128)
    q, k, v = (x.clone() for x in qkv_of([length], 1, 16, dtype, device))
    expected, spread = expected_of(q, k, v, [length], 0.25, window=(9, 10))
    for x in (k, v):
        x[: tile.start - 9], x[tile.stop + 10 :] = float("nan"), float("nan")
    with implementation("triton"):
        out = varlen_attention(q, k, v, offsets_of([length], device), length, 0.25, window=(9, 10))
    assert_within(out[tile], expected[tile], bound_of(dtype, spread[tile], {}))


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("max_seqlen", [20, LOOPED])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_query_that_sees_no_key_gives_zero(name, dtype, max_seqlen, softcap):
    device, lengths = device_of(name), [20, 9]
    bias = torch.zeros(1, 1, LOOPED, LOOPED, device=device)
    bias[..., 3, :] = float("-inf")
    bias[..., 5, 1:] = float("-inf")  # this one sees a single key
    q, k, v = qkv_of(lengths, HEADS, 16, dtype, device)
    out = check(name, q, k, v, lengths, 0.25, max_seqlen, bias=bias, softcap=softcap)
    assert not out[3].any()
    assert not out[23].any()
    assert torch.equal(out[5], v[0])


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("max_seqlen", [20, LOOPED])
def test_the_lowest_number_as_bias(name, max_seqlen):
    """transformers hides keys with the lowest number of the dtype; where it hides all of them, all count the same."""
    device, lengths = device_of(name), [20]
    bias = torch.zeros(1, 1, LOOPED, LOOPED, device=device)
    bias[..., 3, :] = torch.finfo(torch.float32).min
    q, k, v = qkv_of(lengths, HEADS, 16, torch.float16, device)
    with implementation(name):
        out = varlen_attention(q, k, v, offsets_of(lengths, device), max_seqlen, 0.25, bias=bias)
    mean = v.double().mean(0).cpu()
    assert_within(out[3], mean, 2e-3 * v.double().cpu().abs().mean(0))


def test_softcap_keeps_the_digits_of_small_scores():
    """Two keys, one with the score 0 and one with a large score under a larger cap, which a bias brings near 0 again."""
    cap, device = 1000.0, device_of("triton")
    scores = torch.linspace(-900, 900, 41, dtype=torch.float64)
    q, k, v = torch.zeros(3, 82, 1, 16, device=device)
    q[::2, 0, 0], k[::2, 0, 0], v[::2] = scores.to(device, torch.float32), 1.0, 1.0
    bias = torch.zeros(41, 1, 2, 2, device=device)
    bias[:, 0, 0, 0] = -(cap * torch.tanh(scores / cap))
    left = cap * torch.tanh(scores / cap) + bias[:, 0, 0, 0].double().cpu()  # what float32 leaves of the sum
    with implementation("triton"):
        out = varlen_attention(q, k, v, offsets_of([2] * 41, device), 2, 1.0, softcap=cap, bias=bias)
    small = scores.abs() < 0.3 * cap
    bound = torch.where(small, scores.abs() * 1e-6 + 1e-6, cap * 1e-6) / 4  # the slope of the softmax is 1 / 4
    assert_within(out[::2, 0, 0], torch.sigmoid(left), bound)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_neighbours_never_leak(name, dtype, bad):
    """Not through the tables of rotary embedding either."""
    device, lengths = device_of(name), [12, 25, 5]
    rows = slice(12, 37)
    features = features_of(["partial", "window", "softcap", "c2p+p2c", "decomposed"], lengths, HEADS, device)
    q, k, v = (x.clone() for x in qkv_of(lengths, HEADS, DIM, dtype, device))
    for x in (q, k, v, *features["rope"][:2], *features["disentangled"][:2], *features["decomposed"]):
        keep = x[rows].clone()
        x.fill_(bad)
        x[rows] = keep
    with implementation(name):
        out = varlen_attention(q, k, v, offsets_of(lengths, device), 25, 0.2, **features)
    cos, sin, style = features.pop("rope")
    features["rope"] = (cos[rows], sin[rows], style)
    c2p, p2c, columns = features.pop("disentangled")
    features["disentangled"] = (c2p[rows], p2c[rows], columns)
    features["decomposed"] = tuple(x[rows] for x in features["decomposed"])
    expected, spread = expected_of(q[rows], k[rows], v[rows], [25], 0.2, **features)
    assert_within(out[rows], expected, bound_of(dtype, spread, features))


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("feature", [None, "interleaved", "wide", "relative", "c2p+p2c", "decomposed"])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_permuting_sequences_permutes_the_result(name, dtype, feature, data):
    """Bit for bit."""
    lengths = data.draw(ragged_lengths(24))
    order = data.draw(st.permutations(range(len(lengths))))
    device, longest = device_of(name), max(lengths, default=0)
    q, k, v = qkv_of(lengths, HEADS, DIM, dtype, device)
    features = features_of([feature] if feature else [], lengths, HEADS, device)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    rows = torch.tensor([t for s in order for t in range(starts[s], starts[s] + lengths[s])], dtype=torch.long)
    moved = dict(features)
    if "rope" in moved:
        cos, sin, style = moved["rope"]
        moved["rope"] = (cos[rows], sin[rows], style)
    if "disentangled" in moved:
        c2p, p2c, columns = moved["disentangled"]
        moved["disentangled"] = (c2p[rows], p2c[rows], columns)
    if "decomposed" in moved:
        moved["decomposed"] = tuple(x[rows] for x in moved["decomposed"])
    with implementation(name):
        out = varlen_attention(q, k, v, offsets_of(lengths, device), longest, 0.2, **features)
        offsets = offsets_of([lengths[s] for s in order], device)
        again = varlen_attention(q[rows], k[rows], v[rows], offsets, longest, 0.2, **moved)
    assert torch.equal(again, out[rows])


def test_arguments_of_the_operator():
    """Through torch.ops and torch.compile: every feature arrives, and shapes are known without running."""
    lengths = [5, 0, 9]
    q, k, v = qkv_of(lengths, HEADS, DIM, torch.float32, "cpu")
    names = ["window", "softcap", "partial_interleaved", "relative", "bias", "c2p+p2c", "decomposed"]
    features = features_of(names, lengths, HEADS, "cpu")
    offsets = offsets_of(lengths, "cpu")
    cos, sin, style = features["rope"]
    left, right = features["window"]
    arguments = (q, k, v, offsets, 9, 0.2, left, right, 1.5, cos, sin, style)
    arguments += (features["relative_bias"], features["bias"], *features["disentangled"], *features["decomposed"])
    expected = check("cpu", q, k, v, lengths, 0.2, **features)
    assert torch.equal(torch.ops.fastencoder.varlen_attention(*arguments), expected)
    torch.library.opcheck(torch.ops.fastencoder.varlen_attention.default, arguments)
    compiled = torch.compile(varlen_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, offsets, 9, 0.2, **features), expected)


@pytest.mark.parametrize(
    "bad",
    [
        "window", "softcap", "tables", "pairs", "relative", "heads", "bias", "small bias", "products", "widths",
        "no products", "even columns", "long columns", "no columns", "rel_h", "no rel_w", "grid",
    ],
)  # fmt: skip
def test_wrong_features(bad):
    x, offsets = torch.zeros(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    table = torch.zeros(4, 8)
    products, columns = torch.zeros(4, 2, 8), torch.zeros(7, dtype=torch.int32)
    features, message = {
        "window": ({"window": (-2, 0)}, "a window reaches 0 tokens or more"),
        "softcap": ({"softcap": 0.0}, "softcap must be positive"),
        "tables": ({"rope": (table, table[:3], False)}, "cos and sin must be"),
        "pairs": ({"rope": (torch.zeros(4, 9), torch.zeros(4, 9), False)}, "cos and sin must be"),
        "relative": ({"relative_bias": torch.zeros(2, 8)}, "relative_bias must be"),
        "heads": ({"relative_bias": torch.zeros(3, 7)}, "relative_bias must be"),
        "bias": ({"bias": torch.zeros(2, 1, 4, 4)}, "bias must be"),
        "small bias": ({"bias": torch.zeros(1, 1, 3, 3)}, "bias must be"),
        "products": ({"disentangled": (torch.zeros(4, 3, 8), None, columns)}, "c2p and p2c must be"),
        "widths": ({"disentangled": (torch.zeros(4, 2, 8), torch.zeros(4, 2, 9), columns)}, "c2p and p2c must be"),
        "no products": ({"disentangled": (None, None, columns)}, "c2p and p2c must be"),
        "even columns": ({"disentangled": (products, products, columns[1:])}, "columns must be int32"),
        "long columns": ({"disentangled": (products, None, columns.long())}, "columns must be int32"),
        "rel_h": ({"decomposed": (products[:3], products)}, "rel_h and rel_w must be"),
        "no rel_w": ({"decomposed": (products, None)}, "rel_h and rel_w must be"),
        "grid": ({"decomposed": (products[..., :3], products[..., :1])}, "grid of 3 x 1 has less than 4 tokens"),
        "no columns": ({"disentangled": (None, products, None)}, "columns must be int32"),
    }[bad]
    with pytest.raises(ValueError, match=message):
        varlen_attention(x, x, x, offsets, 4, 1.0, **features)
