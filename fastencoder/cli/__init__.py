"""The `fastencoder` command: one file for each of its commands, `main` for the console script.

torch and transformers are imported inside the commands, so that `--help` and a mistyped option answer at once.
Nothing is ever downloaded, only safetensors files are read, and a model's own code is never run.

Exit status: 0 done; 1 the answer is no (`explain`: the model would be refused; `verify`: an error is above its bound; `bench`
and `demo`: the answers differ); 2 the question was wrong (an unknown model, a bad option).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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

#: What typer raises for a wrong command line: of whichever click it brings.
_UsageError: Any = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """Says what is wrong with a command line in one line, and shows the help where there is nothing at all."""

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **named: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        named["standalone_mode"] = False
        try:
            status = super().main(args, *more, **named)
        except _UsageError as error:
            if not standalone_mode:
                raise
            typer.echo(f"error: {' '.join(error.format_message().split())}", err=True)
            status = 2
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    name="fastencoder",
    cls=OneLineErrors,
    help="Hugging Face encoder models on packed tokens and fused kernels.",
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
