"""`fastencoder compile MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import ModelArgument, console, fail, first_line, known_or_fail
from .loading import ModelNotFound, load_model


def compile_(
    model: ModelArgument,
    arch: Annotated[list[str], typer.Option(help="A GPU architecture such as sm_90; may be given several times.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the bundle goes. An earlier bundle is replaced.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or tf32: fp32 in a program that allows TF32.")] = "bf16",
    max_tokens: Annotated[int, typer.Option(min=1, help="Real tokens of the largest batch.")] = 65536,
    max_seqlen: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest sequence.", show_default="what the model can take")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one for each core")] = None,
) -> None:
    """Compile every kernel that a model will ask for, into a folder that a server loads. Needs no GPU.

    Exit status: 0 the bundle is written, 2 MODEL or an option is wrong.
    """
    try:
        from fastencoder.runtime import compile_command as command
        from fastencoder.runtime.bundle import BundleError
        from fastencoder.runtime.dry_run import Bounds
    except ImportError as error:
        fail(f"compiling needs Triton, which exists for Linux on x86-64: {first_line(error)}")
    for name in arch:
        known_or_fail("--arch", name, command.ARCHITECTURES)
    known_or_fail("--dtype", dtype, command.DTYPES)
    try:
        net, _ = load_model(model)
        bounds = Bounds(max_tokens, max_seqlen or command.longest_input(net, max_tokens))
        settings = command.Settings(model, tuple(dict.fromkeys(arch)), dtype, out, bounds, jobs)
        command.run(net, settings, console())
    except (ModelNotFound, BundleError) as error:
        fail(str(error))
