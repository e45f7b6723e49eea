"""The `fastencoder` command: one file for each of its commands, `main` for the console script.

torch and transformers are imported inside the commands, so that `--help` and a mistyped option answer at once.
Nothing is ever downloaded, only safetensors files are read, and a model's own code is never run.

Exit status: 0 done; 1 the answer is no (`explain`: the model would be refused; `verify`: an error is above its bound; `bench`
and `demo`: the answers differ); 2 the question was wrong (an unknown model, a bad option).
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .bench import bench
from .common import WIDTH
from .compile import compile_
from .demo import demo
from .explain import explain
from .listing import models
from .loading import ModelNotFound, load_model
from .scaffold import scaffold
from .verify import verify

__all__ = ["WIDTH", "ModelNotFound", "app", "load_model", "main"]

app = typer.Typer(
    name="fastencoder",
    help="Hugging Face encoder models on packed tokens and fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (explain, verify, bench, models, scaffold, demo):
    app.command()(command)
app.command("compile")(compile_)


def _show_version(wanted: bool) -> None:
    if wanted:
        from fastencoder import __version__

        typer.echo(f"fastencoder {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported


def main() -> None:
    """Entry point of the console script."""
    app()
