"""Biases by distance: never spelled out while layers run fast, restored for a layer that does not, right for every padding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastencoder
from fastencoder.layers import FastOwner
from fastencoder.packing import PackedBatch
from tests.conformance import batches, case, measure
from tests.conformance.cases import BY_ID

MPNET, T5 = "mpnet.MPNetLayer", "t5.T5Block.gated_encoder"
MAKERS = {MPNET: "encoder.compute_position_bias", T5: "encoder.block.0.layer.0.SelfAttention.compute_bias"}


def _models(name: str) -> tuple[nn.Module, nn.Module]:
    stock = case.build(BY_ID[name])
    return stock, fastencoder.to_fast(copy.deepcopy(stock))


def _count_calls(monkeypatch: pytest.MonkeyPatch, model: nn.Module, path: str) -> list[object]:
    """The results of the original method that spells the bias out."""
    owner_path, _, method = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    cls = getattr(type(owner), "original_class", type(owner))
    original, results = getattr(cls, method), []

    def spy(*args: object, **kwargs: object) -> object:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(cls, method, spy)
    return results


def _layers(name: str, model: nn.Module) -> list[nn.Module]:
    return BY_ID[name].layers(model)


def _compare(name: str, stock: nn.Module, fast: nn.Module, pattern: str) -> None:
    batch = batches.build(BY_ID[name], stock, pattern)
    theirs = measure.last_real(BY_ID[name], measure.run(stock, batch), batch)
    ours = measure.last_real(BY_ID[name], measure.run(fast, batch), batch)
    assert measure.error(ours, theirs) <= measure.FP32_BAR


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("pattern", batches.ALL)
def test_the_bias_is_not_spelled_out(name: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fast = _models(name)
    batch = batches.build(BY_ID[name], stock, pattern)
    made = _count_calls(monkeypatch, fast, MAKERS[name])
    measure.run(fast, batch)
    assert not made
    assert all(layer._fastencoder.fast_calls == 1 for layer in _layers(name, fast))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("delegating", [0, 1])
def test_a_delegated_layer_is_given_the_bias(name: str, delegating: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fast = _models(name)
    made = _count_calls(monkeypatch, fast, MAKERS[name])
    layers = _layers(name, fast)
    linear = next(module for module in layers[delegating].modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda *_: None)  # the layer is no longer what was checked
    _compare(name, stock, fast, batches.RIGHT)
    assert made
    assert [layer._fastencoder.delegated_calls for layer in layers] == [int(i == delegating) for i in range(len(layers))]


@pytest.mark.parametrize("name", MAKERS)
def test_somebody_who_looks_at_a_layer_sees_the_bias(name: str) -> None:
    stock, fast = _models(name)
    seen = []

    def look(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("position_bias", args[2] if len(args) > 2 else None)
        seen.append(given)

    _layers(name, fast)[1].register_forward_pre_hook(look, with_kwargs=True)
    _compare(name, stock, fast, batches.RIGHT)
    assert isinstance(seen[-1], torch.Tensor) and seen[-1].dim() == 4


def test_a_t5_block_alone_returns_its_bias() -> None:
    stock, fast = _models(T5)
    hidden = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs, their_bias, _ = _layers(T5, stock)[0](hidden)
        ours, our_bias, rest = _layers(T5, fast)[0](hidden)
        again, given_back, _ = _layers(T5, fast)[1](hidden, None, our_bias)
        expected, _, _ = _layers(T5, stock)[1](hidden, None, their_bias)
    assert rest is None and torch.equal(our_bias, their_bias) and given_back is our_bias
    assert measure.error(ours, theirs) <= measure.FP32_BAR and measure.error(again, expected) <= measure.FP32_BAR
    assert all(layer._fastencoder.fast_calls == 1 for layer in _layers(T5, fast)[:2])


def test_a_dense_bias_follows_the_tokens() -> None:
    """Blocks that are given a bias for every pair of positions, with padding anywhere."""
    stock, fast = _models(T5)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(4, 13, 48, generator=generator)
    layer, original = _layers(T5, fast)[1], _layers(T5, stock)[1]
    for pattern in (batches.RIGHT, batches.LEFT, batches.HOLES):
        mask = batches.mask(pattern).bool()
        for rows in (1, 4):
            bias = torch.randn(rows, 3, 13, 13, generator=generator)
            with torch.no_grad():
                ours = layer(hidden, mask[:, None, None, :], bias)[0]
                theirs = original(hidden, mask[:, None, None, :], bias)[0]
            assert measure.error(ours[mask], theirs[mask]) <= measure.FP32_BAR, (pattern, rows)
    assert layer._fastencoder.delegated_calls == 0


def test_layers_after_one_without_a_bias_of_its_own_are_delegated() -> None:
    stock, fast = _models(T5)
    hidden = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, theirs = _layers(T5, fast)[1](hidden)[0], _layers(T5, stock)[1](hidden)[0]
    assert torch.equal(ours, theirs)
    assert "position_bias" in _layers(T5, fast)[1]._fastencoder.last_reason


def test_the_owner_is_swapped_and_given_back() -> None:
    stock, fast = _models(MPNET)
    assert isinstance(fast.encoder, FastOwner) and isinstance(fast.encoder, type(stock.encoder))
    copied = pickle.loads(pickle.dumps(fast))
    _compare(MPNET, stock, copied, batches.LEFT)
    fastencoder.reverse(fast)
    assert type(fast.encoder) is type(stock.encoder)
    _compare(MPNET, stock, fast, batches.LEFT)


@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        (["1110", "1000"], "right"),
        (["1110", "0000", "1100"], "right"),
        (["1111", "1111"], "right"),
        (["0111", "1110"], "run"),
        (["0110", "0000"], "run"),
        (["1110", "0011", "1101"], "holes"),
        (["0101", "1111"], "holes"),
    ],
)
def test_layout_of_a_batch(rows: list[str], layout: str) -> None:
    mask = torch.tensor([[int(digit) for digit in row] for row in rows])
    batch = PackedBatch.from_padded(torch.zeros(*mask.shape, 2), mask)
    assert batch.layout == layout
    for row, positions in zip(mask, batch.positions(), strict=True):
        count = int(row.sum())
        assert positions[:count].tolist() == row.nonzero()[:, 0].tolist()
        assert positions.shape[0] == batch.max_seqlen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pattern", [batches.RIGHT, batches.HOLES])
@pytest.mark.parametrize("name", ["t5.T5Block", T5])
def test_the_last_projection_may_stay_in_float32(name: str, dtype: torch.dtype, pattern: str) -> None:
    """As transformers loads T5 in half precision: at most twice the error of the stock model."""
    stock32 = case.build(BY_ID[name])
    stock = copy.deepcopy(stock32).to(dtype)
    for layer in _layers(name, stock):
        layer.layer[1].DenseReluDense.wo.float()
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        batch = batches.build(BY_ID[name], stock32, pattern, seed=seed)
        exact = measure.last_real(BY_ID[name], measure.run(stock32, batch), batch).double()
        for index, model in enumerate((fast, stock)):
            value = measure.last_real(BY_ID[name], measure.run(model, batch), batch)
            assert value.dtype == dtype
            errors[index] += (value.double() - exact).square().sum()
    ours, theirs = errors.sqrt().tolist()
    assert ours <= 2 * theirs
    assert all(layer._fastencoder.delegated_calls == 0 for layer in _layers(name, fast))
    hidden = torch.randn(2, 5, 48, dtype=dtype)
    with torch.no_grad():
        assert _layers(name, fast)[0](hidden)[0].dtype == _layers(name, stock)[0](hidden)[0].dtype == torch.float32
