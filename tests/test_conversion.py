"""to_fast and reverse: the same object, everything or nothing, and back without a trace."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModel, BartConfig, BartModel, BertConfig, BertLMHeadModel, GPT2Config, GPT2Model

import fastencoder
from fastencoder import AlreadyFastError, NotEligibleError, NotFastError, explain, fast, is_fast, reverse, to_fast
from fastencoder.layers import FastLayer

from . import tiny


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a conversion must leave or give back."""
    return {
        "classes": [type(module) for module in model.modules()],
        "modules": [id(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._forward_hooks_always_called))
            for m in model.modules()
        ],
        "hook flags": [
            (dict(m._forward_hooks_with_kwargs), dict(m._forward_pre_hooks_with_kwargs)) for m in model.modules()
        ],
        "tensors": [(name, id(p), p.data_ptr(), p.requires_grad, p._version) for name, p in model.named_parameters()],
        "keys": list(model.state_dict()),
        "training": [module.training for module in model.modules()],
    }


def test_round_trip_leaves_no_trace() -> None:
    model = tiny.bert()
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    model.embeddings.requires_grad_(False)
    before, values = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert to_fast(model) is model
    assert snapshot(model) != before
    with torch.inference_mode():
        model(**tiny.ragged())
    assert reverse(model) is model
    assert snapshot(model) == before
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())


def test_fast_layers_are_still_what_they_were() -> None:
    model = tiny.bert()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    original = type(model.encoder.layer[0])
    to_fast(model)
    layer = model.encoder.layer[0]
    assert isinstance(layer, original) and isinstance(layer, FastLayer)
    assert type(layer).__name__ == "FastBertLayer"
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_answers_are_the_same_and_padding_is_zero() -> None:
    model, inputs = tiny.bert(), tiny.ragged()
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        expected = exact(**inputs).last_hidden_state
        got = to_fast(model)(**inputs).last_hidden_state
    assert got.shape == expected.shape
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-6
    assert (got[inputs["attention_mask"] == 0] == 0).all()
    assert tiny.calls(model) == (3, 0)


def test_converting_twice_and_reversing_nothing_are_errors() -> None:
    model = tiny.bert()
    with pytest.raises(NotFastError, match="BertModel is not fast"):
        reverse(model)
    to_fast(model)
    before = snapshot(model)
    with pytest.raises(AlreadyFastError, match=r"reverse\(model\) first"):
        to_fast(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("thing", [None, "bert", {"a": 1}, torch.zeros(3)])
def test_things_that_are_no_model(thing: object) -> None:
    for function in (to_fast, reverse, explain, is_fast):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            function(thing)


def test_models_without_an_encoder_are_refused_untouched() -> None:
    gpt2 = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32))
    for model in (nn.Sequential(nn.Linear(3, 3)), gpt2):
        before = snapshot(model)
        with pytest.raises(NotEligibleError, match="has no layer that can be made fast"):
            to_fast(model)
        assert snapshot(model) == before and not is_fast(model)


def test_a_decoder_is_refused_with_the_reason() -> None:
    config = BertConfig(vocab_size=99, is_decoder=True, **tiny.SIZES)
    model = BertLMHeadModel(config).eval()
    with pytest.raises(NotEligibleError, match="decoder") as caught:
        to_fast(model)
    assert {row.status for row in caught.value.report} == {"left alone"}
    assert not is_fast(model)


def test_an_encoder_decoder_keeps_its_decoder() -> None:
    sizes = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2)
    model = BartModel(BartConfig(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, **sizes)).eval()
    to_fast(model)
    assert all(isinstance(layer, FastLayer) for layer in model.encoder.layers)
    assert not any(isinstance(layer, FastLayer) for layer in model.decoder.layers)
    left = [row for row in explain(model) if row.status == "left alone"]
    assert [row.name for row in left] == ["decoder.layers.0", "decoder.layers.1"]
    assert all("decoder" in row.reasons[0] for row in left)


def test_one_bad_layer_refuses_everything_and_touches_nothing() -> None:
    model = tiny.bert()
    model.encoder.layer[2].output.dense = nn.Bilinear(1, 1, 1)
    before = snapshot(model)
    with pytest.raises(NotEligibleError) as caught:
        to_fast(model)
    assert snapshot(model) == before
    message = str(caught.value)
    assert "encoder.layer.2" in message and "output.dense is a torch.nn" in message and "strict=False" in message


def test_not_strict_converts_the_rest_and_stays_right() -> None:
    """The original layer in the middle gets padded hidden states although its neighbours are packed."""
    for middle in (0, 1, 2):
        model, inputs = tiny.bert(), tiny.ragged()
        with torch.inference_mode():
            expected = model(**inputs).last_hidden_state
            model.encoder.layer[middle].intermediate.intermediate_act_fn = Halve()
            changed = model(**inputs).last_hidden_state
            assert tiny.relative_error(changed, expected, inputs["attention_mask"]) > 0.01
            to_fast(model, strict=False)
            got = model(**inputs).last_hidden_state
        assert [row.status for row in explain(model)].count("fast") == 2
        assert tiny.relative_error(got, changed, inputs["attention_mask"]) < 1e-5


class Halve(nn.Module):
    """Not element-wise as far as anybody can tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_fast_inside_the_block_only() -> None:
    model, inputs = tiny.bert(), tiny.ragged()
    before = snapshot(model)
    with fast(model) as same:
        assert same is model and is_fast(model)
        with torch.inference_mode():
            model(**inputs)
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), fast(model):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_copies_of_a_fast_model_are_fast_and_independent() -> None:
    model, inputs = to_fast(tiny.bert()), tiny.ragged()
    saved = io.BytesIO()
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        torch.save(model, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(saved, weights_only=False),
        ]
        for twin in copies:
            assert torch.equal(twin(**inputs).last_hidden_state, expected)
            assert tiny.calls(twin) == (3, 0)
            twin.encoder.layer[0].output.dense.weight.data.mul_(0.5)
            assert not torch.equal(twin(**inputs).last_hidden_state, expected)
            reverse(twin)
            assert not twin.encoder._forward_pre_hooks and not twin.encoder._forward_hooks
        assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_saving_a_fast_model_writes_the_stock_model(tmp_path) -> None:
    model, inputs = tiny.bert_classifier(), tiny.ragged()
    stock = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(**inputs).logits
        to_fast(model)(**inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert list(again.state_dict()) == list(stock)
    assert all(torch.equal(value, stock[key]) for key, value in again.state_dict().items())
    assert again.config.architectures == ["BertForSequenceClassification"]
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, expected)
    assert type(AutoModel.from_pretrained(tmp_path).encoder.layer[0]).__name__ == "BertLayer"


def test_wrapped_models_are_converted_where_they_are() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.bert()

        def forward(self, **inputs):
            return self.inner(**inputs).last_hidden_state

    wrapper, inputs = Wrapper().eval(), tiny.ragged()
    with torch.inference_mode():
        expected = wrapper(**inputs)
        got = to_fast(wrapper)(**inputs)
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-5
    assert tiny.calls(wrapper) == (3, 0)


def test_public_names() -> None:
    for name in ("to_fast", "reverse", "explain", "is_fast", "fast", "register"):
        assert callable(getattr(fastencoder, name)) and getattr(fastencoder, name).__doc__
