"""What is written next to `gpu.json`: `gpu.md` and two plots. Nothing is computed here but the form; torch is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.files import markdown_table

INK, GRID = "#24292f", "#e4e7eb"
COLOURS = {
    "stock sdpa": "#8a8f98",
    "torch.compile dynamic": "#d9a441",
    "torch.compile reduce-overhead": "#b5603a",
    "fastencoder": "#0b6e99",
}


def failures(data: dict[str, Any]) -> list[str]:
    """All rows that did not pass, and all parts that are not finished, in words."""
    lines = []
    for name, part in data["parts"].items():
        for row, found in part["rows"].items():
            if not found["passed"]:
                lines.append(f"{name} {row}: {found.get('why') or 'it did not end'}")
        if not part["finished"]:
            lines.append(f"{name}: not finished; run it again to go on")
    return lines


def markdown(data: dict[str, Any]) -> str:
    """The whole report."""
    where = data["environment"]
    keys = ("driver", "cuda", "cudnn", "capability", "torch", "triton", "transformers", "python", "threads")
    versions = ", ".join(f"{key} {where[key]}" for key in keys if where.get(key) is not None)
    commit = where["git_commit"] or "no git"
    if where.get("git_changed_files"):
        commit += f" with {where['git_changed_files']} changed files"
    blocks = [
        f"# {where['device']}",
        f"{versions}; {where['date']}; {commit}, sources {where['source_digest']}."
        + (" **A dry run with tiny models: the numbers mean nothing.**" if data["quick"] else ""),
    ]
    wrong = failures(data)
    blocks.append("Everything passed." if not wrong else "Failed:\n\n" + "\n".join(f"- {line}" for line in wrong))
    parts = data["parts"]
    for name, write in (("kernels", _kernels), ("parity", _parity), ("speed", _speed)):
        if name in parts:
            blocks += [f"## {name.capitalize()} ({parts[name]['seconds']:.0f} s)", *write(parts[name]["rows"])]
    return "\n\n".join(blocks) + "\n"


def _kernels(rows: dict[str, Any]) -> list[str]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, found in rows.items():
        groups.setdefault(" ".join(name.split()[:2]), []).append(found)
    lines = []
    for group, members in groups.items():
        ways = [found[way] for found in members for way in ("api", "kernel") if way in found]
        lines.append(
            [
                group,
                f"{sum(found['passed'] for found in members)} of {len(members)}",
                f"{max((way.get('error', 0.0) for way in ways), default=0.0):.1e}",
                f"{max((way.get('ratio', 0.0) for way in ways), default=0.0):.2f}",
                f"{max((way.get('bound_used', 0.0) for way in ways), default=0.0):.2f}",
                f"{sum(bool(found.get('api', {}).get('launched')) for found in members)} of {len(members)}",
            ]
        )
    return [
        "Errors against float64, and as a multiple of torch's own in the same dtype; 'bound used' above 1 fails.",
        markdown_table(["", "passed", "largest error", "largest ratio to torch", "bound used", "ran in Triton"], lines),
    ]


def _parity(rows: dict[str, Any]) -> list[str]:
    lines = [
        [
            name,
            f"{found['stock_error']:.1e}" if "stock_error" in found else "",
            f"{found['fast_error']:.1e}" if "fast_error" in found else "",
            f"{found['bar']:.1e}" if "bar" in found else "",
            f"{found['fast_calls']}/{found['delegated_calls']}" if "fast_calls" in found else "",
            "yes" if found["passed"] else "NO",
        ]
        for name, found in rows.items()
    ]
    return [
        "Relative errors against stock in float64, at real tokens.",
        markdown_table(["", "stock", "fast", "bar", "calls fast/delegated", "passed"], lines),
    ]


def _speed(rows: dict[str, Any]) -> list[str]:
    blocks = []
    limits = rows.get("roofline", {})
    if "matmul_tflops" in limits:
        reached = ", ".join(f"{dtype} {tflops:,.1f} TFLOP/s" for dtype, tflops in limits["matmul_tflops"].items())
        blocks.append(
            f"In the same process: {limits['matmul_size']}³ matrix product {reached}; "
            f"copy {limits['copy_gb_per_s']:,.0f} GB/s, read and written."
        )
    lines = []
    for name, found in rows.items():
        for system, result in found.get("systems", {}).items():
            head = [f"{name}", system]
            if result.get("status") != "timed":
                lines.append([*head, result.get("status", "not timed"), *[""] * 5])
                continue
            ms, ratio, share = result["ms"], result["ratio_to_stock"], result["of_matmul"]
            lines.append(
                [
                    *head,
                    f"{ms['median']:.3f} ({ms['low']:.3f} to {ms['high']:.3f})",
                    f"{result['tokens_per_s']:,.0f}",
                    f"{ratio['median']:.2f}",
                    f"{result['tflops']:.1f}",
                    "" if share is None else f"{share:.0%}",
                    f"{result['error']:.1e}",
                ]
            )
    header = ["", "system", "ms", "real tokens/s", "ratio", "TFLOP/s", "of matmul", "error"]
    explained = (
        "Milliseconds are medians with quartiles over interleaved rounds; the ratio is to stock sdpa in the same round; "
        "TFLOP/s count real tokens only; errors are relative to stock in fp32. A system with wrong answers is not timed."
    )
    return [*blocks, explained, markdown_table(header, lines)]


def plots(data: dict[str, Any], folder: Path) -> list[Path]:
    """`gpu_speedup.png` and `gpu_tokens.png`, as far as anything was timed. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = data["parts"].get("speed", {}).get("rows", {})
    cells = {
        name: {system: result for system, result in found["systems"].items() if result.get("status") == "timed"}
        for name, found in rows.items()
        if found.get("systems")
    }
    cells = {name: timed for name, timed in cells.items() if timed}
    if not cells:
        return []
    written = []
    for stem, title, unit, value, baseline in (
        ("gpu_speedup", "Times as fast as stock sdpa", "", lambda r: r["ratio_to_stock"]["median"], 1.0),
        ("gpu_tokens", "Real tokens per second", "millions", lambda r: r["tokens_per_s"] / 1e6, None),
    ):
        figure = Figure(figsize=(9, 1.6 + 0.48 * len(cells)), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"{title}: {data['environment']['device']}", fontsize=12, color=INK, x=0.01, ha="left")
        axes = figure.subplots()
        systems = [s for s in COLOURS if s != "stock sdpa" or baseline is None]
        height = 0.8 / len(systems)
        for index, system in enumerate(systems):
            there = [(row, timed[system]) for row, timed in enumerate(cells.values()) if system in timed]
            bars = axes.barh(
                [row + (index - (len(systems) - 1) / 2) * height for row, _ in there],
                [value(result) for _, result in there],
                height * 0.92,
                color=COLOURS[system],
                label=system,
            )
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7, color=INK)
        if baseline is not None:
            axes.axvline(baseline, color=COLOURS["stock sdpa"], linewidth=1.2)
        axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(unit, color=INK)
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.margins(x=0.1, y=0.01)
        axes.tick_params(colors=INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        figure.legend(loc="outside lower right", ncols=len(systems), frameon=False, fontsize=8, labelcolor=INK)
        path = folder / f"{stem}.png"
        figure.savefig(path, format="png", facecolor="white")
        written.append(path)
    return written
