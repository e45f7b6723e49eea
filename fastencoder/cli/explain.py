"""`fastencoder explain MODEL`."""

from __future__ import annotations

import json
from typing import Any, cast

import typer

from .common import AsJson, ComputeDtype, Memory, ModelArgument, console, dtype_or_fail, fail, known_or_fail
from .loading import ModelNotFound, load_model


def explain(
    model: ModelArgument, as_json: AsJson = False, compute_dtype: ComputeDtype = None, memory: Memory = "default"
) -> None:
    """Show what to_fast() would do with a model, layer by layer, and why.

    Exit status: 0 the model would be made fast, 1 it would be refused, 2 MODEL was not found.
    """
    known_or_fail("--memory", memory, ("default", "lean"))
    dtype = dtype_or_fail("--compute-dtype", compute_dtype)
    try:
        net, notes = load_model(model)
    except ModelNotFound as error:
        fail(str(error))
    import fastencoder

    report = fastencoder.explain(net, compute_dtype=dtype, memory=cast(Any, memory))
    if as_json:
        described = {"model": model, "model_class": type(net).__name__, "notes": notes, **report.to_dict()}
        typer.echo(json.dumps(described, indent=2))
    else:
        out = console()
        table = report.table()
        table.width = min(out.width, table.width or out.width)
        out.print(table)
        if not report.eligible:
            out.print("to_fast() would refuse this model.", style="red")
        for note in notes:
            out.print(f"note: {note}", highlight=False, markup=False)
    if not report.eligible:
        raise typer.Exit(1)
