"""Models that accelerate spreads over devices: fast where weights are resident, the original where they are offloaded.

This machine has one device and a disk. Layers on the disk are loaded for each call; those on the CPU are resident.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel, MPNetConfig, MPNetModel

from fastencoder import AlreadyFastError, NotEligibleError, explain, is_fast, reverse, to_fast
from fastencoder.instance_forward import in_one_place

from .. import tiny
from ..conformance.weights import sharpen

accelerate = pytest.importorskip("accelerate")
hooks = accelerate.hooks

BAR = 1e-5  # relative error over the real tokens


def mpnet() -> MPNetModel:
    """Its owner makes one bias for all layers, which fast layers do not need and original ones do."""
    model = MPNetModel(MPNetConfig(vocab_size=99, max_position_embeddings=64, **tiny.SIZES)).eval()
    sharpen(model)
    return model


MODELS = {"bert": tiny.bert, "mpnet": mpnet}


@pytest.fixture(params=MODELS)
def stock(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def device_map(*on_disk: int, whole_encoder: bool = False) -> dict[str, str]:
    layers = {"encoder": "cpu"} if whole_encoder else {}
    if not whole_encoder:
        layers = {f"encoder.layer.{index}": "disk" if index in on_disk else "cpu" for index in range(3)}
    return {"embeddings": "cpu", "pooler": "disk" if whole_encoder else "cpu", **layers}


def dispatch(model: nn.Module, where: dict[str, str], folder: Path) -> nn.Module:
    if isinstance(model, MPNetModel) and "encoder" not in where:
        where = {**where, "encoder.relative_attention_bias": "cpu"}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.ragged()).last_hidden_state


def error(model: nn.Module, stock: nn.Module) -> float:
    return tiny.relative_error(run(model), run(stock), tiny.ragged()["attention_mask"])


class Counting(hooks.ModelHook):
    """A hook of the user's: counts calls, and doubles what the module returns."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        self.shapes.append(args[0].shape)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


# ---- placed


@pytest.mark.parametrize("where", [{"": "cpu"}, "auto"], ids=str)
def test_loading_to_one_device(where: Any, tmp_path: Path) -> None:
    stock = tiny.bert()
    stock.save_pretrained(tmp_path)
    model = to_fast(BertModel.from_pretrained(tmp_path, device_map=where).eval())
    assert error(model, stock) < BAR and tiny.calls(model) == (3, 0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("whole_encoder", [False, True], ids=["layer by layer", "encoder in one"])
def test_resident_layers_are_fast(stock: nn.Module, when: str, whole_encoder: bool, tmp_path: Path) -> None:
    model = copy.deepcopy(stock)
    if when == "after":
        to_fast(model)
        run(model)
    dispatch(model, device_map(whole_encoder=whole_encoder), tmp_path)
    assert "_hf_hook" in vars(model.encoder.layer[0].output.dense), "every part has a hook"
    if when == "before":
        to_fast(model)
    seen = watch(model)
    calls = tiny.calls(model)[0]
    assert error(model, stock) < BAR
    assert tiny.calls(model) == (calls + 3, 0), tiny.reasons(model)
    del seen[:]
    batch = tiny.ragged(seqlen=30)  # more tokens than layers take all at once
    with torch.inference_mode():
        model(**batch)
    assert seen[1:] == [(1, int(batch["attention_mask"].sum()), 48)] * 2, "tokens travel packed"
    for layer in model.encoder.layer:
        assert isinstance(layer._hf_hook, hooks.AlignDevicesHook)


def watch(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes that accelerate's hooks around the layers see."""
    seen: list[tuple[int, ...]] = []
    for layer in model.encoder.layer:
        original = layer._hf_hook.pre_forward

        def pre_forward(module: nn.Module, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(tuple(args[0].shape))
            return original(module, *args, **kwargs)

        layer._hf_hook.pre_forward = pre_forward
    return seen


# ---- offloaded


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("on_disk", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_offloaded_layers_are_the_original(
    stock: nn.Module, on_disk: tuple[int, ...], when: str, memory: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(stock)
    if when == "after":
        to_fast(model, memory=memory)
        run(model)
    dispatch(model, device_map(*on_disk), tmp_path)
    if when == "before":
        rows = explain(model).rows
        assert [row.status for row in rows] == ["left alone" if i in on_disk else "eligible" for i in range(3)]
        assert all("accelerate offloads its weights" in rows[i].reasons[0] for i in on_disk)
        to_fast(model, memory=memory)
    before = tiny.calls(model)
    for _ in range(2):
        assert error(model, stock) < BAR
    fast, delegated = (now - then for now, then in zip(tiny.calls(model), before, strict=True))
    assert (fast, delegated) == (2 * (3 - len(on_disk)), 2 * len(on_disk) if when == "after" else 0)
    for index, layer in enumerate(model.encoder.layer):
        assert layer.output.dense.weight.is_meta == (index in on_disk), "loaded for the call, and no longer"
    assert torch.equal(run(reverse(model)), run(stock))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model), run(stock))


def test_loading_with_layers_on_disk(tmp_path: Path) -> None:
    stock = tiny.bert()
    stock.save_pretrained(tmp_path / "model")
    where = {**device_map(2), "embeddings": "cpu"}
    loaded = BertModel.from_pretrained(tmp_path / "model", device_map=where, offload_folder=str(tmp_path / "off"))
    model = to_fast(loaded.eval())
    assert model.encoder.layer[2].output.dense.weight.is_meta
    assert error(model, stock) < BAR and tiny.calls(model) == (2, 0)


def test_nothing_resident_is_refused(tmp_path: Path) -> None:
    model = dispatch(tiny.bert(), device_map(0, 1, 2), tmp_path)
    with pytest.raises(NotEligibleError, match="accelerate offloads its weights"):
        to_fast(model)
    assert torch.equal(run(model), run(tiny.bert()))


def test_offload_of_the_whole_model(tmp_path: Path) -> None:
    stock = tiny.bert()
    model = to_fast(copy.deepcopy(stock))
    accelerate.cpu_offload(model, execution_device="cpu")
    assert error(model, stock) < BAR and tiny.calls(model) == (0, 3)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert error(model, stock) < BAR and tiny.calls(model) == (3, 3)


# ---- hooks of the user's, and of both in turn


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_around_a_layer_is_run(when: str) -> None:
    stock, model = tiny.bert(), tiny.bert()
    theirs, ours = Counting(), Counting()
    hooks.add_hook_to_module(stock.encoder.layer[1], theirs)
    if when == "after":
        to_fast(model)
    hooks.add_hook_to_module(model.encoder.layer[1], ours)
    if when == "before":
        to_fast(model)
    assert error(model, stock) < BAR
    assert ours.shapes == theirs.shapes == [(5, 12, 48)], "it sees padded hidden states"
    assert tiny.calls(model) == (3, 0)


def test_a_hook_inside_a_layer_is_run_by_the_original() -> None:
    stock, model = tiny.bert(), to_fast(tiny.bert())
    for each in (stock, model):
        hooks.add_hook_to_module(each.encoder.layer[1].intermediate.dense, Counting())
    assert error(model, stock) < BAR
    assert tiny.calls(model) == (2, 1) and "accelerate has put a hook around intermediate.dense" in str(
        tiny.reasons(model)
    )
    with pytest.raises(NotEligibleError, match=r"accelerate has put a hook around intermediate\.dense"):
        to_fast(reverse(model))


def test_every_order_of_hooks_and_conversion(stock: nn.Module, tmp_path: Path) -> None:
    """Whoever came first may go first: what is left is the model with the other's work alone."""
    expected = run(stock)
    for first, then in (("dispatch", "fast"), ("fast", "dispatch")):
        for gone_first in ("dispatch", "fast"):
            model = copy.deepcopy(stock)
            for step in (first, then):
                if step == "fast":
                    to_fast(model)
                else:
                    dispatch(model, device_map(), tmp_path)
                run(model)
            if gone_first == "fast":
                reverse(model)
                assert torch.equal(run(model), expected) and "_hf_hook" in vars(model.encoder.layer[0])
                hooks.remove_hook_from_module(model, recurse=True)
            else:
                hooks.remove_hook_from_module(model, recurse=True)
                before = tiny.calls(model)
                assert error(model, stock) < BAR and tiny.calls(model) == (before[0] + 3, 0), tiny.reasons(model)
                with pytest.raises(AlreadyFastError):
                    to_fast(model)
                reverse(model)
            assert not is_fast(model)
            assert torch.equal(run(model), expected)
            assert error(to_fast(model), stock) < BAR


def test_layers_on_two_devices_do_not_hand_packed_tokens_on() -> None:
    """What is moved in between is not the tensor that the layer before returned."""
    layers = tiny.bert().encoder.layer
    for layer, device in zip(layers, ("cpu", "cpu", "cpu:0"), strict=True):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(device))
    assert in_one_place(layers[:2]) and not in_one_place(layers)
