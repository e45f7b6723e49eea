"""`python -m benchmarks.cpu setup | run | scaling | report`; `make bench-setup`, `make bench`, `make bench-scaling`."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT
from benchmarks.cpu import bars, encode, environments, models, results, run, scaling, workloads
from benchmarks.cpu.systems import ENGINES, SYSTEMS
from benchmarks.files import RESULTS, output_folder

IMAGES = ROOT / "docs" / "images"
ROUNDS, QUICK_ROUNDS = 9, 3
QUICK_MINUTES = 7.5  # to begin the last cell in, which is that of a larger model: ten in all

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


@app.command()
def setup() -> None:
    """Make the peers' environments, the models' files and their exported forms, in .bench/."""
    for environment in environments.PACKAGES:
        console.print(f"environment {environment}")
        try:
            environments.make(environment)
        except subprocess.CalledProcessError as error:
            console.print(f"{environment} is not made ({error}); its systems will be not available", markup=False)
    environments.forget_failures()
    for model in models.DEFAULT:
        console.print(f"model {model}")
        files = run.source(model)
        if not environments.missing(ENGINES):
            for said in environments.export(files):
                console.print(said, markup=False, soft_wrap=True)


@app.command("run")
def run_(
    quick: Annotated[
        bool, typer.Option(help="MiniLM on W1 to W4, then BERT-base on W1 in fp32, as far as ten minutes allow")
    ] = False,
    chosen_models: Annotated[str, typer.Option("--models", help="of " + ", ".join(models.DEFAULT))] = "",
    chosen_workloads: Annotated[str, typer.Option("--workloads", help="of W1 to W5, AUDIO, TEXT")] = "",
    dtypes: Annotated[str, typer.Option(help="of fp32, bf16")] = "",
    systems: Annotated[str, typer.Option(help="only these; the results go to .bench/look/")] = "",
    lengths: Annotated[str, typer.Option(help="a workload of your own: 12,40,7")] = "",
    lengths_file: Annotated[
        Path | None, typer.Option(help="the same from a file, separated by spaces or lines")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help=f"0: {ROUNDS}, or {QUICK_ROUNDS} with --quick")] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    minutes: Annotated[float, typer.Option(min=0, help="begin no cell that would not end in this time")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="folder for cpu.json and cpu.md (default: $OUT, benchmarks/results)")
    ] = None,
) -> None:
    """Measure cells and put them in cpu.json; the tables and plots are made of all that are there."""
    try:
        given = workloads.read_lengths(lengths_file.read_text(encoding="utf-8") if lengths_file else lengths)
        there = {**workloads.standard(), "TEXT": run.text_workload()} | ({"OWN": workloads.own(given)} if given else {})
        known = list(models.MODELS)
        wanted = chosen_workloads or ("OWN" if given else "")
        plan = run.Plan(
            models=run.names(
                chosen_models or ",".join(tuple(run.QUICK) if quick else models.DEFAULT), known, "--models"
            ),
            workloads=tuple(there[name] for name in run.names(wanted, list(there), "--workloads")),
            dtypes=run.names(dtypes, run.DTYPES, "--dtypes"),
            systems=run.names(systems, list(SYSTEMS), "--systems"),
            rounds=rounds or (QUICK_ROUNDS if quick else ROUNDS),
            threads=threads,
            quick=quick and not given,
            seconds=60 * (minutes or (QUICK_MINUTES if quick else math.inf)),
        )
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    look = bool(systems)  # a cell without its peers must not take the place of a whole one
    folder = output_folder(out or (environments.CACHE / "look" if look else None))
    images = IMAGES if folder.resolve() == RESULTS else folder
    for cell in run.measure(plan, console):
        results.merge(folder, cell)
        show(cell)
    written = run.write(folder, images)
    cells = results.read(folder)
    for bar in bars.bars(cells):
        if bar.met is not None:
            console.print("  ".join(bar.line()), markup=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    wrong = [name for name, cell in cells.items() if "wrong" in cell["systems"].get("fastencoder", {})]
    if wrong:
        console.print(f"fastencoder's answers are wrong: {', '.join(wrong)}", style="red", markup=False)
        raise typer.Exit(1)


def show(cell: results.Cell) -> None:
    """A cell on the terminal."""
    table = Table("system", "ms", "ours over it", title=results.key(cell["model"], cell["workload"], cell["dtype"]))
    times = results.timed(cell)
    for name, result in cell["systems"].items():
        spread = results.Spread.of(times[name]) if name in times else None
        lead = results.lead(cell, name)
        table.add_row(
            name,
            f"{1000 * spread.median:,.2f}" if spread else results.said(result),
            f"{lead.median:.2f}" if lead else "",
        )
    console.print(table)


@app.command("scaling")
def scaling_(
    dtypes: Annotated[str, typer.Option(help="of fp32, bf16")] = "",
    sweeps: Annotated[str, typer.Option(help="of " + ", ".join(scaling.SWEEPS))] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    longest: Annotated[int, typer.Option(help="tokens of the longest sequence")] = 8192,
    out: Annotated[Path | None, typer.Option(help="folder for cpu_scaling.json and .md")] = None,
) -> None:
    """Time and memory against padding, batch size, sequence length and threads, for stock sdpa and fastencoder."""
    folder = output_folder(out)
    images = IMAGES if folder.resolve() == RESULTS else folder
    try:
        chosen = run.names(sweeps, scaling.SWEEPS, "--sweeps"), run.names(dtypes, run.DTYPES, "--dtypes")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for written in scaling.measure(*chosen, rounds, threads, longest, folder, images, console):
        console.print(f"written: {written}", markup=False, soft_wrap=True)


@app.command("encode")
def encode_(
    texts: Annotated[int, typer.Option(min=32, help="how many different paragraphs")] = 2000,
    dtypes: Annotated[str, typer.Option(help="of fp32, bf16")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="folder for encode.json and encode.md")] = None,
) -> None:
    """Time SentenceTransformer.encode of real paragraphs, for fastencoder and for sentence-transformers' own backends."""
    folder = output_folder(out)
    try:
        chosen = run.names(dtypes, run.DTYPES, "--dtypes")
        encode.texts(texts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with run.shown(console) as report:
        for dtype in chosen:
            meter = run.Meter(report, f"encode {dtype}", rounds)
            source = run.source("minilm")
            measured = encode.measure(source, dtype, texts, rounds, threads, meter.say, meter.tick)
            found = encode.merge(folder, dtype, measured | {"environment": run.place(threads), "rounds": rounds})
    for bar in encode.bars(found):
        console.print("  ".join(bar.line()), markup=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, encode.write(folder, found)))}", markup=False, soft_wrap=True)


@app.command()
def report(out: Annotated[Path | None, typer.Option(help="the folder with cpu.json")] = None) -> None:
    """Make the tables and plots anew from what was measured."""
    folder = output_folder(out)
    images = IMAGES if folder.resolve() == RESULTS else folder
    for written in (*scaling.write(folder, images), *run.write(folder, images)):
        console.print(f"written: {written}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
