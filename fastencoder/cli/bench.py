"""`fastencoder bench MODEL`."""

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
    from ..checks import Batch, Timing

_TOKENIZER_FILES = ("tokenizer.json", "vocab*", "merges.txt", "*.model")


def bench(
    model: ModelArgument,
    texts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Your own texts, one a line; MODEL is a folder with its tokenizer."
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths of texts in tokens instead: 12,40,7.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="So many images instead, for a model that takes them.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images in a batch.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens at which a text is cut.", show_default="what the tokenizer says")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed passes of each side.", show_default="5 to 30, by time")
    ] = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    compute_dtype: ComputeDtype = None,
    memory: Memory = "default",
    device: Device = None,
) -> None:
    """Time a model before and after to_fast() on your own texts or lengths, both in turn, answers compared first.

    Texts keep their order, so sort the file by length to see what sorting leaves to gain.

    Exit status: 0 measured, 1 the answers differ or the model is refused, 2 the question was wrong.
    """
    if sum(given is not None for given in (texts, lengths, images)) != 1:
        fail("give one of --texts FILE, --lengths 12,40,7 and --images N")
    counted = None if lengths is None else _numbers(lengths)
    known_or_fail("--memory", memory, ("default", "lean"))
    wanted, computing = dtype_or_fail("--dtype", dtype), dtype_or_fail("--compute-dtype", compute_dtype)
    place = device_or_fail(device)
    try:
        net, notes = load_model(model, to_run=True)
    except ModelNotFound as error:
        fail(str(error))
    from .. import NotEligibleError
    from ..checks import CannotMakeInputs
    from ..checks import bench as run
    from ..checks.bench import AnswersDiffer

    net = net.to(place, wanted)
    try:
        batches = _batches(model, net, texts, counted, images, batch_size, max_length)
    except CannotMakeInputs as error:
        fail(str(error))
    try:
        with progress("bench", (rounds or 30) + 2, hidden=as_json) as step:
            timing = run(net, batches, rounds=rounds, compute_dtype=computing, memory=cast(Any, memory), step=step)
    except AnswersDiffer as error:
        typer.echo(f"the answers differ, so nothing was timed: {error}. This is a defect: please report it.", err=True)
        raise typer.Exit(1) from None
    except NotEligibleError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    about = _about(model, net, notes, computing, memory)
    if as_json:
        typer.echo(json.dumps({"model": model, **about, **_as_dict(timing)}, indent=2))
    else:
        _print(about, timing, batch_size)


def _numbers(lengths: str) -> list[int]:
    try:
        numbers = [int(part) for part in lengths.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        fail(f"--lengths: '{lengths}' is not a list of lengths in tokens such as 12,40,7")
    return numbers


def _batches(
    model: str, net: Any, texts: Path | None, lengths: list[int] | None, images: int | None, size: int, cut: int | None
) -> list[Batch]:
    from ..checks.inputs import of_images, of_lengths, of_texts

    if lengths is not None:
        return of_lengths(net, lengths, size)
    if images is not None:
        return of_images(net, images, size)
    assert texts is not None
    try:
        lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        fail(f"--texts: '{texts}' is not UTF-8: {first_line(error)}")
    lines = [line for line in lines if line]
    if not lines:
        fail(f"--texts: there is no text in '{texts}'")
    tokenizer = _tokenizer(model)
    positions = getattr(net.config, "max_position_embeddings", None) or 512
    return of_texts(tokenizer, lines, size, cut or min(tokenizer.model_max_length, positions))


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(model).expanduser()
    if not folder.is_dir():
        fail(f"--texts needs a tokenizer, and '{model}' is no folder; give --lengths instead")
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):  # an empty one would be made
        fail(f"--texts: there is no tokenizer in '{model}'; give --lengths instead")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        fail(f"--texts: there is no usable tokenizer in '{model}': {first_line(error)}")
    if tokenizer.pad_token is None:
        fail(f"--texts: the tokenizer of '{model}' has no padding token, so it makes no batches; give --lengths instead")
    return tokenizer


def _about(model: str, net: Any, notes: list[str], computing: Any, memory: str) -> dict[str, Any]:
    from ..checks.machine import machine, versions

    return {
        "model_class": type(net).__name__,
        "notes": notes,
        "dtype": str(net.dtype).removeprefix("torch."),
        "compute_dtype": None if computing is None else str(computing).removeprefix("torch."),
        "memory": memory,
        "stock_attention": str(getattr(net.config, "_attn_implementation", "?")),
        "machine": machine(net.device),
        "versions": versions(),
    }


def _as_dict(timing: Timing) -> dict[str, Any]:
    return {
        "tokens": timing.tokens,
        "padding": 1 - timing.tokens / timing.positions,
        "rows": timing.rows,
        "batches": timing.batches,
        "batches_checked": timing.checked,
        "errors": {name: {"error": error, "bound": limit} for name, (error, limit) in timing.errors.items()},
        "stock_seconds": list(timing.stock),
        "fast_seconds": list(timing.fast),
        "ratio": timing.ratio,
    }


def _print(about: dict[str, Any], timing: Timing, batch_size: int) -> None:
    from ..checks.bench import Quartiles

    out = console()

    def line(text: str, style: str | None = None) -> None:
        out.print(text, style=style, highlight=False, markup=False)

    line(f"{about['model_class']} in {about['dtype']}, stock attention {about['stock_attention']}")
    for note in about["notes"]:
        line(f"note: {note}")
    line(f"on {about['machine']}; {', '.join(f'{name} {version}' for name, version in about['versions'].items())}")
    padding = 1 - timing.tokens / timing.positions
    batches = f"{timing.batches} batch{'es' if timing.batches > 1 else ''}"
    rows = f"{timing.rows:,} rows in {batches} of up to {batch_size}"
    line(f"{rows}: {timing.tokens:,} real tokens, {padding:.0%} padding")
    worst = max(timing.errors.items(), key=lambda item: item[1][0] / item[1][1])
    name, (error, limit) = worst
    line(
        f"answers equal on {timing.checked} of {batches}: {name} {error:.1e}, bound {limit:.1e}", "green"
    )
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for heading in ("median, ms", "quartiles, ms", "real tokens/s"):
        table.add_column(heading, justify="right")
    for side, seconds in (("stock", timing.stock), ("fast", timing.fast)):
        of = Quartiles.of(seconds)
        quartiles = f"{of.low * 1e3:,.1f} to {of.high * 1e3:,.1f}"
        table.add_row(side, f"{of.median * 1e3:,.1f}", quartiles, f"{timing.tokens / of.median:,.0f}")
    out.print(table)
    by_round = Quartiles.of(timing.ratios)
    line(
        f"ratio {timing.ratio:.2f}x (quartiles by round {by_round.low:.2f} to {by_round.high:.2f}, {len(timing.fast)} rounds)"
    )
