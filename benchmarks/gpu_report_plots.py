"""The plots beside `gpu.json`: tokens per second, and how many times as fast as stock sdpa. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

INK, GRID = "#24292f", "#e4e7eb"
COLOURS = {
    "stock eager": "#c9ccd1",
    "stock sdpa": "#8a8f98",
    "flash attention 2": "#5a6270",
    "nn.TransformerEncoder": "#7a9e6f",
    "torch.compile dynamic": "#d9a441",
    "torch.compile reduce-overhead": "#b5603a",
    "torch.compile max-autotune": "#8c3b2a",
    "fastencoder": "#0b6e99",
    "fastencoder, CUDA graphs": "#4fb3d9",
}
BASELINE = "stock sdpa"
MOST_MODELS = 2  # side by side, the first ones of the grid; the others are in the tables

Value = Callable[[dict[str, Any]], float]


def plots(data: dict[str, Any], folder: Path) -> list[Path]:
    """`gpu_speedup.png` and `gpu_tokens.png`, as far as anything was timed."""
    cells = timed_cells(data["parts"])
    if not cells:
        return []
    where = data["environment"]["device"]
    speedup: Value = lambda result: result["ratio_to_stock"]["median"]  # noqa: E731
    tokens: Value = lambda result: result["tokens_per_s"] / 1e6  # noqa: E731
    return [
        _bars(cells, f"Times as fast as stock sdpa: {where}", "", speedup, folder / "gpu_speedup.png", True),
        _bars(cells, f"Real tokens per second: {where}", "millions", tokens, folder / "gpu_tokens.png", False),
    ]


def timed_cells(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cell -> system -> result, of both parts that time cells: a compiled mode joins the cell that it was timed on."""
    cells: dict[str, dict[str, Any]] = {}
    for part in ("speed", "compile"):
        for name, found in parts.get(part, {}).get("rows", {}).items():
            for system, result in found.get("systems", {}).items():
                if result.get("status") == "timed":
                    cells.setdefault(name.partition(" torch.compile")[0], {}).setdefault(system, result)
    return cells


def _bars(
    cells: dict[str, dict[str, Any]], title: str, unit: str, value: Value, path: Path, against_baseline: bool
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(name.split()[0] for name in cells))[:MOST_MODELS]
    columns = [{name: timed for name, timed in cells.items() if name.split()[0] == model} for model in models]
    present = {system for column in columns for timed in column.values() for system in timed}
    systems = [system for system in COLOURS if system in present and not (against_baseline and system == BASELINE)]
    rows = max(map(len, columns))
    figure = Figure(figsize=(8 * len(columns), 1.6 + (0.11 * len(systems) + 0.1) * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        _column(axes, column, systems, value, against_baseline)
        axes.set_xlabel(unit, color=INK)
    handles = {label: bar for axes in figure.axes for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside lower right", ncols=3, frameon=False, fontsize=8, labelcolor=INK
    )
    figure.savefig(path, format="png", facecolor="white")
    return path


def _column(axes: Any, cells: dict[str, dict[str, Any]], systems: list[str], value: Value, baseline: bool) -> None:
    """The cells of one model."""
    height = 0.85 / max(len(systems), 1)
    for index, system in enumerate(systems):
        there = [(row, timed[system]) for row, timed in enumerate(cells.values()) if system in timed]
        if not there:
            continue
        places = [row + (index - (len(systems) - 1) / 2) * height for row, _ in there]
        values = [value(result) for _, result in there]
        bars = axes.barh(places, values, height * 0.92, color=COLOURS[system], label=system)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=6, color=INK)
    if baseline:
        axes.axvline(1.0, color=COLOURS[BASELINE], linewidth=1.2)
    axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.margins(x=0.1, y=0.01)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
