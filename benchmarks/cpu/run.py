"""The matrix: models, dtypes and workloads, cell after cell, each written as soon as it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import environment
from benchmarks.cpu import cell, environments, models, plots, results, tables, workloads
from benchmarks.cpu.pool import Pool
from benchmarks.cpu.systems import Source
from benchmarks.files import write_text

DTYPES = ("fp32", "bf16")
LONGEST_TEXT = 256  # tokens at which a paragraph of TEXT is cut
TEXTS = 32
Report = Callable[[str, int, int], None]  # what is done, rounds done, rounds in all
QUICK = {"minilm": ("W1", "W2", "W3", "W4", "TEXT"), "bert-base": ("W1",)}


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

    def chosen(self, model: str, folder: Path) -> list[workloads.Workload]:
        """The workloads that this model can run."""
        fitting = [workload for workload in self.workloads if not workloads.fits(workload, models.MODELS[model], folder)]
        return [w for w in fitting if not self.quick or w.name in QUICK.get(model, ())]


def source(model: str) -> Source:
    """The model's files, made if they are not there."""
    kind = models.MODELS[model].kind
    folder = models.folder(model, environments.CACHE)
    return Source(model, kind, folder, environments.CACHE / "exported" / model)


def measure(plan: Plan, console: Console) -> Iterator[results.Cell]:
    """All cells of the plan, one after the other."""
    found = environment(torch.device("cpu")) | {"threads": plan.threads}
    with shown(console) as report:
        for model in plan.models:
            files = source(model)
            chosen = plan.chosen(model, files.folder)
            if not chosen:
                console.print(f"{model}: none of the workloads is for it")
                continue
            yield from _model(plan, files, chosen, found, report)


def _model(
    plan: Plan, files: Source, chosen: list[workloads.Workload], found: dict[str, Any], report: Report
) -> Iterator[results.Cell]:
    tokens = real_tokens(files.folder)
    total = plan.rounds * len(chosen)

    def say(text: str) -> None:
        report(f"{files.name}: {text}", 0, total)

    with cell.prepared(files, chosen, tokens, plan.threads, say) as batches:
        for dtype in plan.dtypes:
            done = 0

            def say_dtype(text: str, dtype: str = dtype) -> None:
                report(f"{files.name} {dtype}: {text}", done, total)  # noqa: B023

            def tick(dtype: str = dtype) -> None:
                nonlocal done
                done += 1
                report("", done, total)

            with Pool(plan.systems, files, dtype, plan.threads, say_dtype) as pool:
                for work in batches:
                    yield cell.measure(pool, work, plan.rounds, say_dtype, tick) | {"environment": found}


def write(cells: dict[str, results.Cell], out: Path, images: Path | None) -> list[Path]:
    """`cpu.md`, and the plots where there is a folder for them. `cpu.json` is written by `results.merge`."""
    write_text(out / "cpu.md", tables.markdown(cells))
    return [out / results.FILE, out / "cpu.md", *(plots.bars(cells, images) if images else [])]


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
