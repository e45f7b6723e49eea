"""Where optimum's BetterTransformer went wrong (release 1.27, reproduced with transformers 4.48): a test for each."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForTokenClassification,
    BertLMHeadModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    HubertConfig,
    HubertModel,
    RoFormerConfig,
    RoFormerModel,
    TapasConfig,
    TapasForQuestionAnswering,
    ViltConfig,
    ViltModel,
)

from fastencoder import NotEligibleError, reverse, to_fast
from fastencoder.layers import FastLayer

from .. import tiny
from ..conformance.cases_post_ln import WAV2VEC2
from ..conformance.weights import sharpen

VISION = {**tiny.SIZES, "image_size": 32, "patch_size": 8}


def pair(stock: nn.Module) -> tuple[nn.Module, nn.Module]:
    return stock, to_fast(copy.deepcopy(stock))


def build(cls: type, config: Any) -> Any:
    model = cls(config).eval()
    sharpen(model)
    return model


def hidden(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs)[0]


def short_rows(length: int = 10) -> dict[str, torch.Tensor]:
    """No row is as long as the batch, as with padding="max_length"."""
    mask = (torch.arange(length) < torch.tensor([7, 4])[:, None]).long()
    return {"input_ids": torch.arange(2 * length).view(2, length) + 5, "attention_mask": mask}


def test_a_batch_in_which_no_row_is_full_keeps_its_length() -> None:
    """It came back as short as its longest row."""
    stock, fast = pair(tiny.bert())
    inputs = short_rows()
    expected, got = hidden(stock, **inputs), hidden(fast, **inputs)
    assert got.shape == expected.shape == (2, 10, 48)
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-6


def test_labels_fit_a_batch_in_which_no_row_is_full() -> None:
    """Token classification failed: "Expected input batch_size (14) to match target batch_size (20)"."""
    stock, fast = pair(tiny.bert(cls=BertForTokenClassification, num_labels=5))
    inputs = short_rows()
    labels = (inputs["input_ids"] % 5).masked_fill(inputs["attention_mask"] == 0, -100)
    expected, got = hidden(stock, **inputs, labels=labels), hidden(fast, **inputs, labels=labels)
    assert tiny.relative_error(got, expected) < 1e-6
    assert tiny.calls(fast) == (3, 0)


def test_padding_is_zero_only_where_nobody_reads_it() -> None:
    """It was zero for everybody. Where a model is known to read padding, all of its answer is the stock model's."""
    inputs = short_rows()
    _, fast = pair(tiny.bert())
    assert (hidden(fast, **inputs)[inputs["attention_mask"] == 0] == 0).all()
    config = TapasConfig(
        vocab_size=99, max_position_embeddings=64, type_vocab_sizes=[3, 4, 4, 2, 4, 4, 2], **tiny.SIZES
    )
    stock, fast = pair(build(TapasForQuestionAnswering, config))
    inputs["token_type_ids"] = torch.ones(2, 10, 7, dtype=torch.long)
    assert torch.equal(hidden(fast, **inputs), hidden(stock, **inputs))
    assert tiny.reasons(fast) == {"the batch has padding, and what follows the layers reads the hidden states there"}


@pytest.mark.parametrize("kept", [slice(3, None), slice(None, None, 2)], ids=["left", "holes"])
def test_padding_may_be_anywhere(kept: slice) -> None:
    """RuntimeError: "Mask must be left-aligned without gaps"."""
    stock, fast = pair(tiny.bert())
    inputs = short_rows()
    inputs["attention_mask"][1] = 0
    inputs["attention_mask"][1, kept] = 1
    expected, got = hidden(stock, **inputs), hidden(fast, **inputs)
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-6
    assert tiny.calls(fast) == (3, 0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_for_every_query(implementation: str) -> None:
    """RuntimeError: a mask of queries and keys has another shape than was expected."""
    stock, fast = pair(tiny.bert(attn_implementation=implementation))
    inputs = short_rows()
    pairs = inputs["attention_mask"].bool()[:, None, None, :] & torch.ones(10, 10, dtype=torch.bool).tril()
    mask = pairs if implementation == "sdpa" else torch.zeros(pairs.shape).masked_fill(~pairs, -1e9)
    inputs["attention_mask"] = mask
    expected = hidden(stock, **inputs)
    assert torch.equal(hidden(fast, **inputs), expected)
    inputs["attention_mask"] = None
    assert tiny.relative_error(hidden(stock, **inputs), expected) > 0.1
    assert tiny.calls(fast) == (0, 3)


def test_a_decoder_is_refused() -> None:
    """It was converted, and its causal mask was an error at the first call."""
    model = build(BertLMHeadModel, BertConfig(vocab_size=99, is_decoder=True, **tiny.SIZES))
    with pytest.raises(NotEligibleError, match="decoder"):
        to_fast(model)


def test_albert_takes_padding() -> None:
    """RuntimeError: "Mask size should match input size"."""
    config = AlbertConfig(
        vocab_size=99, embedding_size=24, max_position_embeddings=64, num_hidden_groups=1, **tiny.SIZES
    )
    stock, fast = pair(build(AlbertModel, config))
    inputs = short_rows()
    expected, got = hidden(stock, **inputs), hidden(fast, **inputs)
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-6
    assert tiny.calls(fast) == (3, 0)


def test_all_hidden_states_are_plain_tensors() -> None:
    """All but the last were nested tensors."""
    stock, fast = pair(tiny.bert())
    inputs = short_rows()
    with torch.inference_mode():
        expected, got = (model(**inputs, output_hidden_states=True).hidden_states for model in (stock, fast))
    assert len(got) == len(expected) == 4
    for ours, theirs in zip(got, expected, strict=True):
        assert type(ours) is torch.Tensor and not ours.is_nested and ours.shape == (2, 10, 48)
        assert tiny.relative_error(ours, theirs, inputs["attention_mask"]) < 1e-6


def test_attentions_can_be_asked_for() -> None:
    """IndexError: "tuple index out of range"."""
    stock, fast = pair(tiny.bert(attn_implementation="eager"))
    inputs = short_rows()
    with torch.inference_mode():
        expected, got = (model(**inputs, output_attentions=True).attentions for model in (stock, fast))
    assert len(got) == 3 and got[0].shape == (2, 3, 10, 10)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_an_argument_that_reaches_the_layers_is_not_ignored() -> None:
    """A `head_mask` was. transformers 5 has none left, and hands it to the layers like every argument that it does not know."""
    stock, fast = pair(tiny.bert())
    inputs = short_rows()
    with torch.inference_mode():
        expected, got = (model(**inputs, head_mask=torch.zeros(3, 3)).last_hidden_state for model in (stock, fast))
    assert torch.equal(got, expected)
    assert tiny.reasons(fast) == {"the argument head_mask is given"}


def test_autocast_keeps_the_eps_of_norms() -> None:
    """Layer norms were called without theirs, so a model of eps 0.1 was 0.16 off."""
    stock = tiny.bert()
    for module in stock.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1
    stock, fast = pair(stock)
    inputs = short_rows()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = hidden(stock, **inputs), hidden(fast, **inputs)
    assert torch.equal(got, expected)
    assert tiny.relative_error(hidden(fast, **inputs), hidden(stock, **inputs), inputs["attention_mask"]) < 1e-6


def test_training_keeps_the_padding_mask() -> None:
    """It was dropped, without a word."""
    stock, fast = pair(tiny.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    inputs = short_rows()
    answers = [model.train()(**inputs).last_hidden_state for model in (stock, fast)]
    assert torch.equal(*answers)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    assert tiny.relative_error(stock(**inputs).last_hidden_state[:, :4], answers[0][:, :4]) > 0.01


def test_roformer_keeps_its_rotations() -> None:
    """They were swallowed as an argument that nobody knew; weights as small as at the start of training hid it."""
    config = RoFormerConfig(vocab_size=99, max_position_embeddings=64, **tiny.SIZES)
    stock, fast = pair(build(RoFormerModel, config))
    inputs = short_rows()
    expected = hidden(copy.deepcopy(stock).double(), **inputs)
    assert tiny.relative_error(hidden(fast, **inputs), expected, inputs["attention_mask"]) < 1e-6
    with torch.no_grad():
        stock.encoder.embed_positions.weight.view(64, 2, -1)[:, 0] = 0  # no rotation at all
        stock.encoder.embed_positions.weight.view(64, 2, -1)[:, 1] = 1
    assert tiny.relative_error(hidden(stock, **inputs), expected, inputs["attention_mask"]) > 0.02
    assert tiny.calls(fast) == (3, 0)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "quick_gelu", "gelu"])
def test_every_gelu_is_its_own(activation: str) -> None:
    """The tanh forms and CLIP's were computed as the exact one: 3e-3 off where exact GELU was 8e-6 off."""
    stock = tiny.bert(hidden_act=activation)
    inputs = short_rows()
    expected = hidden(copy.deepcopy(stock).double(), **inputs)
    assert tiny.relative_error(hidden(to_fast(stock), **inputs), expected, inputs["attention_mask"]) < 1e-6


def test_a_clip_tower_with_its_own_gelu() -> None:
    config = CLIPVisionConfig(hidden_act="quick_gelu", **VISION)
    stock, fast = pair(build(CLIPVisionModel, config))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = hidden(copy.deepcopy(stock).double(), pixel_values=pixels.double())
    assert tiny.relative_error(hidden(fast, pixel_values=pixels), expected) < 1e-6
    assert tiny.calls(fast) == (3, 0)


def test_a_refusal_leaves_nothing_half_converted() -> None:
    """The third of three layers was refused after two had been replaced."""
    model = tiny.bert()
    model.encoder.layer[2].intermediate.dense.register_forward_hook(lambda *_: None)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(NotEligibleError, match=r"encoder\.layer\.2"):
        to_fast(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_reverse_gives_back_the_object_with_all_that_was_on_it() -> None:
    """A new object came back: attributes, hooks and frozen parameters were lost."""
    model, inputs, seen = tiny.bert(), short_rows(), []
    model.note = "mine"
    model.encoder.layer[0].note = "mine, too"
    model.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    model.encoder.layer[1].requires_grad_(False)
    expected, state = hidden(model, **inputs), copy.deepcopy(model.state_dict())
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    layer = model.encoder.layer[0]
    assert reverse(to_fast(model)) is model and model.encoder.layer[0] is layer
    assert not isinstance(layer, FastLayer)
    assert (model.note, layer.note) == ("mine", "mine, too")
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert torch.equal(hidden(model, **inputs), expected) and seen == [1, 1]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_gradients_in_evaluation_mode() -> None:
    """RuntimeError: "derivative for _transformer_encoder_layer_fwd is not implemented"."""
    stock, fast = pair(tiny.bert())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (stock, fast):
            model(**short_rows()).last_hidden_state.square().sum().backward()
    gradients = [[parameter.grad for parameter in model.encoder.parameters()] for model in (stock, fast)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_a_compiled_model_answers() -> None:
    """The process was aborted: "NestedTensorImpl doesn't support strides"."""
    stock, fast = pair(tiny.bert())
    inputs = short_rows()
    got = hidden(torch.compile(fast, backend="eager"), **inputs)
    assert tiny.relative_error(got, hidden(stock, **inputs), inputs["attention_mask"]) < 1e-5


def test_vilt_keeps_its_padding_mask() -> None:
    """It was ignored."""
    config = ViltConfig(vocab_size=99, max_position_embeddings=64, max_image_length=16, **VISION)
    stock, fast = pair(build(ViltModel, config))
    inputs = short_rows()
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask, answers = inputs["attention_mask"].bool(), []
    for model in (stock, fast):
        torch.manual_seed(0)  # it shuffles patches
        answers.append(hidden(model, **inputs)[:, :10][mask])
    assert tiny.relative_error(answers[1], answers[0]) < 1e-6
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    torch.manual_seed(0)
    assert tiny.relative_error(hidden(stock, **inputs)[:, :10][mask], answers[0]) > 0.01
    assert tiny.calls(fast) == (3, 0)


def test_adapters_around_a_query_are_not_dropped() -> None:
    """The weight under the adapter was taken for all of it."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = peft.get_peft_model(
            tiny.bert(), peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
        ).eval()
    stock, fast = pair(stock)
    inputs = short_rows()
    expected = hidden(stock, **inputs)
    assert tiny.relative_error(hidden(fast, **inputs), expected, inputs["attention_mask"]) < 1e-6
    with stock.disable_adapter():
        assert tiny.relative_error(hidden(stock, **inputs), expected, inputs["attention_mask"]) > 0.01
    assert tiny.calls(fast) == (3, 0)


def test_hubert_with_stable_norms_is_converted() -> None:
    """Its layer class had been forgotten: "the conversion failed while it should not"."""
    stock, fast = pair(build(HubertModel, HubertConfig(**WAV2VEC2, do_stable_layer_norm=True)))
    waves = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(400) < torch.tensor([400, 200])[:, None]).long()
    expected, got = (hidden(model, input_values=waves, attention_mask=mask) for model in (stock, fast))
    frames = int(stock._get_feat_extract_output_lengths(200))
    assert tiny.relative_error(got[0], expected[0]) < 1e-5
    assert tiny.relative_error(got[1, :frames], expected[1, :frames]) < 1e-5
    assert tiny.calls(fast) == (2, 0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_as_it_is_loaded_is_converted(implementation: str) -> None:
    """Only models of eager attention were; the default is another."""
    stock, fast = pair(tiny.bert(attn_implementation=implementation))
    inputs = short_rows()
    assert tiny.relative_error(hidden(fast, **inputs), hidden(stock, **inputs), inputs["attention_mask"]) < 1e-6


def test_the_state_of_a_converted_model_has_the_stock_keys() -> None:
    """`state_dict` had keys of fused weights, with which nothing could be loaded."""
    stock, fast = pair(tiny.bert())
    hidden(fast, **short_rows())
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in fast.state_dict().items())
