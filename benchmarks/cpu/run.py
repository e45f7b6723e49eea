"""The matrix: models, dtypes and workloads, cell after cell, each written as soon as it is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import gpu_report_docs
from benchmarks.common import environment
from benchmarks.cpu import cell, environments, models, plots, results, tables, workloads
from benchmarks.cpu.pool import Pool
from benchmarks.cpu.systems import Source
from benchmarks.files import RESULTS, write_text

DTYPES = ("fp32", "bf16")
LONGEST_TEXT = 256  # tokens at which a paragraph of TEXT is cut
TEXTS = 32
Report = Callable[[str, int, int], None]  # what is done, rounds done, rounds in all
QUICK = {"minilm": ("W1 fp32", "W2 fp32", "W3 fp32", "W4 fp32", "W1 bf16", "W2 bf16", "W3 bf16", "W4 bf16")}
QUICK["bert-base"] = ("W1 fp32",)


class Meter:
    """How far one part of the work is."""

    def __init__(self, report: Report, label: str, total: int) -> None:
        self._report, self._label, self._total, self._done = report, label, total, 0

    def say(self, text: str) -> None:
        """What is done now."""
        self._report(f"{self._label}: {text}", self._done, self._total)

    def tick(self) -> None:
        """A round is over."""
        self._done += 1
        self._report("", self._done, self._total)


class Budget:
    """Seconds that a run may take: a cell begins only if the longest one so far would still end in time."""

    def __init__(self, seconds: float) -> None:
        self.left_out: list[str] = []
        self._end, self._longest = time.monotonic() + seconds, 0.0

    def allows(self, cell_name: str) -> bool:
        """Whether there is time for another cell; notes the name if not."""
        if time.monotonic() + self._longest < self._end:
            return True
        self.left_out.append(cell_name)
        return False

    def took(self, seconds: float) -> None:
        """A cell is done."""
        self._longest = max(self._longest, seconds)


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    models: tuple[str, ...]
    workloads: tuple[workloads.Workload, ...]
    dtypes: tuple[str, ...]
    systems: tuple[str, ...]
    rounds: int
    threads: int
    quick: bool = False
    seconds: float = math.inf

    def chosen(self, model: str, folder: Path) -> list[workloads.Workload]:
        """The workloads that this model can run."""
        return [workload for workload in self.workloads if not workloads.fits(workload, models.MODELS[model], folder)]

    def has(self, model: str, workload: str, dtype: str) -> bool:
        """Whether a cell is part of the plan."""
        return not self.quick or f"{workload} {dtype}" in QUICK.get(model, ("W1 fp32",))


def source(model: str) -> Source:
    """The model's files, made if they are not there."""
    kind = models.MODELS[model].kind
    folder = models.folder(model, environments.CACHE)
    return Source(model, kind, folder, environments.CACHE / "exported" / model)


def measure(plan: Plan, console: Console) -> Iterator[results.Cell]:
    """All cells of the plan, one after the other."""
    found = place(plan.threads)
    budget = Budget(plan.seconds)
    with shown(console) as report:
        for model in plan.models:
            files = source(model)
            chosen = plan.chosen(model, files.folder)
            if not chosen:
                console.print(f"{model}: none of the workloads is for it")
                continue
            yield from _model(plan, files, chosen, found, report, budget)
    if budget.left_out:
        console.print(f"there was no time for {', '.join(budget.left_out)}")


def place(threads: int) -> dict[str, Any]:
    """Where this is measured."""
    return environment(torch.device("cpu")) | {"threads": threads}


def _model(
    plan: Plan,
    files: Source,
    chosen: list[workloads.Workload],
    found: dict[str, Any],
    report: Report,
    budget: Budget,
) -> Iterator[results.Cell]:
    chosen = [w for w in chosen if any(plan.has(files.name, w.name, dtype) for dtype in plan.dtypes)]
    beginning = Meter(report, files.name, 0)
    with cell.prepared(files, chosen, real_tokens(files.folder), plan.threads, beginning.say) as batches:
        for dtype in plan.dtypes:
            wanted = [work for work in batches if plan.has(files.name, work.workload.name, dtype)]
            name = partial(results.key, files.name, dtype=dtype)
            wanted = [work for work in wanted if budget.allows(name(work.workload.name))]
            if not wanted:
                continue
            began = time.monotonic()
            meter = Meter(report, f"{files.name} {dtype}", plan.rounds * len(wanted))
            with Pool(plan.systems, files, dtype, plan.threads, meter.say) as pool:
                for work in wanted:
                    if budget.allows(name(work.workload.name)):
                        yield cell.measure(pool, work, plan.rounds, meter.say, meter.tick) | {"environment": found}
                        budget.took(time.monotonic() - began)
                        began = time.monotonic()


def write(out: Path, images: Path) -> list[Path]:
    """`cpu.md` and the plots, of all cells in `cpu.json`; and the page of the documentation, if they are the project's."""
    cells = results.read(out)
    write_text(out / "cpu.md", tables.markdown(cells))
    written = [out / results.FILE, out / "cpu.md", *plots.bars(cells, images)]
    if out.resolve() == RESULTS:
        gpu_report_docs.main([])
        written.append(gpu_report_docs.PAGE)
    return written


def real_tokens(folder: Path) -> list[int]:
    """A stream of the tokens of real text, where the model has a tokenizer; else empty."""
    return [token for text in real_texts(folder) for token in text]


def real_texts(folder: Path) -> list[list[int]]:
    """Paragraphs of `pydoc_data.topics` as token ids, with the special tokens; empty for a model without a tokenizer."""
    if not (folder / "tokenizer.json").exists():
        return []
    from tokenizers import Tokenizer

    from fastencoder.demo.data import paragraphs

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST_TEXT)
    return [encoded.ids for encoded in tokenizer.encode_batch(paragraphs(TEXTS))]


def text_workload() -> workloads.Workload:
    """TEXT, with the lengths that MiniLM's tokenizer gives."""
    return workloads.paragraphs_workload(real_texts(source("minilm").folder))


@contextmanager
def shown(console: Console) -> Iterator[Report]:
    """A progress bar; where no bar is seen, a line whenever something new is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task, began = progress.add_task("starting"), time.monotonic()

        def report(text: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, **({"description": text} if text else {}))
            if text and not console.is_terminal:
                console.print(f"{time.monotonic() - began:5.0f} s  {text}", markup=False, soft_wrap=True)

        yield report


def names(given: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Names separated by commas; all that are known if none is given.

    Raises:
        ValueError: one is not known.
    """
    chosen = tuple(name.strip() for name in given.split(",")) if given else tuple(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"{what}: {', '.join(unknown)} is none of {', '.join(known)}")
    return chosen
