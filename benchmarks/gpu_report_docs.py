"""The generated sections of `docs/benchmarks.md`: `python benchmarks/gpu_report_docs.py` writes them, `--check` compares.

They are made of what lies in `benchmarks/results/` and of nothing else, so that a test can tell whether the page is out of
date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_report_bars
from benchmarks.cpu import results as cpu_results
from benchmarks.cpu import tables as cpu_tables
from benchmarks.files import RESULTS, markdown_table, read_json, write_text
from benchmarks.gpu_report import failures, left_out, where
from benchmarks.gpu_report_plots import timed_cells
from benchmarks.gpu_report_tables import TABLES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
NOT_YET = "Not measured yet."
_SECTION = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)


def sections(results: Path) -> dict[str, str]:
    """The text of every section, by its name."""
    data = read_json(results / "gpu.json")
    if data is not None and data["quick"]:
        data = None  # a dry run measures nothing
    parts = data["parts"] if data is not None else {}
    made = {
        "cpu": _cpu(results),
        "cpu-scaling": _scaling(results),
        "where": NOT_YET if data is None else where(data) + "\n\n" + _verdict(data),
        "bars": markdown_table(gpu_report_bars.HEADER, gpu_report_bars.lines(parts)),
        "grid": _grid(parts),
    }
    for name in ("kernels", "parity", "launches", "rates", "dispatch"):
        made[name] = "\n\n".join(TABLES[name](parts[name]["rows"])) if name in parts else NOT_YET
    return made


def _cpu(results: Path) -> str:
    """The bars, a line for each cell, and the plots."""
    cells = cpu_results.read(results)
    if not cells:
        return NOT_YET
    every = "Every system of every cell: [cpu.md](../benchmarks/results/cpu.md)."
    return "\n\n".join([cpu_tables.section(cells), every, *_images("cpu_minilm", "cpu_bert-base")])


def _scaling(results: Path) -> str:
    """The report as it is, without its title, and its plots."""
    path = results / "cpu_scaling.md"
    if not path.exists():
        return NOT_YET
    text = path.read_text(encoding="utf-8").partition("\n")[2].strip().replace("\n## ", "\n#### ")
    return "\n\n".join([text, *_images("cpu_scaling")])


def _images(*names: str) -> list[str]:
    """The plots that are there."""
    there = [name for name in names if (PAGE.parent / "images" / f"{name}.png").exists()]
    return [f"![{name.replace('_', ' ')}](images/{name}.png)" for name in there]


def _verdict(data: dict[str, Any]) -> str:
    wrong, left = failures(data), list(left_out(data))
    text = "Everything passed." if not wrong else "Failed:\n\n" + "\n".join(f"- {line}" for line in wrong)
    return text + ("\n\nLeft out:\n\n" + "\n".join(f"- {line}" for line in left)) * bool(left)


def _grid(parts: dict[str, Any]) -> str:
    """Cells as rows, systems as columns: thousands of real tokens a second, ours with both fractions."""
    cells = timed_cells(parts)
    if not cells:
        return NOT_YET
    systems = list(dict.fromkeys(system for timed in cells.values() for system in timed))
    lines = []
    for name, timed in cells.items():
        line = [name]
        for system in systems:
            result = timed.get(system)
            if result is None:
                line.append("")
                continue
            text = f"{result['tokens_per_s'] / 1e3:,.0f}"
            if system in gpu_report_bars.OURS:
                floor = f", {result['of_floor']:.0%}" if result["of_floor"] is not None else ""
                text = f"**{text}** ({result['of_vendor_gemm']:.0%}{floor})"
            line.append(text)
        lines.append(line)
    return markdown_table(["thousand real tokens/s", *systems], lines)


def regenerate(page: str, made: dict[str, str]) -> str:
    """The page with its generated sections made anew. Raises KeyError for a section that nobody makes."""
    return _SECTION.sub(lambda found: f"{found[1]}\n{made[found['name']]}\n\n{found[3]}", page)


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    fresh = regenerate(page, sections(RESULTS))
    if "--check" in arguments:
        return int(page != fresh)
    write_text(PAGE, fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
