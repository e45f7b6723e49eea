"""Plots of the CPU benchmark, as PNG. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.clocks import Spread
from benchmarks.cpu import results
from benchmarks.cpu.systems import FAST, SYSTEMS
from benchmarks.gpu_report_plots import GRID, INK

OURS_COLOUR, STOCK_COLOUR, ENGINE_COLOUR = "#0b6e99", "#8a8f98", "#d9a441"
SHOWN = ("minilm", "bert-base")
DTYPES = ("fp32", "bf16")


def bars(cells: dict[str, results.Cell], folder: Path) -> list[Path]:
    """`cpu_<model>.png` for each of the models of the bars: time of every system, a panel for each workload and dtype."""
    written = []
    for model in SHOWN:
        chosen = {name: cell for name, cell in cells.items() if cell["model"] == model and results.timed(cell)}
        if chosen:
            written.append(_model(model, chosen, folder / f"cpu_{model}.png"))
    return written


def _model(model: str, cells: dict[str, results.Cell], path: Path) -> Path:
    workloads = list(dict.fromkeys(cell["workload"] for cell in cells.values()))
    dtypes = [dtype for dtype in DTYPES if any(cell["dtype"] == dtype for cell in cells.values())]
    count = max(len(results.timed(cell)) for cell in cells.values())
    figure = _figure(
        (6.2 * len(dtypes), 0.9 + (0.55 + 0.19 * count) * len(workloads)), f"{model}: milliseconds a batch"
    )
    panels = figure.subplots(len(workloads), len(dtypes), squeeze=False)
    for row, workload in enumerate(workloads):
        for column, dtype in enumerate(dtypes):
            axes, cell = panels[row][column], cells.get(results.key(model, workload, dtype))
            if cell is None:
                axes.set_axis_off()
            else:
                _cell(axes, cell)
    figure.savefig(path, format="png", facecolor="white")
    return path


def _cell(axes: Any, cell: results.Cell) -> None:
    times = results.timed(cell)
    order = sorted(times, key=lambda name: statistics.median(times[name]))
    spreads = [Spread.of([1000 * x for x in times[name]]) for name in order]
    medians = [spread.median for spread in spreads]
    reach = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    drawn = axes.barh(order, medians, 0.78, color=[_colour(name) for name in order], xerr=reach, ecolor=INK)
    axes.bar_label(drawn, [f"{x:,.1f}" if x < 100 else f"{x:,.0f}" for x in medians], padding=4, fontsize=7, color=INK)
    work = cell["work"]
    title = f"{cell['workload']} {cell['dtype']}: {work['title']} ({work['padding_share']:.0%} padding)"
    axes.set_title(title, fontsize=8, color=INK, loc="left")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(spread.high for spread in spreads))
    _plain(axes, "x")


def _colour(name: str) -> str:
    if name.startswith(FAST):
        return OURS_COLOUR
    return ENGINE_COLOUR if name in SYSTEMS and SYSTEMS[name].engine else STOCK_COLOUR


Curve = list[tuple[float, float]]


def curves(panels: dict[str, tuple[str, str, bool, dict[str, Curve]]], title: str, path: Path) -> Path:
    """Line plots side by side. `panels`: title -> (x label, y label, logarithmic, name -> points)."""
    columns = 2
    rows = -(-len(panels) // columns)
    figure = _figure((6.2 * columns, 0.6 + 3.2 * rows), title)
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, (x_label, y_label, logarithmic, lines)) in zip(all_axes, panels.items(), strict=False):
        for index, (label, points) in enumerate(lines.items()):
            colour = OURS_COLOUR if FAST in label else STOCK_COLOUR
            style = "--" if "bf16" in label else "-"
            axes.plot(
                *zip(*points, strict=True), style, marker="o", markersize=3, color=colour, label=label, zorder=2 + index
            )
        axes.set_title(name, fontsize=9, color=INK, loc="left")
        axes.set_xlabel(x_label, color=INK, fontsize=8)
        axes.set_ylabel(y_label, color=INK, fontsize=8)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)
        _plain(axes, "both")
    for axes in all_axes:  # what zip has left over
        axes.set_axis_off()
    figure.savefig(path, format="png", facecolor="white")
    return path


def _figure(size: tuple[float, float], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=7)
    hidden: Iterable[str] = ("top", "right")
    axes.spines[list(hidden)].set_visible(False)
