"""`verify`: it finds a mistake in a fast layer, says in which one, and does not call right what it did not check."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2Model

import fastencoder
from fastencoder import checks
from fastencoder.checks import compare, layers
from fastencoder.checks import verify as verify_function
from fastencoder.checks.inputs import Batch
from fastencoder.checks.weights import draw
from fastencoder.cli import WIDTH

from .command_line import invoke
from .tiny import bert, bert_classifier, vit

verify_module = __import__("fastencoder.checks.verify", fromlist=["verify"])


@pytest.fixture
def wrong_layer(monkeypatch):
    """The fast copy's second layer has another bias; nothing else is wrong."""

    def wrong(model, *args, **settings):
        fast = fastencoder.to_fast(model, *args, **settings)
        with torch.no_grad():
            fast.encoder.layer[1].output.dense.bias.mul_(1.01)
        return fast

    monkeypatch.setattr(verify_module, "to_fast", wrong)


# ---- the check itself


def test_a_right_model_passes_and_is_not_changed() -> None:
    model = bert()
    before = copy.deepcopy(model.state_dict())
    found = verify_function(model, checks.ragged(model))
    assert found.passed and found.verdict.startswith("passed: 3 layers and 2 outputs")
    assert [row.name for row in found.layers] == [f"encoder.layer.{i}" for i in range(3)]
    assert all(row.fast_calls and not row.delegated_calls for row in found.layers)
    assert all(0 < row.error < row.bound for row in (*found.layers, *found.outputs))
    assert found.about["reference"] == "stock in fp64"
    assert not fastencoder.is_fast(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_mistake_is_found_in_its_layer_and_in_no_other(wrong_layer) -> None:
    model = bert()
    found = verify_function(model, checks.ragged(model))
    assert not found.passed
    assert [row.verdict for row in found.layers] == ["ok", "ABOVE", "ok"]
    assert {row.verdict for row in found.outputs} == {"ABOVE"}


def test_a_mistake_between_the_layers_is_found_in_the_outputs(monkeypatch) -> None:
    """Layers that are watched pad in and out, so only the run that nobody watches shows it."""

    def wrong(model, *args, **settings):
        fast = fastencoder.to_fast(model, *args, **settings)
        forward = fast.encoder.forward
        fast.encoder.forward = lambda *a, **k: _doubled(forward(*a, **k))
        return fast

    def _doubled(output):
        output["last_hidden_state"] = output["last_hidden_state"] * 1.001
        return output

    monkeypatch.setattr(verify_module, "to_fast", wrong)
    model = bert()
    found = verify_function(model, checks.ragged(model))
    assert {row.verdict for row in found.layers} == {"ok"}
    assert "ABOVE" in {row.verdict for row in found.outputs}


@pytest.mark.parametrize("part", ["attention.self.query.bias", "attention.output.dense.bias", "output.LayerNorm.bias"])
def test_drawn_weights_make_a_missing_bias_show(monkeypatch, part: str) -> None:
    def without(model, *args, **settings):
        fast = fastencoder.to_fast(model, *args, **settings)
        with torch.no_grad():
            fast.get_parameter(f"encoder.layer.0.{part}").zero_()
        return fast

    monkeypatch.setattr(verify_module, "to_fast", without)
    model = bert()
    for module in model.modules():  # as transformers initialises it
        model._init_weights(module)
    draw(model)
    found = verify_function(model, checks.ragged(model))
    assert found.layers[0].verdict == "ABOVE"


def test_layers_that_never_ran_fast_were_not_checked() -> None:
    sizes = dict(vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80)
    model = CLIPTextModel(CLIPTextConfig(**sizes, eos_token_id=98, bos_token_id=97, pad_token_id=1)).eval()
    found = verify_function(model, checks.ragged(model))
    assert {row.verdict for row in found.layers} == {"NOT RUN"}  # its attention is causal
    assert not found.passed and "never ran fast" in found.verdict
    assert all(row.reason for row in found.layers)


def test_a_model_without_anything_fast_does_not_pass() -> None:
    model = GPT2Model(GPT2Config(vocab_size=99, n_embd=48, n_layer=2, n_head=3, n_positions=64)).eval()
    found = verify_function(model, checks.ragged(model))
    assert not found.passed and not found.layers
    assert found.left and "nothing in this model" in found.verdict


def test_16_bits_are_held_to_twice_what_stock_is_away() -> None:
    model = bert().bfloat16()
    found = verify_function(model, checks.ragged(model))
    assert found.passed, found.verdict
    for row in (*found.layers, *found.outputs):
        assert row.dtype == "bf16" and row.stock_error > 1e-4
        assert row.bound == 2 * row.stock_error


def test_images_and_heads() -> None:
    for model in (vit(), bert_classifier()):
        found = verify_function(model, checks.ragged(model))
        assert found.passed, found.verdict
    assert [row.name for row in found.outputs] == ["logits"]


def test_a_dtype_that_stock_cannot_run_falls_back_to_fp32() -> None:
    class OnlyFloat(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x.float())

    _, dtype = layers.reference_of(OnlyFloat(), Batch("one", {"x": torch.ones(1, 3)}))
    assert dtype == torch.float32


# ---- the batches


def test_ragged_batches_have_every_kind_of_padding() -> None:
    batches = {batch.name: batch.real for batch in checks.ragged(bert())}
    assert batches.pop("no padding") is None
    right, left, holes, mixed = batches.values()
    assert (right[:, 0]).all() and not right[:, -1].all()
    assert (left[:, -1]).all() and not left[:, 0].all()
    assert (holes[:, 1:].long() - holes[:, :-1].long() > 0).any()  # a token behind padding
    assert not mixed[4].any() and mixed[5].tolist() == [True] + [False] * (mixed.shape[1] - 1)
    again = {batch.name: batch.inputs for batch in checks.ragged(bert(), seed=0)}
    other = {batch.name: batch.inputs for batch in checks.ragged(bert(), seed=1)}
    first = checks.ragged(bert())[0].inputs["input_ids"]
    assert torch.equal(first, again["no padding"]["input_ids"])
    assert not torch.equal(first, other["no padding"]["input_ids"])


def test_a_model_with_an_unknown_input_says_what_to_do() -> None:
    model = bert()
    model.main_input_name = "past_values"
    with pytest.raises(checks.CannotMakeInputs, match=r"past_values.*--inputs"):
        checks.ragged(model)


# ---- the numbers


def test_error_is_of_the_worst_row_and_nothing_hides() -> None:
    reference = torch.ones(10, 4, dtype=torch.float64)
    one_wrong = reference.clone()
    one_wrong[3] *= 1.5
    assert compare.error(one_wrong, reference) == pytest.approx(0.5)
    assert compare.error(reference, reference) == 0
    for broken in (math.nan, math.inf):
        assert compare.error(torch.full_like(reference, broken), reference) == math.inf
        assert compare.error(reference, torch.full_like(reference, broken)) == math.inf
    assert compare.error(reference[:5], reference) == math.inf
    assert compare.error(torch.zeros_like(reference), reference) == 1


def test_a_missing_output_is_infinitely_wrong() -> None:
    value, batch = torch.ones(2, 3), Batch("one", {"x": torch.ones(2, 3)})
    errors = compare.errors_of([{"a": value}], [{"a": value, "b": value}], [batch])
    assert errors == {"a": 0.0, "b": math.inf}


def test_only_what_depends_on_real_tokens_is_compared() -> None:
    real = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    batch = Batch("padded", {"input_ids": torch.zeros(3, 3)}, real)
    tokens = torch.arange(18.0).view(3, 3, 2)
    assert compare.real_tokens(tokens, batch).tolist() == tokens[real].tolist()
    assert compare.real_tokens(torch.zeros(3, 5, 2), batch) is None  # nothing says which of these are real
    pooled = torch.arange(6.0).view(3, 2)
    assert compare.real_rows(pooled, batch).tolist() == [[0.0, 1.0]]  # only the first begins with a real token
    assert compare.real_rows(torch.arange(9.0).view(3, 3), batch).tolist() == [[0.0]]


# ---- the command


def test_command_reports_as_text_markdown_and_json(saved: Path, tmp_path: Path) -> None:
    result = invoke("verify", str(saved), "--report", str(tmp_path / "report.md"))
    assert result.exit_code == 0, result.output
    assert "passed: 3 layers and 2 outputs within their bounds" in result.stdout
    lines = [line for line in result.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= WIDTH
    report = (tmp_path / "report.md").read_text()
    for said in (
        "**passed",
        f"torch {torch.__version__}",
        "| `encoder.layer.2` | BertLayer | layer | fp32 |",
        "fp64",
        "threads",
    ):
        assert said.replace("threads", "thread") in report
    result = invoke("verify", str(saved), "--json", "--report", str(tmp_path / "report.json"))
    said = json.loads(result.stdout)
    assert said == json.loads((tmp_path / "report.json").read_text())
    assert said["passed"] and len(said["layers"]) == 3
    assert said["layers"][0]["error"] < said["layers"][0]["bound"]


def test_command_exits_with_1_when_an_error_is_above_its_bound(wrong_layer, saved: Path) -> None:
    result = invoke("verify", str(saved))
    assert result.exit_code == 1
    assert "ABOVE" in result.stdout and "FAILED" in result.stdout
    assert not json.loads(invoke("verify", str(saved), "--json").stdout)["passed"]


def test_command_with_inputs_of_ones_own(saved: Path, tmp_path: Path) -> None:
    ids = torch.randint(5, 99, (2, 9))
    save_file(
        {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [4]])).long()}, tmp_path / "in"
    )
    said = json.loads(invoke("verify", str(saved), "--json", "--inputs", str(tmp_path / "in")).stdout)
    assert said["passed"] and said["batches"] == ["in (2 x, 13 real tokens)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "fp8"), "--dtype: 'fp8' is none of bf16, fp16, fp32"),
        (("--memory", "leen"), "did you mean lean?"),
        (("--device", "tpu"), "--device: 'tpu' is none of cpu, cuda"),
        (("--report", "report.txt"), "--report ends in: '.txt' is none of .md, .json"),
        (("--report", "no/such/folder/report.md"), "there is no folder"),
        (("--inputs", __file__), "cannot read"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_2(saved: Path, options: tuple[str, ...], message: str) -> None:
    result = invoke("verify", str(saved), *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_inputs_that_the_model_does_not_take_are_one_line(saved: Path, tmp_path: Path) -> None:
    save_file({"pixel_values": torch.zeros(1, 3, 8, 8)}, tmp_path / "in")
    result = invoke("verify", str(saved), "--inputs", str(tmp_path / "in"))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "does not run" in result.stderr
