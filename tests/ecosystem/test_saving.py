"""A real model saved, shipped and filled with other weights while it is fast."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers.utils import hub

from fastencoder import is_fast, reverse, to_fast

from .. import tiny
from . import real


def hidden(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**real.batch())[0]


def fast_model() -> torch.nn.Module:
    """It has run, so whatever a fast layer keeps is there."""
    model = to_fast(real.model())
    hidden(model)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "20MB"}, {"variant": "eight"}], ids=["whole", "shards", "variant"]
)
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_saved_while_fast_is_what_the_stock_model_saves(tmp_path: Path, options: dict[str, Any], memory: Any) -> None:
    stock = real.model()
    stock.save_pretrained(tmp_path / "stock", **options)
    model = to_fast(real.model(), memory=memory)
    expected = hidden(model)
    model.save_pretrained(tmp_path / "fast", **options)
    assert files(tmp_path / "fast") == files(tmp_path / "stock")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "fast", variant=options.get("variant")).eval()
    assert not is_fast(loaded) and torch.equal(hidden(loaded), hidden(stock))
    assert torch.equal(hidden(to_fast(loaded, memory=memory)), expected)


def test_what_is_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the upload: the files of the stock model."""
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))
    monkeypatch.setattr(
        hub,
        "hf_api",
        lambda: SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name)),
        raising=True,
    )
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    pushed: list[dict[str, bytes]] = []
    model = fast_model()
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *_, **__: pushed.append(files(Path(folder)))
    )
    for each in (model, reverse(model)):
        each.push_to_hub("somebody/model")
    assert pushed[0] == pushed[1]
    assert set(pushed[0]) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("memory", ["default", "lean"])
def test_safetensors_of_a_fast_model(tmp_path: Path, memory: Any) -> None:
    """In a lean model queries, keys and values share one storage. Savers take that for a tied weight, and drop two."""
    stock, model = real.model(), to_fast(real.model(), memory=memory)
    hidden(model)
    save_file(model.state_dict(), tmp_path / "state")
    save_model(model, str(tmp_path / "model"))
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    for name in ("state", "model", "model.safetensors"):
        loaded = load_file(tmp_path / name)
        assert loaded.keys() == stock.state_dict().keys()
        assert all(torch.equal(loaded[key], value) for key, value in stock.state_dict().items())


def test_the_state_of_a_lean_model_is_its_own_memory() -> None:
    model = to_fast(real.model(), memory="lean")
    before = hidden(model)
    name = "encoder.layer.0.attention.self.key.weight"
    state, kept = model.state_dict(), model.state_dict(keep_vars=True)
    assert kept[name] is model.get_parameter(name)
    assert state[name].data_ptr() == kept[name].data_ptr() and not state[name].requires_grad
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    state[name].mul_(0.5)
    stock = real.model()
    stock.state_dict()[name].mul_(0.5)
    mask = real.batch()["attention_mask"]
    assert tiny.relative_error(hidden(model), before, mask) > 1e-3
    assert tiny.relative_error(hidden(model), hidden(stock), mask) < 1e-5


def other_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {key: value.clone() for key, value in real.model().state_dict().items()}
    for value in state.values():
        if value.is_floating_point():
            value.mul_(1 + 0.2 * torch.randn(value.shape, generator=generator))
    return state


def _load_state_dict(model: torch.nn.Module, folder: Path) -> None:
    model.load_state_dict(other_weights())


def _assign(model: torch.nn.Module, folder: Path) -> None:
    model.load_state_dict(other_weights(), assign=True)


def _load_safetensors(model: torch.nn.Module, folder: Path) -> None:
    save_file(other_weights(), folder / "weights")
    load_model(model, str(folder / "weights"))


def _copy_by_name(model: torch.nn.Module, folder: Path) -> None:
    with torch.no_grad():
        for name, value in other_weights().items():
            if name in dict(model.named_parameters()):
                model.get_parameter(name).copy_(value)


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize(
    "load", [_load_state_dict, _assign, _load_safetensors, _copy_by_name], ids=lambda f: f.__name__[1:]
)
def test_new_weights_answer_at_the_next_call(load: Any, memory: Any, tmp_path: Path) -> None:
    model, mask = to_fast(real.model(), memory=memory), real.batch()["attention_mask"]
    before = hidden(model)
    load(model, tmp_path)
    stock = real.model()
    stock.load_state_dict(other_weights())
    got = hidden(model)
    assert tiny.relative_error(got, before, mask) > 0.1
    assert tiny.relative_error(got, hidden(stock), mask) < 1e-5
    assert tiny.calls(model) == (12, 0)
    reverse(model)
    assert torch.equal(hidden(model), hidden(stock))


def test_a_strict_load_says_what_the_stock_model_says() -> None:
    state = other_weights()
    state["encoder.layer.0.unknown"] = state.pop("encoder.layer.0.output.dense.weight")
    says = []
    for model in (real.model(), fast_model()):
        with pytest.raises(RuntimeError, match="unknown") as caught:
            model.load_state_dict(state)
        says.append(str(caught.value))
        result = model.load_state_dict(state, strict=False)
        assert (result.missing_keys, result.unexpected_keys) == (
            ["encoder.layer.0.output.dense.weight"],
            ["encoder.layer.0.unknown"],
        )
    assert says[0] == says[1]


def test_copies_by_pickle_and_by_torch() -> None:
    model = fast_model()
    expected, saved = hidden(model), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert torch.equal(hidden(twin), expected) and tiny.calls(twin) == (6, 0)
        reverse(twin)
        assert torch.equal(hidden(twin), hidden(real.model()))
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved)  # weights only, the default: nothing in it needs this package
    assert state.keys() == real.model().state_dict().keys()
