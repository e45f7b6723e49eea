"""Fingerprints: equal for copies, different for whatever computes something else, and compared with what really runs."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.metadata
import subprocess
import sys
import time

import pytest
import torch

from fastencoder import NotEligibleError, explain, fingerprints, registry, to_fast
from fastencoder.fingerprints import __main__ as command
from fastencoder.fingerprints import live, source
from fastencoder.fingerprints.normalised import closure
from fastencoder.fingerprints.record import Record, load, recorded

from . import copied, tiny
from .conformance import batches
from .conformance.case import build
from .conformance.cases import CASES

MODELS = "transformers.models"


def of(name: str) -> str:
    """The fingerprint of `package.module.Class` below transformers.models."""
    module, _, layer = name.rpartition(".")
    return closure(f"{MODELS}.{module}", layer).fingerprint


def same(names: str, layers: str) -> set[str]:
    """The fingerprints of `package`s' `Layer`s, package by package."""
    return {
        of(f"{package}.modeling_{package}.{layer}") for package, layer in zip(names.split(), layers.split(), strict=True)
    }


# ---- equal and different sources of transformers


def test_layers_that_were_copied_from_one_another_are_equal() -> None:
    bert = same(
        "bert roberta xlm_roberta electra camembert ernie bert_generation roc_bert",
        "BertLayer RobertaLayer XLMRobertaLayer ElectraLayer CamembertLayer ErnieLayer BertGenerationLayer RoCBertLayer",
    )
    bert |= {of("bridgetower.modeling_bridgetower.BridgeTowerTextLayer")}
    bert |= {of("data2vec.modeling_data2vec_text.Data2VecTextLayer")}
    assert len(bert) == 1
    vit = same(
        "vit deit audio_spectrogram_transformer ijepa vit_mae vit_msn vivit",
        "ViTLayer DeiTLayer ASTLayer IJepaLayer ViTMAELayer ViTMSNLayer VivitLayer",
    )
    assert len(vit) == 1
    wav2vec2 = same(
        "wav2vec2 hubert sew unispeech unispeech_sat",
        "Wav2Vec2EncoderLayer HubertEncoderLayer SEWEncoderLayer UniSpeechEncoderLayer UniSpeechSatEncoderLayer",
    )
    assert wav2vec2 == {of("data2vec.modeling_data2vec_audio.Data2VecAudioEncoderLayer")}
    # Six classes; their files transpose keys as (-1, -2) or as (2, 3), which is the same, but not the same source.
    clip = same(
        "clip clipseg metaclip_2 x_clip",
        "CLIPEncoderLayer CLIPSegEncoderLayer MetaClip2EncoderLayer XCLIPEncoderLayer",
    )
    assert len(clip) == 1
    altclip = same("altclip chinese_clip", "AltCLIPEncoderLayer ChineseCLIPVisionLayer")
    assert len(altclip) == 1 and altclip != clip


def test_layers_that_compute_something_else_are_different() -> None:
    names = (
        "bart.modeling_bart.BartEncoderLayer",  # the first two have the same parts, under the same names
        "mbart.modeling_mbart.MBartEncoderLayer",
        "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayer",
        "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm",
        "bert.modeling_bert.BertLayer",
        "roformer.modeling_roformer.RoFormerLayer",
        "bros.modeling_bros.BrosLayer",
        "rembert.modeling_rembert.RemBertLayer",
    )
    assert len({of(name) for name in names}) == len(names)


# ---- what ships


def test_every_registered_class_of_transformers_is_recorded() -> None:
    """Run `python -m fastencoder.fingerprints update` in an environment of each tested version."""
    record = load(command.FILE)
    names = {each.layer_class for each in registry.entries() if each.layer_class.startswith(MODELS)}
    assert not names - set(record.classes)
    assert not set(record.classes) - names
    version = importlib.metadata.version("transformers")
    if version in record.versions:
        found = command.installed(names)
        assert {name: entry[version] for name, entry in record.classes.items() if version in entry} == found


def test_the_record_is_read_as_it_is_written(tmp_path) -> None:
    record = load(command.FILE)
    assert record.to_json() == command.FILE.read_text(encoding="utf-8")
    assert len(record.to_json().splitlines()) == len(record.classes) + 2
    assert load(tmp_path / "none.json") == Record((), {})
    merged = Record((), {}).updated("5.9.0", {"a.B": "1"}, {"a.B", "a.C"}).updated("5.10.0", {"a.B": "2"}, {"a.B", "a.C"})
    assert merged == Record(("5.9.0", "5.10.0"), {"a.B": {"5.9.0": "1", "5.10.0": "2"}})
    assert merged.without("5.9.0") == Record(("5.10.0",), {"a.B": {"5.10.0": "2"}})
    assert merged.alike("2") == ("a.B",) and merged.fingerprints("a.B") == {"1", "2"} and not merged.fingerprints("a.C")
    assert merged.updated("5.10.0", {}, {"a.B"}).classes == {"a.B": {"5.9.0": "1"}}


def test_the_command_lists_what_changed(monkeypatch, capsys, tmp_path) -> None:
    bert, vit = f"{MODELS}.bert.modeling_bert.BertLayer", f"{MODELS}.vit.modeling_vit.ViTLayer"
    version = importlib.metadata.version("transformers")
    monkeypatch.setattr(command, "FILE", tmp_path / "recorded.json")
    entries = [registry.by_class(bert), registry.by_class(vit)]
    monkeypatch.setattr(command.registry, "entries", lambda: entries)
    monkeypatch.setattr(command, "unregistered", lambda record, names: iter(()))
    assert command.main(["check"]) == 1 and "in no version recorded" in capsys.readouterr().out
    assert command.main(["update"]) == 0
    assert set(load(command.FILE).classes) == {bert, vit} and load(command.FILE).versions == (version,)
    assert command.main(["check"]) == 0
    capsys.readouterr()
    stale = Record(("5.0.0",), {bert: {"5.0.0": "0" * 16}, vit: {"5.0.0": of("vit.modeling_vit.ViTLayer")}})
    command.FILE.write_text(stale.to_json(), encoding="utf-8")
    assert command.main(["check"]) == 1
    said = capsys.readouterr().out
    assert "bert.modeling_bert.BertLayer" in said and "changed" in said and "ViTLayer" not in said
    gone = f"{MODELS}.bert.modeling_bert.NoSuchLayer"
    entries.append(registry.Entry(gone, entries[0].adapter))
    kinds = {d.kind for d in command.compare(Record(("5.0.0",), {gone: {"5.0.0": "1"}}), version, {}, {gone})}
    assert kinds == {command.GONE}
    assert command.main(["forget", "5.0.0"]) == 0 and load(command.FILE) == Record((), {})


def test_the_command_finds_classes_of_the_same_source(monkeypatch) -> None:
    """Not registered, a class of transformers is found by its source."""
    roberta = f"{MODELS}.roberta.modeling_roberta.RobertaLayer"
    file = source.transformers_folder() / "models" / "roberta" / "modeling_roberta.py"
    monkeypatch.setattr(command, "_modelling_files", lambda: [file])
    names = {name for name in recorded().classes if name != roberta}
    (found,) = command.unregistered(recorded(), names)
    assert (found.kind, found.layer_class) == (command.LIKE, roberta)


def test_nothing_is_read_at_import_and_a_class_costs_little() -> None:
    code = "import sys, fastencoder; from fastencoder.fingerprints import record, source; "
    code += "print(record.recorded.cache_info().currsize, source._parse.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == ["0", "0"]
    times = []
    for name in ("bert.modeling_bert.BertLayer", "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayer"):
        module, _, layer = f"{MODELS}.{name}".rpartition(".")
        cls = getattr(importlib.import_module(module), layer)
        for _ in range(3):  # the machine may be doing something else
            source._parse.cache_clear()
            fingerprints.known._closures.pop(cls, None)
            start = time.process_time()
            assert fingerprints.find(cls) is not None
            times.append(time.process_time() - start)
    assert min(times[:3]) < 0.05 and min(times[3:]) < 0.05


# ---- copies of a user


def test_a_copied_layer_is_fast_and_exact(tmp_path) -> None:
    with copied.module(tmp_path, copied.source()) as module:
        model, batch = copied.model(module), tiny.ragged()
        assert [row.status for row in explain(model)] == ["eligible"] * 3
        assert {row.notes for row in explain(model)} == {("same source as BertLayer",)}
        fast = to_fast(copy.deepcopy(model))
        assert fast.encoder.layer[0]._fastencoder.stack.may_carry  # the loop is a copy too
        with torch.inference_mode():
            assert tiny.relative_error(fast(**batch), model(**batch), batch["attention_mask"]) < 1e-5
        assert tiny.calls(fast) == (3, 0)
        assert "same source as BertLayer" in str(explain(fast))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.attention_head_size ** (-0.5)", "self.attention_head_size ** (-0.25)"),
        ("self.LayerNorm(hidden_states + input_tensor)", "self.LayerNorm(hidden_states)"),
        ("scaling=self.scaling", "scaling=self.scaling * 2"),
        ("attn_weights = attn_weights + attention_mask", "attn_weights = attn_weights - attention_mask"),
        ("nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)", "nn.LayerNorm(config.hidden_size)"),
        ("class MineIntermediate(nn.Module)", "class MineIntermediate(nn.Identity)"),
        ("ACT2FN[config.hidden_act]", "ACT2FN['relu']"),
        ("self.output(intermediate_output,", "self.output(torch.relu(intermediate_output),"),
    ],
)
def test_a_copy_with_one_term_changed_is_not_known(tmp_path, old: str, new: str) -> None:
    text = copied.source()
    assert old in text
    with copied.module(tmp_path, text.replace(old, new)) as module:
        assert fingerprints.fingerprint(module.MineLayer) is not None
        assert fingerprints.find(module.MineLayer) is None


def test_words_do_not_count(tmp_path) -> None:
    text = copied.source()
    for old, new in (
        ("class MineOutput(nn.Module):", 'class MineOutput(nn.Module):\n    """Mine."""\n    # mine'),
        ("should be used as a decoder", "is no encoder"),
        ("past_key_values: Cache | None", "past_key_values: Any"),
    ):
        assert old in text
        text = text.replace(old, new)
    with copied.module(tmp_path, text) as module:
        assert fingerprints.find(module.MineLayer).like == f"{MODELS}.bert.modeling_bert.BertLayer"


def test_statements_that_change_what_was_defined_count(tmp_path) -> None:
    text = copied.source() + "\nMineOutput.forward = MineSelfOutput.forward\n"
    with copied.module(tmp_path, text) as module:
        assert fingerprints.find(module.MineLayer) is None


def test_a_loop_of_their_own_gets_padded_hidden_states(tmp_path) -> None:
    """The layers are copies, the loop around them is not: it may look at what passes between them."""
    text = copied.source()
    start = text.index("hidden_states = layer_module(")
    between = f"hidden_states = hidden_states - 0.1 * hidden_states.mean(1, keepdim=True)\n{' ' * 12}"
    text = text[:start] + between + text[start:]
    with copied.module(tmp_path, text) as module:
        model = copied.model(module)
        fast = to_fast(copy.deepcopy(model))
        assert not fast.encoder.layer[0]._fastencoder.stack.may_carry
        ids = tiny.ragged()["input_ids"]
        with torch.inference_mode():
            assert tiny.relative_error(fast(ids), model(ids)) < 1e-5
        assert tiny.calls(fast) == (3, 0)


def test_padding_delegates_where_a_convolution_may_follow(tmp_path) -> None:
    with copied.module(tmp_path, copied.source()) as module:
        model, batch = copied.model(module), tiny.ragged()
        model.after = torch.nn.Conv1d(48, 48, 3)
        fast = to_fast(model)
        with torch.inference_mode():
            fast(**batch)
            assert tiny.calls(fast) == (0, 3)
            fast(batch["input_ids"])
        assert tiny.calls(fast) == (3, 3)


def test_a_class_of_transformers_that_nobody_registered(monkeypatch) -> None:
    """SAM 3's light text encoder has SigLIP's layers between two convolutions over positions, which padding must not change."""
    case = next(case for case in CASES if case.id == "sam3_lite_text.Sam3LiteTextTextEncoderLayer.text")
    monkeypatch.delitem(registry._entries, case.layer_class_name, raising=False)
    config = {**case.config, "use_repmixer_blocks": True, "num_hidden_layers": 4}
    stock = build(dataclasses.replace(case, config=config))
    fast = to_fast(copy.deepcopy(stock))
    assert [row.notes for row in explain(fast)] == [("same source as SiglipEncoderLayer",)] * 2
    for pattern, expected in ((batches.NONE, (2, 0)), (batches.RIGHT, (2, 2))):
        batch = batches.build(case, stock, pattern)
        with torch.inference_mode():
            ours, theirs = fast(**batch.inputs).last_hidden_state, stock(**batch.inputs).last_hidden_state
        assert tiny.relative_error(ours, theirs, batch.real) < 1e-5
        assert tiny.calls(fast) == expected


@pytest.mark.parametrize("what", ["forward", "inner forward", "another method", "function", "a new method"])
def test_code_that_was_patched_is_not_known(tmp_path, monkeypatch, what: str) -> None:
    with copied.module(tmp_path, copied.source()) as module:
        model = copied.model(module)
        assert fingerprints.find(module.MineLayer) is not None
        if what == "forward":
            monkeypatch.setattr(module.MineLayer, "forward", lambda self, hidden_states, *args, **kwargs: hidden_states)
        elif what == "inner forward":
            monkeypatch.setattr(module.MineOutput, "forward", module.MineSelfOutput.forward)
        elif what == "another method":
            monkeypatch.setattr(module.MineLayer, "feed_forward_chunk", lambda self, x: x)
        elif what == "function":
            monkeypatch.setattr(module, "eager_attention_forward", lambda *args, **kwargs: None)
        else:
            monkeypatch.setattr(module.MineLayer, "__call__", lambda self, x: x, raising=False)
        assert fingerprints.find(module.MineLayer) is None
        with pytest.raises(NotEligibleError):
            to_fast(model)


def test_a_file_that_was_edited_after_its_import_is_not_known(tmp_path) -> None:
    with copied.module(tmp_path, copied.source().replace("-0.5", "-0.7")) as module:
        file = tmp_path / "copied_encoder.py"
        file.write_text(file.read_text(encoding="utf-8").replace("-0.7", "-0.5"), encoding="utf-8")
        assert fingerprints.find(module.MineLayer) is None


def test_what_has_no_source_is_not_known() -> None:
    made = type("Made", (torch.nn.Module,), {})
    assert fingerprints.fingerprint(made) is None and fingerprints.fingerprint(torch.nn.Linear) is None

    class Local(torch.nn.Module):
        pass

    assert fingerprints.find(Local) is None


def test_a_subclass_is_not_what_it_inherits_from(tmp_path) -> None:
    text = "from transformers.models.bert.modeling_bert import BertLayer\n\nclass MineLayer(BertLayer):\n    pass\n"
    with copied.module(tmp_path, text) as module:
        assert fingerprints.fingerprint(module.MineLayer) not in (None, of("bert.modeling_bert.BertLayer"))
        assert fingerprints.find(module.MineLayer) is None


def test_every_registered_class_runs_what_its_file_says() -> None:
    for name in ("bert.modeling_bert.BertLayer", "dinov2.modeling_dinov2.Dinov2Layer", "albert.modeling_albert.AlbertLayer"):
        module, _, layer = f"{MODELS}.{name}".rpartition(".")
        importlib.import_module(module)
        assert live.runs(closure(module, layer)), name
