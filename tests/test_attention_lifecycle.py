"""A model at the attention-only level lives on: reversed, copied, pickled, saved, explained, compiled."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastencoder
from fastencoder.attention_level import NAME, VarlenAttention, Window
from fastencoder.layers import FastLayer
from fastencoder.layers.traffic import Traffic

from . import tiny
from .attention_cases import CASES, AttentionCase
from .conformance import batches, measure
from .test_attention_level import BAR, case_of, counts, error_of, every_case, varlen

MASK = batches.mask(batches.RIGHT)


def state_of(model: nn.Module) -> list[Any]:
    """Everything that `to_fast` touches."""
    return [
        (
            type(module),
            list(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_always_called),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for module in model.modules()
    ]


@every_case
def test_reverse_undoes_everything(case: AttentionCase) -> None:
    model = case.build()
    before, keys = state_of(model), list(model.state_dict())
    batch = case.batch(model, batches.mask(batches.RIGHT, case.mask_size))
    stock = case.run(model, batch)[case.output]
    fastencoder.to_fast(model)
    assert fastencoder.is_fast(model) and state_of(model) != before
    assert list(model.state_dict()) == keys
    case.run(model, batch)
    with pytest.raises(fastencoder.AlreadyFastError):
        fastencoder.to_fast(model)
    fastencoder.reverse(model)
    assert state_of(model) == before
    assert not fastencoder.is_fast(model)
    assert torch.equal(case.run(model, batch)[case.output], stock)
    with pytest.raises(fastencoder.NotFastError):
        fastencoder.reverse(model)
    with fastencoder.fast(model):
        assert fastencoder.is_fast(model)
    assert state_of(model) == before


def test_configs_are_never_written_to(tmp_path: Path) -> None:
    case = case_of("mobilebert")
    model = case.build()
    before = copy.deepcopy(vars(model.config))
    fastencoder.to_fast(model)
    case.run(model, case.batch(model, MASK))
    assert vars(model.config) == before
    assert all(module.config is model.config for module in varlen(model))
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not fastencoder.is_fast(loaded)
    assert error_of(case, model, loaded, MASK) <= BAR
    other = type(model)(model.config).eval()  # a second model of the same config is a stock model
    assert not fastencoder.is_fast(other) and other.config._attn_implementation == "sdpa"


def test_a_config_can_be_exchanged() -> None:
    model = fastencoder.to_fast(case_of("mobilebert").build())
    other = copy.deepcopy(model.config)
    attention = varlen(model)[0]
    attention.config = other
    assert attention.config is other and vars(attention)["config"] is other


@pytest.mark.parametrize("case", CASES[:8], ids=lambda case: case.id)
def test_a_copy_is_fast_and_on_its_own(case: AttentionCase) -> None:
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    mask = batches.mask(batches.RIGHT, case.mask_size)
    case.run(model, case.batch(model, mask))
    other = copy.deepcopy(model)
    fastencoder.reverse(model)
    assert len(varlen(other)) == case.modules and counts(other) == (0, 0)
    assert error_of(case, other, stock, mask) <= BAR
    assert counts(other) == (case.modules, 0)
    assert state_of(fastencoder.reverse(other)) == state_of(stock)


UNPICKLE = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model, ids, mask = pickle.load(file)
with torch.inference_mode():
    output = model(ids, attention_mask=mask).last_hidden_state
import fastencoder
assert fastencoder.is_fast(model)
fastencoder.reverse(model)
assert not fastencoder.is_fast(model)
torch.save(output, sys.argv[2])
"""


def test_a_pickle_is_fast_in_another_process(tmp_path: Path) -> None:
    case = case_of("dia")
    model = fastencoder.to_fast(case.build())
    batch = case.batch(model, MASK)
    with open(tmp_path / "model.pickle", "wb") as file:
        pickle.dump((model, batch["input_ids"], MASK), file)
    paths = [str(tmp_path / "model.pickle"), str(tmp_path / "output.pt")]
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", UNPICKLE, *paths], check=True, cwd=root, timeout=300)
    assert torch.equal(torch.load(paths[1]), case.run(model, batch)[case.output])


# ---- with layers that are known


class Two(nn.Module):
    """A model with known layers, and one without, that share nothing but their caller."""

    def __init__(self) -> None:
        super().__init__()
        self.known = tiny.bert()
        self.unknown = case_of("mobilebert").build()


def test_a_model_with_both_levels() -> None:
    stock = Two().eval()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    assert {row.level for row in fastencoder.explain(model)} == {"layer", "attention"}
    assert {row.status for row in fastencoder.explain(model)} == {"fast"}
    case = case_of("mobilebert")
    for part in ("known", "unknown"):
        ours, theirs = getattr(model, part), getattr(stock, part)
        batch = {"input_ids": torch.randint(5, 30, MASK.shape), "attention_mask": MASK}
        real = MASK.bool()
        assert measure.error(case.run(ours, batch)[0][real], case.run(theirs, batch)[0][real]) <= BAR
    assert not any(isinstance(module, VarlenAttention) for module in model.known.modules())
    fastencoder.warmup(model, [(2, 8)])
    assert state_of(fastencoder.reverse(model)) == state_of(stock)


def test_what_is_refused_stays_refused() -> None:
    model = Two().eval()
    layer = model.known.encoder.layer[0]
    layer.intermediate.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(fastencoder.NotEligibleError):
        fastencoder.to_fast(model)
    assert not fastencoder.is_fast(model)
    fastencoder.to_fast(model, strict=False)
    assert not isinstance(layer, FastLayer)
    assert not any(isinstance(module, VarlenAttention) for module in model.known.modules())
    assert len(varlen(model)) == 3


def test_a_known_layer_in_other_hands_is_left_alone() -> None:
    """The code around a listed attention was read; somebody else's was not."""

    class Mixing(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + hidden.mean(1, keepdim=True)

    model = case_of("mobilebert").build()
    model.encoder.layer[1].ffn[0].output.add_module("mixing", Mixing())
    stays = [row for row in fastencoder.explain(model) if "Mixing" in "".join(row.reasons)]
    assert len(stays) == 3
    model.encoder.layer[0].__class__ = type("Own", (type(model.encoder.layer[0]),), {"__module__": __name__})
    rows = {row.name: row for row in fastencoder.explain(model)}
    assert rows["encoder.layer.0"].status == "left alone" and rows["encoder.layer.1"].level == "attention"


def test_a_convolution_behind_the_layers_keeps_padding() -> None:
    case = case_of("seamless_m4t")
    other = AttentionCase(**{**vars(case), "config": {**case.config, "add_adapter": True}})
    stock = other.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    reasons = {row.layer_class.rpartition(".")[2]: str(row.reasons) for row in fastencoder.explain(model)}
    assert "reads the hidden states at padding" in reasons["SeamlessM4TConformerEncoderLayer"]
    assert "not known" in reasons["SeamlessM4TConformerAdapterLayer"]
    batch = other.batch(model, MASK)
    assert torch.equal(other.run(model, batch)[other.output], other.run(stock, batch)[other.output])
    assert counts(model)[0] == 0


# ---- what is said


def test_explain() -> None:
    model = case_of("instructblip").build()
    report = fastencoder.explain(model)
    assert report.eligible and report.levels == {
        "transformers.models.instructblip.modeling_instructblip.InstructBlipQFormerLayer": "attention"
    }
    assert [(row.name, row.level, row.status, row.family) for row in report] == [
        (f"encoder.layer.{index}", "attention", "eligible", None) for index in range(3)
    ]
    assert "attention" in str(report) and "eligible" in str(report)
    described = json.loads(json.dumps(report.to_dict()))
    assert [row["level"] for row in described["layers"]] == ["attention"] * 3
    fastencoder.to_fast(model)
    with torch.no_grad():
        model(torch.randint(5, 50, (2, 6)), query_embeds=torch.randn(2, 4, 48), encoder_hidden_states=torch.randn(2, 7, 32))
    report = fastencoder.explain(model)
    assert {row.status for row in report} == {"fast"} and {row.level for row in report} == {"attention"}
    assert "1 of 1 calls ran the original attention; the latest because there is no padding" in report.reasons("fast")
    assert fastencoder.explain(tiny.bert()).levels == {"transformers.models.bert.modeling_bert.BertLayer": "layer"}


def test_a_model_without_weights_is_explained() -> None:
    from transformers import AutoModel, Wav2Vec2ConformerConfig

    with torch.device("meta"):
        model = AutoModel.from_config(Wav2Vec2ConformerConfig(num_hidden_layers=2))
    report = fastencoder.explain(model)
    assert set(report.levels.values()) == {"attention"}
    assert "not known" in report.reasons("eligible")


def test_decoders_and_cross_attention_are_left_alone() -> None:
    from transformers import DetrConfig, DiaConfig, DiaModel, LlamaConfig, LlamaModel
    from transformers.models.detr.modeling_detr import DetrDecoder

    sizes = dict(vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    with pytest.raises(fastencoder.NotEligibleError):
        fastencoder.to_fast(LlamaModel(LlamaConfig(**sizes)).eval())
    with pytest.raises(fastencoder.NotEligibleError):  # its queries attend to one another, and never to padding
        fastencoder.to_fast(DetrDecoder(DetrConfig(d_model=48, decoder_layers=2, decoder_attention_heads=3)).eval())
    heads = dict(num_key_value_heads=3, head_dim=16)
    crossing = dict(cross_num_attention_heads=3, cross_num_key_value_heads=3, cross_head_dim=16, cross_hidden_size=48)
    special = dict(pad_token_id=57, eos_token_id=58, bos_token_id=59)
    config = DiaConfig(
        encoder_config=dict(**sizes, **heads),
        decoder_config=dict(**sizes, **heads, **crossing, **special, num_channels=2),
        delay_pattern=[0, 1],
        **special,
    )
    stock = DiaModel(config).eval()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    kinds = (VarlenAttention, FastLayer)
    converted = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert converted == [f"encoder.layers.{index}" for index in range(2)]
    batch = dict(input_ids=torch.randint(5, 50, MASK.shape), attention_mask=MASK)
    batch["decoder_input_ids"] = torch.randint(5, 50, (len(MASK), 4, 2))
    with torch.no_grad():
        ours, theirs = model(**batch).last_hidden_state, stock(**batch).last_hidden_state
    assert measure.error(ours, theirs) <= BAR
    assert tiny.calls(model) == (2, 0)


# ---- compiled


@pytest.mark.slow
def test_a_compiled_model_runs_the_original_attention() -> None:
    case = case_of("dia")
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    batch = case.batch(model, MASK)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        ours = compiled(**batch)[case.output]
        theirs = stock(**batch)[case.output]
    assert measure.error(ours[MASK.bool()], theirs[MASK.bool()]) <= BAR
    assert counts(model) == (0, 0)
    assert error_of(case, model, stock, MASK) <= BAR and counts(model) == (case.modules, 0)


def test_the_hooks_of_a_window_leave_no_trace() -> None:
    module = nn.Linear(2, 2)
    before = {name: len(value) for name, value in vars(module).items() if isinstance(value, dict)}
    Window.install(module, Traffic())
    other = copy.deepcopy(module)
    for each in (module, other):
        Window.remove(each)
        assert {name: len(value) for name, value in vars(each).items() if isinstance(value, dict)} == before
