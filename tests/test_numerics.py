"""Numbers at the edges: masks of -10000, infinities and NaN, outliers, very short and very long sequences, and sizes beyond
int32. What the original answers, the converted model answers."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from fastencoder import packing, to_fast
from fastencoder.kernels import native, varlen_attention
from fastencoder.packing import PackedBatch

from . import tiny
from .conformance import batches, measure
from .conformance import case as case_module
from .conformance.cases import BY_ID
from .conformance.weights import sharpen

# Post-LN in one native call; pre-LN; biases by distance with RMS norms; windows and rotary positions with a gated block;
# disentangled positions.
NAMED = (
    "bert.BertLayer",
    "mbart.MBartEncoderLayer",
    "mpnet.MPNetLayer",
    "t5.T5Block.gated_encoder",
    "modernbert.ModernBertEncoderLayer",
    "deberta_v2.DebertaV2Layer",
)
BAD = {"NaN": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@cache
def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    stock = case_module.build(BY_ID[name])
    return stock, to_fast(copy.deepcopy(stock))


def _with_a_bad_token(model: nn.Module, value: float) -> None:
    """One number of what token 7 is embedded as."""
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[7, 3] = value


@pytest.mark.parametrize("isa", native.ISAS[: native.best + 1])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMED)
def test_bad_numbers_are_where_the_original_has_them(name: str, bad: str, isa: str) -> None:
    case, (stock, fast) = BY_ID[name], _pair(name)
    stock, fast = copy.deepcopy(stock), copy.deepcopy(fast)
    batch = batches.build(case, stock, batches.RIGHT)
    ids = batch.inputs["input_ids"]
    ids[ids == 7] = 8
    ids[1, 2] = 7
    for model in (stock, fast):
        _with_a_bad_token(model, BAD[bad])
    theirs = measure.last_real(case, measure.run(stock, batch), batch)
    with native.isa(isa):
        ours = measure.last_real(case, measure.run(fast, batch), batch)
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
    assert not torch.isfinite(ours).all() and torch.isfinite(ours).any()
    sound = torch.isfinite(theirs)
    assert measure.error(ours[sound], theirs[sound]) < 1e-5


@pytest.mark.parametrize("value", [-10000.0, torch.finfo(torch.float32).min, float("-inf")])
def test_additive_masks(value: float) -> None:
    """A row of nothing but padding is the mean of all its tokens in the original, and zeros here; the others are the same."""
    stock = tiny.bert()
    fast = to_fast(copy.deepcopy(stock))
    real = tiny.ragged()["attention_mask"].bool()
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(5, 1, 1, 12).masked_fill(~real[:, None, None], value)
    with torch.inference_mode():
        theirs = stock.encoder(hidden, attention_mask=mask).last_hidden_state
        ours = fast.encoder(hidden, attention_mask=mask).last_hidden_state
    assert tiny.relative_error(ours, theirs, real) < 1e-6
    assert (ours[~real] == 0).all()
    assert tiny.calls(fast) == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", native.ISAS[: native.best + 1])
def test_outliers(dtype: torch.dtype, isa: str) -> None:
    """Hidden states of N(0, 1) with one in a thousand of N(0, 100) on top: no more error than the original has."""
    stock = tiny.bert(hidden_size=96, num_attention_heads=3, intermediate_size=384).to(dtype)
    exact, fast = copy.deepcopy(stock).double(), to_fast(copy.deepcopy(stock))
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(8, 64, 96, generator=generator)
    large = torch.rand(hidden.shape, generator=generator) < 1e-3
    assert large.any()
    hidden = (hidden + 100 * torch.randn(hidden.shape, generator=generator) * large).to(dtype)
    real = torch.arange(64) < torch.randint(1, 64, (8, 1), generator=generator)
    mask = torch.zeros(8, 1, 1, 64).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min).to(dtype)
    with torch.inference_mode(), native.isa(isa):
        reference = exact.encoder(hidden.double(), attention_mask=mask.double()).last_hidden_state
        theirs = stock.encoder(hidden, attention_mask=mask).last_hidden_state
        ours = fast.encoder(hidden, attention_mask=mask).last_hidden_state
    error, own = (tiny.relative_error(x, reference, real) for x in (ours, theirs))
    assert error <= max(1e-5 if dtype == torch.float32 else 0.0, 1.5 * own)
    assert tiny.calls(fast) == (3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.ISAS[: native.best + 1])
def test_sequences_of_one_and_of_8192_tokens(isa: str) -> None:
    config = BertConfig(**{**tiny.SIZES, "num_hidden_layers": 1}, vocab_size=99, max_position_embeddings=8192)
    stock = BertModel(config).eval()
    sharpen(stock)
    fast = to_fast(copy.deepcopy(stock))
    ids = torch.randint(5, 99, (2, 8192), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 8192, dtype=torch.long)
    mask[0, 1:] = 0
    with torch.inference_mode(), native.isa(isa):
        ours = fast(input_ids=ids, attention_mask=mask).last_hidden_state
        short = stock(input_ids=ids[:1, :1]).last_hidden_state
        long = stock(input_ids=ids[1:]).last_hidden_state
    assert tiny.relative_error(ours[:1, :1], short) < 1e-6
    assert tiny.relative_error(ours[1:], long) < 1e-5
    assert (ours[0, 1:] == 0).all() and tiny.calls(fast) == (1, 0)


@pytest.mark.parametrize("shape", [(0, 1), (0, 64)])
def test_no_sequences(shape: tuple[int, int]) -> None:
    fast = to_fast(tiny.bert())
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
    with torch.inference_mode():
        for given in ({}, {"attention_mask": mask}):
            assert fast(input_ids=ids, **given).last_hidden_state.shape == (*shape, 48)


@pytest.mark.parametrize("isa", native.ISAS[: native.best + 1])
def test_attention_over_no_sequences(isa: str) -> None:
    nothing = torch.empty(0, 3, 16)
    for offsets in ([0], [0, 0, 0]):
        with native.isa(isa):
            out = varlen_attention(nothing, nothing, nothing, torch.tensor(offsets, dtype=torch.int32), 0, 0.25)
        assert out.shape == (0, 3, 16)
    batch = PackedBatch.from_offsets(torch.empty(0, 48), torch.tensor([0, 0]))
    assert batch.lengths == (0,) and batch.max_seqlen == 0


def _huge(*shape: int) -> torch.Tensor:
    """Of any size, and in the memory of one number."""
    return torch.zeros(1).expand(shape)


def test_more_positions_than_32_bits_count() -> None:
    """Said before anything is made: neither offsets nor indices wrap around."""
    side = 2**16
    with pytest.raises(ValueError, match=r"a batch of 2,147,483,648 positions is too large.*Split the batch"):
        PackedBatch.geometry(_huge(side, side // 2, 1), None)
    with pytest.raises(ValueError, match="positions is too large"):  # most of which are padding
        PackedBatch.geometry(_huge(side, side // 2, 1), torch.zeros(1, 1, dtype=torch.bool).expand(side, side // 2))
    with pytest.raises(ValueError, match="positions is too large"):
        PackedBatch.from_offsets(_huge(side * side // 2, 1), torch.tensor([0, side * side // 2]))
    most = PackedBatch.geometry(_huge(1, packing.MOST_POSITIONS, 1), None)
    assert most.offsets.tolist() == [0, packing.MOST_POSITIONS]


def test_a_layer_says_so_too() -> None:
    fast = to_fast(tiny.bert())
    with torch.inference_mode(), pytest.raises(ValueError, match="Split the batch"):
        fast.encoder(_huge(2**16, 2**15, 48))
    with torch.inference_mode():  # and it still works
        assert torch.isfinite(fast(**tiny.ragged()).last_hidden_state).all()
