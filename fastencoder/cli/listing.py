"""`fastencoder models`."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.table import Table

from .common import AsJson, console


def models(as_json: AsJson = False) -> None:
    """List the layer classes that can be made fast, with the model types they belong to."""
    rows = supported()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(title="What can be made fast", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("family", max_width=20)
    table.add_column("model type", overflow="fold")
    table.add_column("layer class", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row["family"] != previous:
            table.add_section()
        table.add_row(
            row["family"] if row["family"] != previous else "",
            ", ".join(row["model_types"]),
            row["layer_class"].rsplit(".", 1)[-1],
        )
        previous = row["family"]
    out = console()
    out.print(table)
    out.print(f"{len(rows)} layer classes. fastencoder explain MODEL checks one model.", highlight=False)


def supported() -> list[dict[str, Any]]:
    """One dictionary for every registered layer class: family, model types, qualified class name; in printing order."""
    from fastencoder import registry

    rows: list[dict[str, Any]] = [
        {
            "family": str(entry.adapter.family),
            "norm_placement": entry.adapter.norm_placement,
            "model_types": sorted(entry.model_types),
            "layer_class": entry.layer_class,
        }
        for entry in registry.entries()
        if not entry.adapter.decoder  # known, and known to be left alone
    ]
    return sorted(rows, key=lambda row: (row["family"], row["model_types"], row["layer_class"]))
