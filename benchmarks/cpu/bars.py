"""The bars that the CPU benchmark is held to, and whether they are met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.cpu import results
from benchmarks.cpu.systems import STOCK_SORTED

HEADER = ["bar", "at least", "measured", ""]

# Times as fast as the best engine, by (model, workload): fp32, bf16.
OVER_ENGINES = {
    ("minilm", "W1"): (2.0, 4.5),
    ("bert-base", "W1"): (1.6, 3.0),
    ("minilm", "W2"): (1.0, 1.15),
    ("bert-base", "W2"): (1.0, 1.05),
    ("minilm", "W3"): (1.0, 1.1),
    ("minilm", "W4"): (3.0, 4.0),
    ("bert-base", "W4"): (2.0, 2.5),
}
OVER_SORTED = {("minilm", "W1"): 1.3, ("bert-base", "W1"): 1.3}  # bf16
OF_GEMM = {("minilm", "W1"): 0.55, ("bert-base", "W1"): 0.55}  # bf16
OVER_STOCK = 1.0

Cells = dict[str, results.Cell]


@dataclass(frozen=True)
class Bar:
    """One bar. `measured` is None where it was not; `note` says what it was measured against."""

    name: str
    least: float
    measured: float | None
    note: str = ""
    share: bool = False

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.least

    def line(self) -> list[str]:
        """The row of the table."""
        write: Callable[[float], str] = (lambda x: f"{x:.0%}") if self.share else (lambda x: f"{x:.2f}x")
        measured = (
            "not measured" if self.measured is None else write(self.measured) + (f" ({self.note})" if self.note else "")
        )
        return [self.name, write(self.least), measured, {True: "met", False: "MISSED", None: ""}[self.met]]


def bars(cells: Cells) -> Iterator[Bar]:
    """All of them."""
    for index, dtype in enumerate(("fp32", "bf16")):
        for (model, workload), both in OVER_ENGINES.items():
            yield _over(cells, (model, workload, dtype), both[index], results.best_engine, "the best engine")
    for where, least in OVER_SORTED.items():
        yield _over(cells, (*where, "bf16"), least, lambda _: STOCK_SORTED, "stock sorted by length")
    for (model, workload), least in OF_GEMM.items():
        cell = cells.get(results.key(model, workload, "bf16"))
        mine = results.ours(cell) if cell else None
        share = results.of_gemm(cell, mine) if cell and mine else None
        yield Bar(f"{model} {workload} bf16, of the GEMM rate", least, share, mine or "", share=True)
    yield _least(cells)


def _over(
    cells: Cells, where: tuple[str, str, str], least: float, other: Callable[[results.Cell], str | None], words: str
) -> Bar:
    name = results.key(*where)
    cell = cells.get(name)
    against = other(cell) if cell else None
    lead = results.lead(cell, against) if cell else None
    return Bar(f"{name}, over {words}", least, lead.median if lead else None, against or "")


def _least(cells: Cells) -> Bar:
    """No cell may be slower than stock."""
    leads = {name: results.lead(cell, results.stock(cell)) for name, cell in cells.items()}
    there = {name: lead.median for name, lead in leads.items() if lead is not None}
    worst = min(there, key=there.__getitem__) if there else None
    note = f"{worst}; least of {len(there)} cells" if worst else ""
    return Bar("every cell, over stock", OVER_STOCK, there[worst] if worst else None, note)
