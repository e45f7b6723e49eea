"""The demo: its parts by their formulas, and the whole of it on a few paragraphs."""

from __future__ import annotations

import re
import runpy
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import fastencoder
from fastencoder.cli import app
from fastencoder.demo import data, measure, roundtrip

CPU = torch.device("cpu")
TINY = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from a PNG's header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.fixture(autouse=True)
def short_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastencoder.demo, "PADDING_SHARES", (0.0, 0.8))


def small_demo(path: Path):
    arguments = ["demo", "--paragraphs", "12", "--batch-size", "6", "--rounds", "1", "--plot", str(path)]
    return CliRunner().invoke(app, arguments)


# ---- the text


def test_paragraphs_are_real_different_and_reproducible() -> None:
    texts = data.paragraphs(100)
    assert len(texts) == len(set(texts)) == 100
    assert texts == data.paragraphs(100)
    assert all(text.strip() == text and text for text in texts)
    assert len(data.paragraphs(10**6)) > 1000  # all there are


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.85])
def test_ragged_lengths_have_the_share_of_padding_that_was_asked_for(share: float) -> None:
    lengths = data.ragged_lengths(16, 128, share)
    assert len(lengths) == 16 and max(lengths) == 128 and min(lengths) >= 3
    assert 1 - sum(lengths) / (16 * 128) == pytest.approx(share, abs=0.01)


# ---- the measures


def test_pool_ignores_padding_and_has_length_1() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [99.0, -99.0]]])
    assert measure.pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_nearest_is_never_the_text_itself() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 1.3])
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    assert measure.nearest(embeddings).tolist() == [1, 0, 3, 2]


def test_difference_by_hand() -> None:
    one = measure.Answers(torch.tensor([[3.0, 4.0]]), torch.eye(3))
    changed = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    other = measure.Answers(torch.tensor([[3.0, 3.0]]), changed)
    found = measure.difference(other, one)
    assert found.token_error == pytest.approx(1 / 5)
    assert found.largest == pytest.approx(0.8)
    assert found.cosine == pytest.approx(0.6)
    assert found.texts == 3


def test_difference_counts_unchanged_neighbours() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 1.3])
    moved = torch.tensor([0.0, 0.8, 1.0, 1.3])  # the second leaves the first for the third; the third follows
    one, other = (measure.Answers(torch.ones(1, 1), torch.stack([a.cos(), a.sin()], 1)) for a in (angles, moved))
    found = measure.difference(other, one)
    assert (found.neighbours, found.texts) == (2, 4)  # of the first and the last


def difference(error: float) -> measure.Difference:
    return measure.Difference(error, 0.0, 1.0, 1, 1)


def test_fp32_answers_pass_only_within_rounding() -> None:
    for error, passed in ((1e-6, True), (4e-5, True), (6e-5, False), (float("nan"), False)):
        check = measure.Check(torch.float32, difference(error), difference(0.0), difference(error))
        assert check.passed is passed


def test_low_precision_answers_pass_when_as_near_to_fp32_as_stock() -> None:
    for error, passed in ((0.01, True), (0.019, True), (0.021, False), (float("nan"), False)):
        check = measure.Check(torch.bfloat16, difference(1.0), difference(0.01), difference(error))
        assert check.passed is passed


def test_interleaved_takes_both_sides_in_turn_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    # Seconds by round: stock 2, 2, 100 and fast 1, 50, 1, so the medians are 2 and 1.
    pace = {"stock": iter([2.0, 2.0, 100.0]), "fast": iter([1.0, 50.0, 1.0])}

    def seconds(model: str, batch: object) -> float:
        order.append(model)
        return next(pace[model])

    monkeypatch.setattr(measure, "seconds", seconds)
    ticks = []
    speed = measure.interleaved("stock", "fast", [SimpleNamespace(tokens=10)], 3, lambda: ticks.append(1))
    assert order == ["stock", "fast", "fast", "stock", "stock", "fast"]
    assert len(ticks) == 3
    assert (speed.stock, speed.fast, speed.ratio) == (5.0, 10.0, 2.0)
    assert (speed.ratio_low, speed.ratio_high) == (0.04, 100.0)


# ---- the way back


def test_same_bits_is_stricter_than_equal() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert roundtrip.same_bits(nan, nan.clone())
    assert not roundtrip.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not roundtrip.same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not roundtrip.same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert roundtrip.same_bits(torch.tensor(3), torch.tensor(3))


def tiny_batch() -> data.Batch:
    ids = torch.randint(1, TINY.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return data.Batch.of({"input_ids": ids, "attention_mask": mask}, CPU)


@torch.inference_mode()
def test_round_trip_of_a_tiny_model_is_exact_and_leaves_it_alone() -> None:
    model = BertModel(TINY).eval()
    steps = roundtrip.check(model, tiny_batch())
    assert [step.passed for step in steps] == [True] * 4
    assert {step.tensors for step in steps} == {len(model.state_dict()), 1}
    assert not fastencoder.is_fast(model)


@torch.inference_mode()
def test_round_trip_sees_one_changed_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fastencoder.reverse

    def careless(model):
        real(model)
        weight = model.encoder.layer[1].output.dense.weight
        weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(torch.inf))
        return model

    monkeypatch.setattr(fastencoder, "reverse", careless)
    saved_fast, reverse, _, saved = roundtrip.check(BertModel(TINY).eval(), tiny_batch())
    assert saved_fast.passed
    assert not reverse.passed and reverse.equal == reverse.tensors - 1
    assert not saved.passed


# ---- the whole


@pytest.mark.slow
def test_demo_prints_everything_and_draws_the_plot(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    result = small_demo(picture)
    assert result.exit_code == 0, result.output
    text = result.output
    positions = [
        text.index(part)
        for part in ("all-MiniLM-L6-v2", "What can be made fast", "Same answers?", "Speed", "The way back", "Plot")
    ]
    assert positions == sorted(positions)
    assert "encoder.layer.0 .. 5" in text and "BertLayer" in text
    for dtype in ("fp32", "bf16"):
        assert re.search(rf"^{dtype}: equal", text, re.MULTILINE)
        assert re.search(rf"^{dtype} +│ +[\d,]+ │ +[\d,]+ │ +\d+\.\d\dx │", text, re.MULTILINE), text
    assert text.count("12 of 12") >= 1  # the nearest neighbours in fp32
    tensors = re.findall(r"(\d+) of (\d+)\s*$", text, re.MULTILINE)
    assert len(tensors) >= 4 and all(equal == every for equal, every in tensors[-4:])
    width, height = png_size(picture)
    assert width > 600 and height > 300


@pytest.mark.slow
def test_demo_reports_no_speed_when_the_answers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fastencoder.to_fast

    def wrong(model, strict=True):
        with torch.no_grad():
            model.encoder.layer[3].attention.self.value.bias.add_(0.05)
        return real(model, strict)

    monkeypatch.setattr(fastencoder, "to_fast", wrong)
    result = small_demo(tmp_path / "plot.png")
    assert result.exit_code == 1
    assert "fp32: DIFFERENT" in result.output
    assert "tokens/s" not in result.output
    assert not (tmp_path / "plot.png").exists()


def test_demo_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    no_folder = CliRunner().invoke(app, ["demo", "--plot", str(tmp_path / "none" / "plot.png")])
    no_model = CliRunner().invoke(app, ["demo", "--model", str(tmp_path)])
    no_device = CliRunner().invoke(app, ["demo", "--device", "toaster"])
    for result, expected in ((no_folder, "--plot"), (no_model, "cannot load"), (no_device, "toaster")):
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert expected in result.stderr


@pytest.mark.slow
def test_example_finds_the_right_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parents[1] / "examples" / "embeddings.py"
    monkeypatch.setattr("sys.argv", [str(example), "how", "do", "modules", "get", "loaded?"])
    runpy.run_path(str(example), run_name="__main__")
    question, best, *others = capsys.readouterr().out.splitlines()
    assert question == "how do modules get loaded?"
    assert "import statement" in best
    assert len(others) == 4
