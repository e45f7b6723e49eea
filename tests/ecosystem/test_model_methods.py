"""What owners call on a model of transformers after its conversion."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastencoder import reverse, to_fast

from .. import tiny
from . import real


def hidden(model: nn.Module, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**real.batch(), **options)[0]


def error(model: nn.Module, stock: nn.Module) -> float:
    return tiny.relative_error(hidden(model), hidden(stock), real.batch()["attention_mask"])


def test_memory_footprint_is_that_of_the_model() -> None:
    stock, model = real.model(), to_fast(real.model())
    hidden(model)
    for options in ({}, {"return_buffers": False}):
        assert model.get_memory_footprint(**options) == stock.get_memory_footprint(**options) > 80_000_000
    assert model.num_parameters() == stock.num_parameters()
    assert str(model.dtype) == str(stock.dtype) and model.device == stock.device


def test_token_embeddings_of_another_size() -> None:
    stock, model = (real.model("AutoModelForMaskedLM") for _ in range(2))
    to_fast(model)
    before = hidden(model)
    size = stock.config.vocab_size + 8
    for each in (stock, model):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            each.resize_token_embeddings(size, mean_resizing=False)
    assert model.get_input_embeddings() is model.bert.embeddings.word_embeddings
    assert model.config.vocab_size == size and hidden(model).shape[-1] == size == before.shape[-1] + 8
    assert error(model, stock) < 1e-5
    assert tiny.calls(model) == (18, 0)
    reverse(model)
    assert torch.equal(hidden(model), hidden(stock))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    stock, model = (real.model("AutoModelForMaskedLM") for _ in range(2))
    to_fast(model).tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for each in (stock, model):
        with torch.no_grad():
            each.get_input_embeddings().weight.mul_(1.5)
    assert error(model, stock) < 1e-5
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(hidden(loaded), hidden(stock))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_implementation_is_changed(name: str) -> None:
    """Fast layers attend as exactly as either; what only one of them can do, maps of attention, works at once."""
    stock, model = (real.model() for _ in range(2))
    to_fast(model)
    hidden(model)
    for each in (stock, model):
        each.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    assert error(model, stock) < 1e-5
    assert tiny.calls(model) == (12, 0)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (each(**real.batch(), output_attentions=True).attentions for each in (stock, model))
    assert len(ours) == len(theirs) == (real.LAYERS if name == "eager" else len(theirs))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    reverse(model)
    assert model.config._attn_implementation == name and torch.equal(hidden(model), hidden(stock))


def test_an_implementation_that_is_not_there_is_the_stock_error() -> None:
    says = []
    for model in (real.model(), to_fast(real.model())):
        with pytest.raises(Exception) as caught:
            model.set_attn_implementation("no_such_attention")
        says.append((type(caught.value), str(caught.value)))
        hidden(model)
    assert says[0] == says[1]
    assert tiny.calls(model) == (6, 0)


def test_training_and_evaluation_in_turns() -> None:
    stock, model = (real.model() for _ in range(2))
    to_fast(model)
    for _ in range(2):
        answers = []
        for each in (stock, model):
            torch.manual_seed(0)
            answers.append(hidden(each.train()))
        assert torch.equal(*answers)
        assert error(model.eval(), stock.eval()) < 1e-5
    assert tiny.calls(model) == (12, 12)
    assert not any(module.training for module in model.modules())


def test_gradient_checkpointing_is_switched_on_and_off() -> None:
    stock, model = (real.model() for _ in range(2))
    to_fast(model)
    gradients = []
    for each in (stock, model):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        each.train()(**real.batch())[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters() if parameter.grad is not None])
        assert each.is_gradient_checkpointing
    assert len(gradients[0]) > 6 * 16 and all(torch.equal(*each) for each in zip(*gradients, strict=True))
    assert error(model.eval(), stock.eval()) < 1e-5  # still switched on: it changes nothing in evaluation
    for each in (stock, model):
        each.gradient_checkpointing_disable()
    assert error(model, stock) < 1e-5
    assert tiny.calls(model)[0] == 12 and not model.is_gradient_checkpointing


def test_layers_are_recomputed_under_gradient_checkpointing() -> None:
    """Gradients are the stock model's, and the layers are still recomputed in the backward pass."""
    stock, inputs = tiny.bert(), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    runs = {}
    for name, model in (("stock", stock), ("fast", fast)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        count: list[int] = []
        hook = partial(_count, count)
        handles = [layer.intermediate.register_forward_hook(hook) for layer in model.encoder.layer]
        torch.manual_seed(0)
        model(**inputs).last_hidden_state.square().sum().backward()
        for handle in handles:
            handle.remove()
        runs[name] = (len(count), [p.grad for p in model.encoder.parameters()])
    assert runs["stock"][0] == runs["fast"][0] == 6
    assert all(torch.equal(a, b) for a, b in zip(runs["stock"][1], runs["fast"][1], strict=True))


def _count(calls: list[int], *_: object) -> None:
    calls.append(1)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(real.TEXTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**real.tokenizer()(real.TEXTS[index]), "labels": index % 3}


def trainer(model: nn.Module, folder: Path, **options: Any) -> transformers.Trainer:
    options = {"report_to": [], "use_cpu": True, "per_device_eval_batch_size": 4, "disable_tqdm": True, **options}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    collator = transformers.DataCollatorWithPadding(real.tokenizer())
    return transformers.Trainer(
        model=model, args=arguments, data_collator=collator, eval_dataset=Rows(), train_dataset=Rows()
    )


def test_trainer_evaluates_and_predicts(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    stock, model = (real.model("AutoModelForSequenceClassification", labels=3) for _ in range(2))
    to_fast(model)
    theirs, ours = (trainer(each, tmp_path) for each in (stock, model))
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
    assert ours.predict(Rows()).predictions == pytest.approx(theirs.predict(Rows()).predictions, abs=1e-4)
    assert tiny.calls(model) == (12, 0)


def test_trainer_trains_a_fast_model_as_it_was(tmp_path: Path) -> None:
    """The steps are the stock model's; the evaluation after them is fast, with the new weights."""
    pytest.importorskip("accelerate")
    models, losses = [real.model("AutoModelForSequenceClassification", labels=3) for _ in range(2)], []
    to_fast(models[1])
    for each in models:
        options = {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "seed": 3,
        }
        trained = trainer(each, tmp_path, **options)
        before = trained.evaluate()["eval_loss"]
        trained.train()
        losses.append((before, trained.evaluate()["eval_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[0][0] - losses[0][1]) > 0.01
    assert all(torch.equal(*pair) for pair in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert tiny.calls(models[1]) == (12, 12)


def test_a_model_without_weights_yet_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(real.model().config)
    with pytest.raises(ValueError, match="meta"):
        to_fast(model)


def test_freezing_and_hooks_survive_the_way_there_and_back() -> None:
    model = real.model()
    model.embeddings.requires_grad_(False)
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    hidden(to_fast(model))
    hidden(reverse(model))
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen and len(seen) == 2
    assert copy.deepcopy(model).config == model.config
