"""The command line: what it says, that it says so as JSON, and what it does with a wrong question."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel
from typer.main import get_command

import fastencoder
from fastencoder import registry
from fastencoder.cli import WIDTH, app, load_model, loading

from .command_line import invoke

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny BERT classifier as save_pretrained leaves it."""
    BertForSequenceClassification(BertConfig(**TINY)).save_pretrained(tmp_path)
    return tmp_path


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout == f"fastencoder {fastencoder.__version__}\n"


def test_no_arguments_prints_help() -> None:
    text = invoke().output
    for command in ("demo", "explain", "models"):
        assert command in text


def test_mistyped_command_suggests_the_right_one() -> None:
    result = invoke("expain", "bert")
    assert result.exit_code == 2
    assert "explain" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("expain", "bert"), "explain"),
        (("explain",), "MODEL"),
        (("explain", "bert", "--jsn"), "--json"),
        (("explain", "bert", "more"), "more"),
        (("demo", "--paragraphs", "many"), "--paragraphs"),
        (("bench", "bert", "--texts", "no-such-file"), "no-such-file"),
        (("verify", "bert", "--inputs", "no-such-file"), "no-such-file"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_explain_folder_names_every_layer(saved: Path) -> None:
    result = invoke("explain", str(saved))
    assert result.exit_code == 0, result.output
    assert "bert.encoder.layer.0" in result.stdout and "3 eligible" in result.stdout
    assert "BertForSequenceClassification" in result.stdout
    assert "post-LN" in result.stdout and "eligible" in result.stdout
    assert "not real" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= WIDTH


def test_explain_json_is_the_report(saved: Path) -> None:
    result = invoke("explain", str(saved), "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    report = fastencoder.explain(load_model(str(saved))[0])
    assert {key: said[key] for key in report.to_dict()} == json.loads(json.dumps(report.to_dict()))
    assert said["model_class"] == "BertForSequenceClassification"
    assert said["notes"] == []


def test_explain_folder_without_weights_says_so(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    result = invoke("explain", str(saved), "--json")
    assert result.exit_code == 0, result.output
    assert any("safetensors" in note for note in json.loads(result.stdout)["notes"])


def test_explain_never_runs_a_models_own_code(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "own.OwnModel", "AutoConfig": "own.OwnConfig"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "own.py").write_text(f"open({str(saved / 'ran')!r}, 'w')\n")
    result = invoke("explain", str(saved), "--json")
    assert not (saved / "ran").exists()
    assert result.exit_code == 0, result.output
    assert any("own" in note for note in json.loads(result.stdout)["notes"])


@pytest.mark.parametrize("name", ["bert", "BERT", "BertConfig"])
def test_explain_model_type(name: str) -> None:
    result = invoke("explain", name)
    assert result.exit_code == 0, result.output
    assert f"encoder.layer.0 .. {BertConfig().num_hidden_layers - 1}" in result.stdout
    assert "not real" in result.stdout


@pytest.mark.parametrize("name", ["xlm-roberta", "xlm_roberta"])
def test_dash_and_underscore_mean_the_same(name: str) -> None:
    assert invoke("explain", name).exit_code == 0


def test_model_type_is_built_with_sizes_and_dtype_of_its_config() -> None:
    model, _ = load_model("vit")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert model.config.hidden_size == model.layernorm.weight.shape[0]
    assert not model.training


@pytest.mark.parametrize(
    "name",
    ["albert", "bert", "clip", "deberta-v2", "dinov3_vit", "modernbert", "mpnet", "qwen2_vl", "swin", "t5", "whisper"],
)
def test_a_model_type_of_each_kind_can_be_explained(name: str) -> None:
    model, _ = load_model(name)
    assert any(row.status == "eligible" for row in fastencoder.explain(model))


def test_a_model_too_large_for_this_machine_is_explained_without_memory(monkeypatch) -> None:
    monkeypatch.setattr(loading, "_MOST_BYTES", 2**20)
    model, _ = load_model("bert")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert fastencoder.explain(model).eligible


def test_explain_of_a_model_that_is_refused_exits_with_1() -> None:
    result = invoke("explain", "gpt2")
    assert result.exit_code == 1
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brt", "bert"),
        ("distilbrt", "distilbert"),
        ("sentence-transformers/all-MiniLM-L6-v2", "not downloaded"),
        ("./no/such/folder", "not downloaded"),
        ("", "neither"),
        ("\N{SNOWMAN}", "neither"),
        ("[bold]x[/nonsense]", "neither"),
        (__file__, "is a file"),
    ],
)
def test_unknown_model_is_one_line_and_exit_2(name: str, expected: str) -> None:
    for options in ((), ("--json",)):
        result = invoke("explain", name, *options)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert expected in result.stderr


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "{}", '{"model_type": "nobody-has-this"}', '{"model_type": "bert", "hidden_size": "wide"}'],
)
def test_broken_config_is_one_line_and_exit_2(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    result = invoke("explain", str(tmp_path))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_broken_weights_are_one_line_and_exit_2(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not weights")
    result = invoke("explain", str(saved))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_folder_without_config_points_to_the_one_inside(tmp_path: Path) -> None:
    assert "no config.json" in invoke("explain", str(tmp_path)).stderr
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "0_Transformer")
    result = invoke("explain", str(tmp_path))
    assert result.exit_code == 2
    assert "0_Transformer" in result.stderr


def test_models_lists_every_encoder_layer_class() -> None:
    result = invoke("models")
    assert result.exit_code == 0
    encoders = [entry for entry in registry.entries() if not entry.adapter.decoder]
    assert len(encoders) > 20
    for entry in encoders:
        assert entry.layer_class.rsplit(".", 1)[-1] in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= WIDTH


def test_models_json_is_the_registry() -> None:
    rows = json.loads(invoke("models", "--json").stdout)
    encoders = {entry.layer_class: entry for entry in registry.entries() if not entry.adapter.decoder}
    assert {row["layer_class"] for row in rows} == set(encoders)
    assert len(rows) == len(encoders)
    for row in rows:
        entry = encoders[row["layer_class"]]
        assert row["family"] == entry.adapter.family
        assert set(row["model_types"]) == set(entry.model_types)


def test_explain_reads_a_models_dtype(tmp_path: Path) -> None:
    BertModel(BertConfig(**TINY)).to(torch.bfloat16).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert model.dtype == torch.bfloat16


def test_python_dash_m_is_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastencoder", "--version"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"fastencoder {fastencoder.__version__}\n"


def test_explain_with_settings(monkeypatch, saved: Path) -> None:
    from fastencoder.kernels.linear import cpu as linear_cpu

    monkeypatch.setattr(linear_cpu, "float32_is_faster", lambda dtype, tokens: False)
    monkeypatch.setattr(linear_cpu, "_multiplies", lambda dtype: True)

    def said(*options: str) -> dict:
        return json.loads(invoke("explain", str(saved), "--json", *options).stdout)

    whole = said()["extra_bytes"]
    assert whole > 0
    assert said()["lean_bytes"] == said("--memory", "lean")["extra_bytes"] == 0
    assert {row["compute_dtype"] for row in said()["layers"]} == {"float32"}
    half = said("--compute-dtype", "bf16")
    assert whole // 2 <= half["extra_bytes"] <= 1.1 * whole / 2  # numbers in fixed point share scales
    assert half["lean_bytes"] is None
    assert {row["compute_dtype"] for row in half["layers"]} == {"bfloat16"}
    refused = invoke("explain", str(saved), "--compute-dtype", "bf16", "--memory", "lean", "--json")
    assert refused.exit_code == 1
    assert "leave one of the two out" in json.loads(refused.stdout)["layers"][0]["reasons"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "leen"), "--memory: 'leen' is none of default, lean; did you mean lean?"),
        (("--compute-dtype", "int8"), "--compute-dtype: 'int8' is none of bf16, fp16, fp32"),
    ],
)
def test_explain_with_a_wrong_setting(options: tuple[str, str], message: str) -> None:
    result = invoke("explain", "bert", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_every_command_is_described_in_the_documents() -> None:
    """docs/cli.md has a section for each command that `--help` lists, in its order, and the first line of its help."""
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = list(get_command(app).commands.items())
    assert re.findall(r"^## (\w+)$", page, re.M) == [name for name, _ in commands]
    shown = " ".join(page.replace("│", " ").split())
    for name, command in commands:
        assert f"{name} {' '.join(command.help.split(chr(10) + chr(10))[0].split())}" in shown
