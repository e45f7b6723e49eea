"""What the commands share: the console, the one line of an error, progress, and options that several of them have."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import torch

#: Every table is made to fit this many columns; output that goes to a file or a pipe is this wide.
WIDTH = 100

#: Says that one step is done, and what comes next.
Step = Callable[[str], None]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local folder with config.json (and safetensors), or a model type such as bert or vit, "
        "which is built from its default config with no real weights.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bf16, fp16 or fp32: cast the model first.", show_default="the dtype of the weights"),
]
ComputeDtype = Annotated[
    str | None,
    typer.Option(help="bf16, fp16 or fp32: to_fast's compute_dtype.", show_default="the dtype of the weights"),
]
Memory = Annotated[str, typer.Option(help="default or lean: to_fast's memory.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")]


def console(stderr: bool = False) -> Console:
    """A console for standard output: as wide as the terminal, or `WIDTH` columns where there is none."""
    out = Console(stderr=stderr)
    return out if out.is_terminal else Console(stderr=stderr, width=WIDTH)


def fail(message: str) -> NoReturn:
    """Print one line on standard error and leave with status 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def quiet() -> None:
    """No progress bars of transformers in between; its errors still show."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def known_or_fail(option: str, value: str, known: Iterable[str]) -> None:
    """Leave with status 2 if `value` is none of `known`, and say what it may be."""
    known = list(known)
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        fail(f"{option}: '{value}' is none of {', '.join(known)}{hint}")


def dtype_or_fail(option: str, value: str | None) -> torch.dtype | None:
    """The dtype that an option names; None where it was not given."""
    if value is None:
        return None
    known_or_fail(option, value, _DTYPES)
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[value])
    return dtype


def device_or_fail(value: str | None) -> torch.device:
    """The device that `--device` names: by default CUDA where torch sees a device of it."""
    import torch

    kind = value or ("cuda" if torch.cuda.is_available() else "cpu")
    known_or_fail("--device", kind, ("cpu", "cuda"))
    if kind == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device here")
    return torch.device(kind)


@contextlib.contextmanager
def progress(what: str, steps: int, hidden: bool) -> Iterator[Step]:
    """A bar on standard error with what is being done, where that is a terminal; it is gone when all is done."""
    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=hidden or not out.is_terminal) as shown:
        task = shown.add_task(what, total=steps)

        def step(description: str) -> None:
            shown.update(task, advance=1, description=description)

        yield step


def first_line(error: BaseException) -> str:
    """An error in one line: its type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
