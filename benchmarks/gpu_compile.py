"""Part "compile": the cells of the grid on which torch.compile is measured, as many as the time allows."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu_grid import compiled_grid
from benchmarks.gpu_speed import Bench, measure
from benchmarks.store import Row


def rows(device: torch.device, quick: bool, deadline: float) -> list[Row]:
    """Named by the cell and the mode."""
    bench = Bench(device, quick, deadline)
    return [Row(f"{cell.name} {cell.systems[-1]}", partial(measure, bench, cell)) for cell in compiled_grid(quick)]
