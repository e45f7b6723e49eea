"""The body of `fastencoder compile`: a bundle for one model, made on a machine that needs no GPU."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..kernels import stand_in
from ..kernels._triton import DeviceLimits, Launch
from .bundle import BundleError, check_replaceable, write_bundle
from .compiling import compile_tasks, progress
from .dry_run import Bounds, every_launch

# What `make kernels` examines, with the multiprocessors of the GPUs of that kind, which some tile sizes depend on.
ARCHITECTURES: dict[str, tuple[DeviceLimits, ...]] = {
    "sm_80": (DeviceLimits((8, 0), 108), DeviceLimits((8, 0), 56)),  # A100, A30
    "sm_86": (DeviceLimits((8, 6), 84), DeviceLimits((8, 6), 72)),  # A40, A10
    "sm_89": (DeviceLimits((8, 9), 142), DeviceLimits((8, 9), 58)),  # L40S, L4
    "sm_90": (DeviceLimits((9, 0), 132), DeviceLimits((9, 0), 114), DeviceLimits((9, 0), 78)),  # H100 SXM, H100 PCIe, H20
    "sm_100": (DeviceLimits((10, 0), 148),),  # B200
    "sm_120": (DeviceLimits((12, 0), 188), DeviceLimits((12, 0), 170)),  # RTX PRO 6000, RTX 5090
}
# float32 is named for what the program allows its matrix products to be.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """What to compile for.

    Attributes:
        model: what the user called the model.
        architectures: keys of `ARCHITECTURES`.
        dtype: a key of `DTYPES`; "tf32" is float32 in a program that allows TF32.
        out: the folder of the bundle.
        bounds: the largest batch.
        jobs: processes; None: one for each core.
    """

    model: str
    architectures: Sequence[str]
    dtype: str
    out: Path
    bounds: Bounds
    jobs: int | None = None


def run(model: nn.Module, settings: Settings, console: Console) -> None:
    """Compiles, writes the bundle, and prints what is in it.

    Raises:
        BundleError: the folder is in use for something else, or the model has nothing to compile.
        RuntimeError: a kernel does not compile.
    """
    check_replaceable(settings.out)
    start = time.monotonic()
    wanted = requested(model, settings, console)
    tasks = [(launch, ARCHITECTURES[name][0]) for name, launches in wanted.items() for launch in launches]
    names = [name for name, launches in wanted.items() for _ in launches]
    groups: dict[str, list[dict[str, str]]] = {name: [] for name in wanted}
    with progress() as bar:
        step = bar.add_task("compiling", total=len(tasks))
        for position, result in compile_tasks(tasks, _files, settings.jobs):
            if isinstance(result, Exception):
                kernel = tasks[position][0].kernel.__name__
                raise RuntimeError(f"{kernel} does not compile for {names[position]}: {result}")
            groups[names[position]].append(result)
            bar.advance(step)
    about = {
        "model": settings.model,
        "dtype": settings.dtype,
        "max_tokens": settings.bounds.max_tokens,
        "max_seqlen": settings.bounds.max_seqlen,
        "multiprocessors": {name: [limits.multiprocessors for limits in ARCHITECTURES[name]] for name in wanted},
    }
    write_bundle(settings.out, groups, about)
    console.print(_table(wanted, settings.out))
    console.print(
        f"{len(tasks)} kernels in {time.monotonic() - start:.0f} s. A server uses them with "
        f"FASTENCODER_BUNDLE={settings.out}",
        highlight=False,
        soft_wrap=True,
    )


def longest_input(model: nn.Module, most: int) -> int:
    """Tokens of the longest sequence that a model can take: as many as it has positions, or 4096 where it does not say."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(positions if isinstance(positions, int) and positions > 0 else 4096, most)


def requested(model: nn.Module, settings: Settings, console: Console) -> dict[str, list[Launch]]:
    """For each architecture what the model asks for, one launch for each entry of Triton's cache.

    Raises:
        BundleError: nothing in the model can be fast.
    """
    model = model.to(DTYPES[settings.dtype])
    wanted = {}
    with _tf32(settings.dtype == "tf32"), console.status("dry run"):
        for name in settings.architectures:
            found = {}
            for limits in ARCHITECTURES[name]:
                try:
                    launches = every_launch(model, limits, settings.bounds)
                except ValueError as error:
                    raise BundleError(str(error)) from error
                with stand_in.standing_in(limits.capability):
                    found.update({stand_in.cache_key(launch): launch for launch in launches})
            wanted[name] = list(found.values())
    return wanted


def _files(compiled: Any, launch: Launch, limits: DeviceLimits) -> dict[str, str]:
    return dict(compiled.metadata_group)


def _table(wanted: Mapping[str, Sequence[Launch]], folder: Path) -> Table:
    table = Table(title=f"bundle {folder}", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("operation")
    for name in wanted:
        table.add_column(name, justify="right")
    counts = {name: Counter(_operation(launch) for launch in launches) for name, launches in wanted.items()}
    for operation in sorted({operation for found in counts.values() for operation in found}):
        table.add_row(operation, *(str(found[operation]) for found in counts.values()))
    return table


def _operation(launch: Launch) -> str:
    """The package of the kernel: fastencoder.kernels.<operation>.<module>."""
    return launch.kernel.fn.__module__.split(".")[-2]


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Inside the block float32 products may use TF32, or may not, as if the user had set it."""
    matmul = torch.backends.cuda.matmul
    previous, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = previous
