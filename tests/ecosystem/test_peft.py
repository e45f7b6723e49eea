"""PEFT's adapters in a converted model: called as they are, on packed tokens, with the answers of the same stock model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SamVisionConfig, SamVisionModel

from fastencoder import NotEligibleError, explain, reverse, to_fast
from fastencoder.layers import FastLayer

from .. import tiny
from ..conformance import external
from ..conformance.absent import Absent
from ..conformance.weights import sharpen

peft = pytest.importorskip("peft")

BAR = 1e-5
LORA: dict[str, Any] = dict(target_modules=["query", "value"], r=4, init_lora_weights=False)


def adapted(model: nn.Module, seed: int = 1, name: str = "default", **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    wanted = peft.LoraConfig(**{**LORA, **config})
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, wanted)
        return model.eval()
    return peft.get_peft_model(model, wanted, adapter_name=name).eval()


def run(model: nn.Module, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.ragged(), **more)[0]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return tiny.relative_error(ours, theirs, tiny.ragged()["attention_mask"])


class Pair:
    """The same adapted model twice, one of them converted: before it was adapted, or after."""

    def __init__(self, when: str, **config: Any) -> None:
        self.stock, fast = tiny.bert(), tiny.bert()
        if when == "before":
            run(to_fast(fast))
        self.stock, self.fast = (adapted(model, **config) for model in (self.stock, fast))
        if when == "after":
            assert explain(self.fast).eligible
            to_fast(self.fast)
        self.seen: list[torch.Tensor] = []

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        for model in (self.stock, self.fast):
            change(model)

    def check(self) -> None:
        """The right answer, all of it fast."""
        before = tiny.calls(self.fast)
        theirs = run(self.stock)
        assert error(run(self.fast), theirs) < BAR
        assert tiny.calls(self.fast) == (before[0] + 3, before[1]), tiny.reasons(self.fast)
        self.seen.append(theirs)

    def differ(self, *states: int) -> None:
        """The answers of these steps were all different."""
        chosen = [self.seen[state] for state in states]
        for index, one in enumerate(chosen):
            assert all(error(one, other) > 1e-3 for other in chosen[index + 1 :])


@pytest.fixture(params=["before", "after"])
def when(request: pytest.FixtureRequest) -> str:
    return request.param


def test_switched_disabled_merged_and_unmerged(when: str) -> None:
    pair = Pair(when)
    pair.both(lambda model: adapted(model, seed=2, name="other", target_modules=["key", "dense"]))
    pair.check()
    pair.both(lambda model: model.set_adapter("other"))
    pair.check()
    with contextlib.ExitStack() as disabled:
        for model in (pair.stock, pair.fast):
            disabled.enter_context(model.disable_adapter())
        pair.check()
    pair.differ(0, 1, 2)
    pair.check()
    pair.both(lambda model: model.merge_adapter())
    pair.check()
    pair.both(lambda model: model.unmerge_adapter())
    pair.check()
    pair.both(lambda model: model.set_adapter("default"))
    pair.check()
    assert error(pair.seen[-1], pair.seen[0]) < BAR, "and back"
    pair.both(lambda model: model.base_model.set_adapter(["default", "other"]))
    pair.check()
    pair.differ(0, 1, 2, -1)
    pair.both(lambda model: model.base_model.set_adapter("default"))
    pair.both(lambda model: model.delete_adapter("other"))
    pair.check()
    for model in (pair.stock, pair.fast):
        model.merge_adapter(["default"])
    merged = pair.fast.merge_and_unload()
    assert error(run(merged), pair.seen[0]) < 1e-4
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert torch.equal(run(reverse(merged)), run(pair.stock.merge_and_unload()))


def test_unload_gives_the_model_without_adapters(when: str) -> None:
    pair = Pair(when)
    pair.check()
    unloaded = pair.fast.unload()
    assert error(run(unloaded), run(tiny.bert())) < BAR
    assert torch.equal(run(reverse(unloaded)), run(tiny.bert()))


def test_new_weights_of_an_adapter_take_effect(when: str) -> None:
    pair = Pair(when)
    pair.check()

    def change(model: nn.Module) -> None:
        state = peft.get_peft_model_state_dict(model)
        generator = torch.Generator().manual_seed(7)
        peft.set_peft_model_state_dict(
            model, {name: torch.randn(w.shape, generator=generator) for name, w in state.items()}
        )

    pair.both(change)
    pair.check()
    pair.differ(0, 1)


def test_what_peft_says_of_the_model_does_not_change(when: str) -> None:
    pair = Pair(when)

    def said(model: nn.Module) -> tuple[Any, ...]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            model.print_trainable_parameters()
        state = peft.get_peft_model_state_dict(model)
        return printed.getvalue(), model.targeted_module_names, list(state), [name for name, _ in model.named_modules()]

    assert said(pair.fast) == said(pair.stock) and "trainable params" in said(pair.fast)[0]
    assert isinstance(pair.fast.base_model.model.encoder.layer[0], FastLayer)


def test_saved_while_converted(when: str, tmp_path: Any) -> None:
    pair = Pair(when)
    pair.fast.save_pretrained(tmp_path)
    assert "fastencoder" not in (tmp_path / "adapter_config.json").read_text()
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path).eval()
    assert torch.equal(run(loaded), run(pair.stock))
    onto_fast = peft.PeftModel.from_pretrained(to_fast(tiny.bert()), tmp_path).eval()
    assert error(run(onto_fast), run(pair.stock)) < BAR and tiny.calls(onto_fast) == (3, 0)


def test_training_an_adapter_of_a_converted_model(when: str) -> None:
    """The original layers run, and the gradients are theirs; what was learned shows in the next fast call."""
    pair = Pair(when)
    pair.check()
    for model in (pair.stock, pair.fast):
        torch.manual_seed(0)
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(**tiny.ragged())[0].square().mean().backward()
        optimizer.step()
        model.eval()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (pair.stock, pair.fast)]
    assert grads[0] and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    pair.fast.eval()
    theirs = run(pair.stock)
    assert error(run(pair.fast), theirs) < BAR
    assert error(theirs, pair.seen[0]) > 1e-4


def test_an_adapter_for_each_text_of_the_batch_is_left_to_peft(when: str) -> None:
    """It is chosen by the row of the batch, which packed tokens do not have."""
    pair = Pair(when)
    pair.both(lambda model: adapted(model, seed=2, name="other"))
    names = ["default", "other", "__base__", "other", "default"]
    before = tiny.calls(pair.fast)[1]
    theirs = run(pair.stock, adapter_names=names)
    assert error(run(pair.fast, adapter_names=names), theirs) < BAR
    assert tiny.calls(pair.fast)[1] == before + 3 and "hooks" in str(tiny.reasons(pair.fast))
    pair.check()
    assert error(theirs, pair.seen[0]) > 1e-3


OTHERS: dict[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False),
    "loha": lambda: peft.LoHaConfig(target_modules=["query", "dense"], r=2, init_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=["query", "value"], r=4, init_weights=False),
    "boft": lambda: peft.BOFTConfig(target_modules=["query"], boft_block_size=4, init_weights=False),
    "modules to save": lambda: peft.LoraConfig(**LORA, modules_to_save=["pooler"]),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_right(kind: str, when: str) -> None:
    """Fast, or refused before and left to the original layers after: never wrong."""
    models = [tiny.bert(), tiny.bert()]
    if when == "before":
        to_fast(models[1])
    for index, model in enumerate(models):
        torch.manual_seed(1)
        models[index] = peft.get_peft_model(model, OTHERS[kind]()).eval()
    stock, fast = models
    expected = run(stock)
    if when == "after":
        try:
            to_fast(fast)
        except NotEligibleError as refused:
            assert "LayerNorm" in str(refused) and kind == "layer norms"
    assert error(run(fast), expected) < BAR
    assert tiny.calls(fast)[0] == (0 if kind == "layer norms" else 3), tiny.reasons(fast)
    if kind not in ("layer norms", "modules to save"):
        assert error(expected, run(tiny.bert())) > 1e-4


@pytest.mark.parametrize("kind, calls", [("PromptTuningConfig", (3, 0)), ("PrefixTuningConfig", (0, 3))])
def test_prompts_before_the_text(kind: str, calls: tuple[int, int], when: str) -> None:
    """Prompt tuning puts vectors before the texts, prefix tuning a cache into every layer, which is left to the original."""
    models = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = tiny.bert()
        if convert and when == "before":
            to_fast(model)
        config = getattr(peft, kind)(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
        models.append(peft.get_peft_model(model, config).eval())
    stock, fast = models
    if when == "after":
        to_fast(fast)
    theirs, ours = run(stock), run(fast)
    keep = tiny.ragged()["attention_mask"].bool()
    virtual = theirs.shape[1] - keep.shape[1]
    mask = torch.cat([torch.ones(len(keep), virtual, dtype=torch.bool), keep], dim=1)
    assert tiny.relative_error(ours, theirs, mask) < BAR and tiny.calls(fast) == calls
    assert tiny.relative_error(theirs[:, virtual:], run(tiny.bert()), keep) > 1e-3


# ---- layers that a user changed, and other models


class SplitProjections(nn.Module):
    """What users do to SAM's fused projection: three linears instead of one, so that LoRA can go to queries and values."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        width = fused.in_features
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for index, part in enumerate((self.q, self.k, self.v)):
                part.weight.copy_(fused.weight[index * width : (index + 1) * width])
                part.bias.copy_(fused.bias[index * width : (index + 1) * width])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


class LoraInPlace(nn.Module):
    """LoRA by hand around the fused projection, as it is often written for SAM: by the four dimensions of an image."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv, self.width = qkv, qkv.in_features
        self.down, self.up = nn.Linear(self.width, 4, bias=False), nn.Linear(4, self.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = self.qkv(x)
        projected[:, :, :, : self.width] += self.up(self.down(x))
        return projected


def sam() -> nn.Module:
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, mlp_dim=80, output_channels=16)
    config = SamVisionConfig(**sizes, image_size=32, patch_size=4, window_size=4, global_attn_indexes=[1])
    model = SamVisionModel(config).eval()
    sharpen(model)
    return model


def look(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(pixel_values=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))[0]


def test_sam_with_its_projection_split_and_lora_on_two_parts(when: str) -> None:
    models = [sam(), sam()]
    plain = look(models[0])
    if when == "before":
        look(to_fast(models[1]))
    for index, model in enumerate(models):
        for layer in model.vision_encoder.layers:
            layer.attn.qkv = SplitProjections(layer.attn.qkv)
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["q", "v"], r=4, init_lora_weights=False)
        models[index] = peft.get_peft_model(model, config).eval()
    stock, fast = models
    if when == "after":
        to_fast(fast)
    before = tiny.calls(fast)
    expected = look(stock)
    assert tiny.relative_error(look(fast), expected) < BAR
    assert tiny.calls(fast) == (before[0] + 3, before[1]), tiny.reasons(fast)
    assert tiny.relative_error(expected, plain) > 1e-3
    with fast.disable_adapter():
        assert tiny.relative_error(look(fast), plain) < BAR
    assert torch.equal(look(reverse(fast)), expected)


def test_a_projection_that_reads_the_shape_of_the_image_is_refused() -> None:
    model, changed = sam(), sam()
    for each in (model, changed):
        torch.manual_seed(0)
        for layer in each.vision_encoder.layers:
            layer.attn.qkv = LoraInPlace(layer.attn.qkv)
        sharpen(each)
    with pytest.raises(
        NotEligibleError, match=r"attn\.qkv is a .*LoraInPlace, which does not treat each token by itself"
    ):
        to_fast(model)
    changed_later = to_fast(sam())
    for layer, done in zip(changed_later.vision_encoder.layers, changed.vision_encoder.layers, strict=True):
        layer.attn.qkv = done.attn.qkv
    changed_later.load_state_dict(changed.state_dict())
    assert torch.equal(look(changed_later), look(changed))
    assert tiny.calls(changed_later) == (0, 3)


def timm_model() -> nn.Module:
    try:
        external.import_timm()
    except Absent as absent:
        pytest.skip(str(absent))
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5).eval()
    sharpen(model)
    return model


class Custom(nn.Module):
    """A user's model: a stock encoder between two multilayer perceptrons of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 48))
        self.encoder = tiny.bert().encoder
        self.after = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.encoder(self.before(x)).last_hidden_state)


def custom_model() -> nn.Module:
    model = Custom().eval()
    sharpen(model)
    return model


@pytest.fixture(params=["timm", "custom"])
def other(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[], nn.Module], list[str] | str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if request.param == "timm":
        yield timm_model, ["qkv", "fc1"], torch.randn(2, 3, 32, 32, generator=generator)
    else:
        yield (
            custom_model,
            r"(before|after)\.[02]|.*\.(query|intermediate\.dense)",
            torch.randn(2, 7, 20, generator=generator),
        )


def test_models_of_other_packages(
    other: tuple[Callable[[], nn.Module], list[str] | str, torch.Tensor], when: str
) -> None:
    build, targets, x = other
    models = [build(), build()]
    plain = models[0](x).detach()
    if when == "before":
        to_fast(models[1])
    stock, fast = (adapted(model, target_modules=targets) for model in models)
    if when == "after":
        to_fast(fast)
    with torch.inference_mode():
        expected = stock(x)
        assert tiny.relative_error(fast(x), expected) < BAR and tiny.calls(fast) == (3, 0), tiny.reasons(fast)
        assert tiny.relative_error(expected, plain) > 1e-3
        with fast.disable_adapter():
            assert tiny.relative_error(fast(x), plain) < BAR
        merged = fast.merge_and_unload()
        assert tiny.relative_error(merged(x), expected) < 1e-4 and tiny.calls(merged)[1] == 0
