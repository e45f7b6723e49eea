"""The demo's picture: real tokens a second over the share of padding, one panel for every dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STOCK, FAST, INK, GRID = "#8a8f98", "#0b6e99", "#24292f", "#e4e7eb"


@dataclass(frozen=True)
class Point:
    """One batch: its share of padding (0 to 1), and both sides' real tokens a second."""

    padding_share: float
    stock: float
    fast: float


def save(path: Path, curves: dict[str, list[Point]], title: str) -> None:
    """Write a PNG with one panel for each dtype of ``curves``; both axes of every panel begin at 0."""
    # Not pyplot: it would choose a window system, and keep state that belongs to the caller's program.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves) + 0.8, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Throughput against padding: {title}", fontsize=12, color=INK, x=0.01, ha="left")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (dtype, points) in zip(panels, curves.items(), strict=True):
        share = [100 * point.padding_share for point in points]
        for label, colour, values in (
            ("fastencoder", FAST, [point.fast / 1000 for point in points]),
            ("stock", STOCK, [point.stock / 1000 for point in points]),
        ):
            axes.plot(share, values, color=colour, label=label, linewidth=2.2, marker="o", markersize=5, clip_on=False)
        for x, point in zip(share, points, strict=True):
            axes.annotate(
                f"{point.fast / point.stock:.1f}x",
                (x, max(point.fast, point.stock) / 1000),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=FAST,
            )
        axes.set_title(dtype, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("padding in the batch, % of positions", color=INK)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 1.15 * max(max(point.fast, point.stock) for point in points) / 1000)
        axes.set_ylabel("real tokens per second, thousands", color=INK)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, labelcolor=INK)
    figure.savefig(path, format="png", facecolor="white")
