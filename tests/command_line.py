"""The command line in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from fastencoder.cli import app


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))
