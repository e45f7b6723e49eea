"""The bars that this project sets itself on an H100 (SXM, bf16, real tokens), and what was measured of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

OURS = ("fastencoder", "fastencoder, CUDA graphs")
MANY_TOKENS = 8192
NOT_MEASURED = "not measured"

Parts = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One bar, and how it is read off the results.

    Args:
        value: parts of a result -> the measured value and where it was measured; None where it was not.
        must, goal: what the value is compared with; `lower` says that less is better.
    """

    name: str
    unit: str
    must: float
    goal: float
    value: Callable[[Parts], tuple[float, str] | None]
    lower: bool = False
    digits: int = 2

    def line(self, parts: Parts) -> list[str]:
        """Name, must, goal, measured, verdict."""
        found = self.value(parts)
        head = [self.name, f"{self.must:g} {self.unit}".strip(), f"{self.goal:g} {self.unit}".strip()]
        if found is None:
            return [*head, NOT_MEASURED, ""]
        value, where = found

        def reached(bound: float) -> bool:
            return value <= bound if self.lower else value >= bound

        verdict = "met" if reached(self.goal) else "must is met" if reached(self.must) else "MISSED"
        return [*head, f"{value:.{self.digits}f} {self.unit}".strip() + f" ({where})", verdict]


def cells(parts: Parts, part: str = "speed") -> Iterator[tuple[str, dict[str, Any]]]:
    """The cells of a part in which something of ours was timed."""
    for name, found in parts.get(part, {}).get("rows", {}).items():
        if any(ms(found, system) for system in OURS):
            yield name, found


def ms(cell: dict[str, Any], system: str) -> float | None:
    """Median milliseconds of a system on a cell; None where it was not timed."""
    return cell.get("systems", {}).get(system, {}).get("ms", {}).get("median")


def best_ms(cell: dict[str, Any]) -> float:
    """Of ours, whichever is faster on this cell."""
    return min(time for system in OURS if (time := ms(cell, system)))


def slowest_tokens(model: str) -> Callable[[Parts], tuple[float, str] | None]:
    """Million tokens per second on the worst cell with many tokens: a bar holds on all of them."""

    def value(parts: Parts) -> tuple[float, str] | None:
        rates = [
            (found["tokens"] / best_ms(found) / 1000, name)
            for name, found in cells(parts)
            if found["model"] == model and found["dtype"] == "bf16" and found["tokens"] >= MANY_TOKENS
        ]
        if not rates:
            return None
        (slowest, where), (fastest, _) = min(rates), max(rates)
        return slowest, f"the slowest of {len(rates)} cells, {where}; the fastest has {fastest:.2f}"

    return value


def latency(parts: Parts) -> tuple[float, str] | None:
    """BERT-base, one text of 128 tokens."""
    for name, found in cells(parts):
        if name == "bert-base bf16 1x128 padding=0%" and (time := ms(found, OURS[1])):
            return time, "median of a forward with embeddings"
    return None


def half_padding(parts: Parts) -> tuple[float, str] | None:
    """How many times faster a batch is when half of it is padding, on the cells with many real tokens."""
    found = dict(cells(parts))
    gains = []
    for name, cell in found.items():
        full = found.get(name.replace("padding=50%", "padding=0%"))
        if name.endswith("padding=50%") and cell["tokens"] >= MANY_TOKENS and full is not None:
            gains.append((best_ms(full) / best_ms(cell), name))
    return (min(gains)[0], f"the least of {len(gains)} cells, {min(gains)[1]}") if gains else None


def least_lead(parts: Parts) -> tuple[float, str] | None:
    """How many times faster than the fastest peer, on the cell where that is least; ratios of the same round."""
    leads = [
        (result["ours_is_faster"]["median"], f"{name}, against {system}")
        for part in ("speed", "compile")
        for name, found in cells(parts, part)
        for system, result in found["systems"].items()
        if "ours_is_faster" in result
    ]
    return min(leads) if leads else None


def most(key: str) -> Callable[[Parts], tuple[float, str] | None]:
    """The largest count over the models of part "launches"."""

    def value(parts: Parts) -> tuple[float, str] | None:
        counts = [(found[key], name) for name, found in parts.get("launches", {}).get("rows", {}).items() if key in found]
        return max(counts) if counts else None

    return value


BARS = (
    Bar("BERT-base, 8,192 or more real tokens", "M tokens/s", 2.3, 3.4, slowest_tokens("bert-base")),
    Bar("BERT-large, 8,192 or more real tokens", "M tokens/s", 0.72, 1.07, slowest_tokens("bert-large")),
    Bar("BERT-base, 1 x 128 tokens, CUDA graphs", "ms", 0.50, 0.25, latency, lower=True, digits=3),
    Bar("Half padding against none, same batch", "x", 1.95, 1.95, half_padding),
    Bar("Least lead over any peer on any cell", "x", 1.0, 1.0, least_lead),
    Bar("Launches a layer", "", 7, 5, most("launches_a_layer"), lower=True, digits=1),
    Bar("Host synchronisations a forward", "", 1, 1, most("syncs_a_forward"), lower=True, digits=0),
)
HEADER = ["bar", "must", "goal", "measured", ""]


def lines(parts: Parts) -> list[list[str]]:
    """All bars, as rows of a table."""
    return [bar.line(parts) for bar in BARS]
