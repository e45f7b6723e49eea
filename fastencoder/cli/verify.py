"""`fastencoder verify MODEL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from .common import (
    AsJson,
    ComputeDtype,
    Device,
    Dtype,
    Memory,
    ModelArgument,
    console,
    device_or_fail,
    dtype_or_fail,
    fail,
    first_line,
    known_or_fail,
    progress,
)
from .loading import ModelNotFound, load_model

if TYPE_CHECKING:
    from ..checks import Verification


def verify(
    model: ModelArgument,
    as_json: AsJson = False,
    report: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also write the report there: FILE.md as Markdown, FILE.json as JSON."),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A safetensors file with one batch, tensors named as the model's arguments.",
            show_default="random batches",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random batches.")] = 0,
    dtype: Dtype = None,
    compute_dtype: ComputeDtype = None,
    memory: Memory = "default",
    device: Device = None,
) -> None:
    """Compare every fast layer and the whole model with stock in float64, on ragged batches, and report the errors.

    A model type, or a folder without safetensors, gets random weights. Layers that are refused stay as they are, and are
    listed.

    Exit status: 0 all errors are within their bounds, 1 one is not or a layer never ran fast, 2 the question was wrong.
    """
    known_or_fail("--memory", memory, ("default", "lean"))
    wanted, computing = dtype_or_fail("--dtype", dtype), dtype_or_fail("--compute-dtype", compute_dtype)
    place = device_or_fail(device)
    if report is not None:
        known_or_fail("--report ends in", report.suffix, (".md", ".json"))
        if not report.resolve().parent.is_dir():
            fail(f"--report: there is no folder '{report.resolve().parent}'")
    try:
        net, notes = load_model(model, to_run=True)
    except ModelNotFound as error:
        fail(str(error))
    from ..checks import CannotMakeInputs, from_file, ragged
    from ..checks import verify as run
    from ..checks.verify import SIDES

    net = net.to(place, wanted)
    try:
        batches = ragged(net, seed) if inputs is None else from_file(inputs)
    except CannotMakeInputs as error:
        fail(str(error))
    with progress("verify", len(batches) * len(SIDES), hidden=as_json) as step:
        try:
            found = run(net, batches, compute_dtype=computing, memory=cast(Any, memory), step=step)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            if inputs is None:
                raise
            fail(f"the model does not run on '{inputs}': {first_line(error)}")
    found.about["model"] = f"{model} ({found.about['model']}{''.join(f'; {note}' for note in notes)})"
    if report is not None:
        said = found.to_markdown() if report.suffix == ".md" else json.dumps(found.to_dict(), indent=2) + "\n"
        report.write_text(said, encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found, report)
    if not found.passed:
        raise typer.Exit(1)


def _print(found: Verification, report: Path | None) -> None:
    from ..checks.verification import calls, numbers

    out = console()
    for name, text in found.about.items():
        out.print(f"{name}: {text}", highlight=False, markup=False)
    out.print(f"batches: {'; '.join(found.batches)}", highlight=False, markup=False)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for heading in ("fast", "in", "calls fast"):
        table.add_column(heading, no_wrap=True)
    for heading in ("error", "stock's own", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for rows in (found.outputs, found.layers):
        for row in rows:
            *figures, verdict = numbers(row)
            colour = "green" if verdict == "ok" else "bold red"
            table.add_row(
                row.name,
                row.level or "-",
                row.dtype,
                calls(row) if row.level else "-",
                *figures,
                f"[{colour}]{verdict}[/]",
            )
        table.add_section()
    out.print(table)
    reasons = dict.fromkeys(row.reason for row in found.layers if row.reason)
    for reason in reasons:
        names = [row.name for row in found.layers if row.reason == reason]
        out.print(f"ran the original code at times: {_some(names)}: {reason}", highlight=False, markup=False)
    for status, why in dict.fromkeys((row.status, row.reason) for row in found.left):
        names = [row.name for row in found.left if (row.status, row.reason) == (status, why)]
        out.print(f"{status}: {_some(names)}: {why}", highlight=False, markup=False)
    out.print(found.verdict, style="green" if found.passed else "bold red", highlight=False, markup=False)
    if report is not None:
        out.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
