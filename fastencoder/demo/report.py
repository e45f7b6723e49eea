"""What the demo prints. Numbers come in from outside; nothing is computed here but their form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedModel

from fastencoder.demo.data import Batch, model_name
from fastencoder.demo.measure import Check, Difference, Speed, Tick, name
from fastencoder.demo.roundtrip import Step
from fastencoder.report import Report


class Bar:
    """One phase of the work at a time: a bar that disappears when it is done, or a line where there is no terminal."""

    def __init__(self, out: Console, shown: Progress) -> None:
        self._out = out
        self._shown = shown

    @contextlib.contextmanager
    def phase(self, what: str, total: int) -> Iterator[Tick]:
        """Show ``what``; gives a function to call after each of ``total`` steps."""
        if not self._out.is_terminal:
            _line(self._out, f"... {what}")
        task = self._shown.add_task(what, total=total)
        try:
            yield lambda: self._shown.advance(task)
        finally:
            self._shown.remove_task(task)


@contextlib.contextmanager
def progress(out: Console) -> Iterator[Bar]:
    """A progress bar below what is printed meanwhile."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as shown:
        yield Bar(out, shown)


def place(device: torch.device) -> str:
    """The device in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} ({torch.backends.cpu.get_cpu_capability()})"


def opening(out: Console, model: PreTrainedModel, folder: Path, device: torch.device, batches: list[Batch]) -> None:
    """What is about to be compared, on what."""
    tokens, positions = sum(b.tokens for b in batches), sum(b.positions for b in batches)
    texts = sum(len(b.inputs["input_ids"]) for b in batches)
    attention = getattr(model.config, "_attn_implementation", "?")
    size = f"{model.num_parameters() / 1e6:.1f} M parameters"
    _line(out, f"{model_name(folder)} ({type(model).__name__}, {size})", style="bold")
    _line(out, f"on {place(device)}, torch {torch.__version__}; stock attention: {attention}")
    _line(
        out,
        f"{texts} paragraphs of Python's documentation in {len(batches)} batches, unsorted: {tokens:,} real tokens, "
        f"{1 - tokens / positions:.0%} padding",
    )


def eligibility(out: Console, found: Report) -> None:
    """The table of ``explain(model)``."""
    _heading(out, "What can be made fast")
    table = found.table()
    table.width = min(out.width, table.width or out.width)
    out.print(table)
    if not found.eligible:
        _line(out, "This model would be refused, so there is nothing to measure.", style="bold red")


def agreement(out: Console, checks: list[Check]) -> None:
    """How far the answers are from each other, per dtype."""
    _heading(out, "Same answers? (embeddings: mean of the tokens, normalised)")
    table = _table("dtype", "compared", "relative error", "largest difference", "smallest cosine", "same neighbour")
    for check in checks:
        exact = check.dtype == torch.float32
        _difference(table, name(check.dtype), "fast : stock", check.fast_to_stock)
        if not exact:
            _difference(table, "", "fast : stock fp32", check.fast_to_exact)
            _difference(table, "", "stock : stock fp32", check.stock_to_exact)
        table.add_section()
    out.print(table)
    for check in checks:
        bound = "within fp32's rounding" if check.dtype == torch.float32 else "as near to fp32 as stock is, within 2x"
        verdict = "equal" if check.passed else "DIFFERENT"
        _line(out, f"{name(check.dtype)}: {verdict} ({bound})", style="green" if check.passed else "bold red")


def answers_differ(out: Console) -> None:
    """Instead of the speed table."""
    _line(out, "The answers differ, so no speed is reported. This is a defect: please report it.", style="bold red")


def speed(out: Console, dtypes: list[torch.dtype], speeds: list[Speed]) -> None:
    """The speed table."""
    _heading(out, "Speed (forward of the whole model, both sides in turn on each batch, medians)")
    table = _table("dtype", "stock, tokens/s", "fast, tokens/s", "ratio", "ratio by round")
    for dtype, of in zip(dtypes, speeds, strict=True):
        by_round = f"{of.ratio_low:.2f} to {of.ratio_high:.2f}"
        table.add_row(name(dtype), f"{of.stock:,.0f}", f"{of.fast:,.0f}", f"{of.ratio:.2f}x", by_round)
    out.print(table)
    _line(
        out,
        "Real tokens only: padding counts for neither side. The stock side is a second model that fastencoder never "
        "touched. Sorting the texts by length would leave less padding to gain from: see the plot.",
    )


def way_back(out: Console, steps: list[Step]) -> None:
    """What ``reverse`` and saving gave."""
    _heading(out, "The way back, compared bit for bit")
    table = _table("step", "equal")
    for step in steps:
        mark = "green" if step.passed else "bold red"
        table.add_row(step.what, f"[{mark}]{step.equal} of {step.tensors}[/{mark}]")
    out.print(table)


def saved(out: Console, path: Path) -> None:
    """Where the plot is."""
    _heading(out, "Plot")
    out.print(f"throughput against padding: {path}", highlight=False, markup=False, soft_wrap=True)


def _difference(table: Table, dtype: str, what: str, of: Difference) -> None:
    neighbours = f"{of.neighbours} of {of.texts}"
    table.add_row(dtype, what, f"{of.token_error:.1e}", f"{of.largest:.1e}", f"{of.cosine:.7f}", neighbours)


def _table(first: str, *others: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="left" if column == "compared" else "right")
    return table


def _heading(out: Console, text: str) -> None:
    out.print(f"\n{text}", style="bold", highlight=False, markup=False)


def _line(out: Console, text: str, style: str | None = None) -> None:
    out.print(text, style=style, highlight=False, markup=False)
