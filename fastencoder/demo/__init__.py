"""``fastencoder demo``: a real embedding model before and after ``to_fast``, on real text.

Nothing is printed that was not measured in this run, and no speed is printed before both sides gave the same answers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

import fastencoder
from fastencoder.demo import data, measure, plot, report, roundtrip
from fastencoder.demo.data import DemoError

__all__ = ["DemoError", "Settings", "run"]

#: Seconds of timed work for each dtype, when the number of rounds is not given: for the speed table and for the plot.
TIME_BUDGET = 20.0
PLOT_TIME_BUDGET = 10.0
#: Share of padding in the batches of the plot.
PADDING_SHARES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85)


@dataclass(frozen=True)
class Settings:
    """What the command line can change. ``rounds`` None: 3 to 15, as many as fit the time budgets."""

    paragraphs: int = 384
    batch_size: int = 32
    rounds: int | None = None
    plot: Path = Path("fastencoder-demo.png")
    model_dir: Path | None = None
    device: str | None = None


@dataclass(frozen=True)
class Pair:
    """The two sides of one comparison, with the same weights and dtype.

    They are two objects on purpose: the stock side is never touched by fastencoder, so nothing that conversion prepares
    or leaves behind can be in its time.
    """

    dtype: torch.dtype
    stock: PreTrainedModel
    fast: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype) -> Pair:
        """Copies of ``model`` in ``dtype``; the model itself is not changed."""
        stock = copy.deepcopy(model).to(dtype)
        return cls(dtype, stock, fastencoder.to_fast(copy.deepcopy(stock)))


def run(settings: Settings, out: Console) -> bool:
    """Run the demo and print it to ``out``.

    Returns: whether every check passed. Raises: DemoError, with one line that says what is missing.
    """
    device = _device(settings.device)
    model, tokenizer, folder = data.load(settings.model_dir, device)
    texts = data.paragraphs(settings.paragraphs)
    batches = data.batches(tokenizer, texts, settings.batch_size, data.max_length(folder, model), device)
    report.opening(out, model, folder, device, batches)

    found = fastencoder.explain(model)
    report.eligibility(out, found)
    if not found.eligible:
        return False

    dtypes = [torch.float32, torch.bfloat16] if device.type == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
    pairs = [Pair.of(model, dtype) for dtype in dtypes]
    with torch.inference_mode(), report.progress(out) as bar:
        checks, seconds = _check_answers(pairs, batches, bar)
        report.agreement(out, checks)
        if not all(check.passed for check in checks):
            report.answers_differ(out)
            return False

        speeds = []
        for pair, one_pass in zip(pairs, seconds, strict=True):
            rounds = settings.rounds or _rounds(TIME_BUDGET, one_pass)
            with bar.phase(f"{measure.name(pair.dtype)}: timing", rounds * len(batches)) as tick:
                speeds.append(measure.interleaved(pair.stock, pair.fast, batches, rounds, tick))
        report.speed(out, dtypes, speeds)

        steps = roundtrip.check(model, batches[0])
        report.way_back(out, steps)

        curves = _sweep(pairs, tokenizer, texts, settings, device, bar)
    plot.save(settings.plot, curves, title=f"{data.model_name(folder)}, {report.place(device)}")
    report.saved(out, settings.plot)
    return all(step.passed for step in steps)


def _rounds(budget: float, one_pass: float) -> int:
    """How many passes of ``one_pass`` seconds fit the budget; 3 at least for a median, 15 at most."""
    return max(3, min(15, round(budget / one_pass)))


def _device(wanted: str | None) -> torch.device:
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise DemoError(f"--device is cpu or cuda, not '{kind}'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device here")
    return torch.device(kind)


def _check_answers(
    pairs: list[Pair], batches: list[data.Batch], bar: report.Bar
) -> tuple[list[measure.Check], list[float]]:
    """Run every batch through both sides of every pair: the checks, and how long such a pass took in seconds.

    These untimed passes are also the warm-up: every shape is seen once by both sides.
    """
    checks, seconds = [], []
    exact: measure.Answers | None = None
    for pair in pairs:
        with bar.phase(f"{measure.name(pair.dtype)}: comparing answers", 2 * len(batches)) as tick:
            stock, stock_time = measure.answers(pair.stock, batches, tick)
            fast, fast_time = measure.answers(pair.fast, batches, tick)
        exact = exact or stock  # the pairs begin with fp32
        checks.append(measure.compare(pair.dtype, stock, fast, exact))
        seconds.append(stock_time + fast_time)
    return checks, seconds


def _sweep(
    pairs: list[Pair],
    tokenizer: data.Tokenizer,
    texts: list[str],
    settings: Settings,
    device: torch.device,
    bar: report.Bar,
) -> dict[str, list[plot.Point]]:
    """Speed of both sides over the share of padding, for every dtype."""
    ragged = [data.ragged_batch(tokenizer, texts, share, device) for share in PADDING_SHARES]
    curves: dict[str, list[plot.Point]] = {}
    for pair in pairs:
        points = curves.setdefault(measure.name(pair.dtype), [])
        one_pass = sum(measure.answers(side, ragged)[1] for side in (pair.stock, pair.fast))  # also the warm-up
        rounds = settings.rounds or _rounds(PLOT_TIME_BUDGET, one_pass)
        with bar.phase(f"{measure.name(pair.dtype)}: padding against speed", rounds * len(ragged)) as tick:
            for batch in ragged:
                speed = measure.interleaved(pair.stock, pair.fast, [batch], rounds, tick)
                points.append(plot.Point(batch.padding_share, speed.stock, speed.fast))
    return curves
