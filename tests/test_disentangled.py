"""DeBERTa: nothing over all pairs of tokens is made, positions are projected once, and what is unusual is delegated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastencoder
from fastencoder.layers import FastOwner
from fastencoder.packing import PackedBatch
from tests.conformance import batches, case, measure
from tests.conformance.cases import BY_ID

V2, CONVOLUTION, V1 = "deberta_v2.DebertaV2Layer", "deberta_v2.DebertaV2Layer.convolution", "deberta.DebertaLayer"


def _models(name: str) -> tuple[nn.Module, nn.Module]:
    stock = case.build(BY_ID[name])
    return stock, fastencoder.to_fast(copy.deepcopy(stock))


def _error(name: str, stock: nn.Module, fast: nn.Module, pattern: str, seed: int = 0) -> float:
    batch = batches.build(BY_ID[name], stock, pattern, seed=seed)
    theirs = measure.last_real(BY_ID[name], measure.run(stock, batch), batch)
    return measure.error(measure.last_real(BY_ID[name], measure.run(fast, batch), batch), theirs)


@pytest.mark.parametrize("name", [V2, CONVOLUTION, V1])
def test_no_mask_and_no_distances_are_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fast = _models(name)
    assert isinstance(fast.encoder, FastOwner)
    for pattern in batches.ALL:  # a class that is not known by its source is compared with its original at first
        measure.run(fast, batches.build(BY_ID[name], fast, pattern))
    cls = type(stock.encoder)
    for method in ("get_attention_mask", "get_rel_pos"):
        monkeypatch.setattr(cls, method, lambda *_: pytest.fail("made although all layers run fast"))
    for pattern in batches.ALL:
        measure.run(fast, batches.build(BY_ID[name], fast, pattern))
    assert all(layer._fastencoder.delegated_calls == 0 for layer in fast.encoder.layer)


@pytest.mark.parametrize("name", [V2, CONVOLUTION, V1])
@pytest.mark.parametrize("delegating", [0, 1])
def test_a_delegated_layer_is_given_mask_and_distances(name: str, delegating: int) -> None:
    stock, fast = _models(name)
    fast.encoder.layer[delegating].output.dense.register_forward_hook(lambda *_: None)
    assert _error(name, stock, fast, batches.HOLES) <= measure.FP32_BAR
    counted = [layer._fastencoder.delegated_calls for layer in fast.encoder.layer]
    assert counted == [int(index == delegating) for index in range(len(counted))]


@pytest.mark.parametrize("name", [V2, V1])
def test_positions_follow_their_weights(name: str) -> None:
    """The projected positions are kept from one forward to the next: not beyond a change of what they are made of."""
    stock, fast = _models(name)
    attention = "encoder.layer.1.attention.self."
    changed = ["encoder.rel_embeddings", attention + ("key_proj" if name == V2 else "pos_proj")]
    changed += ["encoder.LayerNorm"] if name == V2 else [attention + "pos_q_proj"]
    assert _error(name, stock, fast, batches.RIGHT) <= measure.FP32_BAR
    for path in changed:
        for model in (stock, fast):
            with torch.no_grad():
                model.get_submodule(path).weight.mul_(1.5)
        for seed in (0, 1):
            assert _error(name, stock, fast, batches.RIGHT, seed) <= measure.FP32_BAR, path
    assert all(layer._fastencoder.delegated_calls == 0 for layer in fast.encoder.layer)


def test_positions_are_projected_once() -> None:
    _, fast = _models(V2)
    kept = []
    for seed, pattern in enumerate((batches.RIGHT, batches.NONE, batches.HOLES)):
        measure.run(fast, batches.build(BY_ID[V2], fast, pattern, seed=seed))
        kept.append([layer._fastencoder.binding.memo["positions"] for layer in fast.encoder.layer])
    assert all(first is second is third for first, second, third in zip(*kept, strict=True))
    assert len({id(embeddings) for embeddings, _ in kept[0]}) == 1  # one copy for all layers


def test_a_layer_by_itself() -> None:
    """Called with the tensors that the original encoder makes: the mask is read, distances from outside are delegated."""
    stock, fast = _models(V2)
    batch = batches.build(BY_ID[V2], stock, batches.HOLES)
    real, mask = batch.real, batch.inputs["attention_mask"]
    hidden = torch.randn(*mask.shape, 48, generator=torch.Generator().manual_seed(6))
    layer, original = fast.encoder.layer[0], stock.encoder.layer[0]
    with torch.no_grad():
        pairs, distances = stock.encoder.get_attention_mask(mask), stock.encoder.get_rel_pos(hidden)
        embeddings = stock.encoder.get_rel_embedding()
        expected = original(hidden, pairs, relative_pos=distances, rel_embeddings=embeddings)[0]
        for given in (None, distances):
            ours, nothing = layer(hidden, pairs, relative_pos=given, rel_embeddings=embeddings)
            assert nothing is None and measure.error(ours[real], expected[real]) <= measure.FP32_BAR
        assert (layer._fastencoder.fast_calls, layer._fastencoder.delegated_calls) == (1, 1)
        assert "relative_pos" in layer._fastencoder.last_reason
        causal = pairs * torch.ones_like(pairs).tril()
        expected = original(hidden, causal, rel_embeddings=embeddings)[0]
        assert torch.equal(layer(hidden, causal, rel_embeddings=embeddings)[0], expected)


def test_somebody_who_looks_at_a_layer_sees_tensors() -> None:
    stock, fast = _models(V2)
    seen: dict[str, object] = {}

    def look(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update(kwargs, mask=args[1])

    fast.encoder.layer[0].register_forward_pre_hook(look, with_kwargs=True)
    assert _error(V2, stock, fast, batches.LEFT) <= measure.FP32_BAR
    assert isinstance(seen["mask"], torch.Tensor) and seen["mask"].dim() == 4
    assert isinstance(seen["relative_pos"], torch.Tensor) and seen["relative_pos"].dim() == 3


@pytest.mark.parametrize("name", [V2, V1, "mpnet.MPNetLayer", "t5.T5Block.gated_encoder", "umt5.UMT5Block"])
def test_compiled(name: str) -> None:
    stock, fast = _models(name)
    stock, fast = (model.encoder if "T5" in name else model for model in (stock, fast))
    torch._dynamo.reset()
    try:
        compiled = torch.compile(fast, backend="eager")
        batch = batches.build(BY_ID[name], stock, batches.RIGHT)
        batch.inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
        theirs = measure.run(stock, batch).last_hidden_state
        ours = measure.run(compiled, batch).last_hidden_state
    finally:
        torch._dynamo.reset()
    assert measure.error(ours[batch.real], theirs[batch.real]) <= measure.FP32_BAR


def test_tokens_stay_packed_unless_hidden_states_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop keeps every layer's output; only its model's caller says whether anybody reads it."""
    taken: list[object] = []
    original = PackedBatch.take
    monkeypatch.setattr(PackedBatch, "take", lambda batch, hidden: (taken.append(batch), original(batch, hidden))[1])

    def packed_times(name: str, fast: nn.Module, **more: object) -> int:
        taken.clear()
        measure.run(fast, batches.build(BY_ID[name], fast, batches.RIGHT), **more)
        return len(taken)

    for name in (V2, V1):
        _, fast = _models(name)
        layers = len(fast.encoder.layer)
        assert packed_times(name, fast) == 1
        assert packed_times(name, fast, output_hidden_states=True) == layers
        assert packed_times(name, fast, output_hidden_states=False, return_dict=False) == 1
        fast.config.output_hidden_states = True
        assert packed_times(name, fast) == packed_times(name, fast, output_hidden_states=None) == layers
        fast.config.output_hidden_states = False
        handle = fast.encoder.register_forward_hook(lambda *_: None)
        assert packed_times(name, fast) == layers
        handle.remove()
        assert packed_times(name, fast) == 1
        if name == V2:
            fast.z_steps = 2
            with pytest.raises(AttributeError):  # the original appends to a tuple
                packed_times(name, fast)
            assert len(taken) == layers
        hooks = len(fast._forward_pre_hooks)
        fastencoder.reverse(fast)
        assert hooks == 1 and not fast._forward_pre_hooks and not fast._forward_hooks and not fast.encoder._forward_hooks
    _, fast = _models(CONVOLUTION)
    assert packed_times(CONVOLUTION, fast) == len(fast.encoder.layer)


def test_an_encoder_called_by_itself_keeps_padded_hidden_states() -> None:
    stock, fast = _models(V2)
    batch = batches.build(BY_ID[V2], stock, batches.RIGHT)
    hidden = torch.randn(*batch.real.shape, 48, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        theirs = stock.encoder(hidden, batch.inputs["attention_mask"]).hidden_states
        ours = fast.encoder(hidden, batch.inputs["attention_mask"]).hidden_states
    for mine, expected in zip(ours, theirs, strict=True):
        assert measure.error(mine[batch.real], expected[batch.real]) <= measure.FP32_BAR
    assert all(layer._fastencoder.fast_calls == 1 for layer in fast.encoder.layer)
