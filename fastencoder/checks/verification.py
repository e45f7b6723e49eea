"""What a verification found, and the report of it: as a dictionary for JSON, and as Markdown to attach to a change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Compared:
    """One layer, or one output of the whole model, beside the reference.

    Args:
        name: path of the layer, or name of the output.
        what: class of the layer; "" for an output.
        level: "layer" or "attention", how much of the layer is fast; "" for an output.
        dtype: what it computes in: bf16, fp16 or fp32.
        error: largest relative error of a real token (`compare.error`).
        stock_error: the same of the stock model in this dtype.
        bound: the largest error that is within rounding.
        fast_calls, delegated_calls: how often it ran fast, and how often its original code; 0 for an output.
        reason: why the latest of these calls ran the original code, or "".
    """

    name: str
    what: str
    level: str
    dtype: str
    error: float
    stock_error: float
    bound: float
    fast_calls: int = 0
    delegated_calls: int = 0
    reason: str = ""

    @property
    def verdict(self) -> str:
        """ "ok", "ABOVE" its bound, or "NOT RUN": all calls of a layer ran its original code, so nothing was checked."""
        if not self.error <= self.bound:
            return "ABOVE"
        return "NOT RUN" if self.level and not self.fast_calls else "ok"


@dataclass(frozen=True)
class Left:
    """Layers that stay as they are, with the reason."""

    name: str
    what: str
    status: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """Everything that `fastencoder verify` says.

    Args:
        about: what was compared, on what: model, versions, machine, settings, as texts.
        batches: names of the batches, with rows and real tokens.
        layers, outputs: each layer by itself, and the outputs of the whole model.
        left: layers that were refused or left alone.
    """

    about: dict[str, str]
    batches: tuple[str, ...]
    layers: tuple[Compared, ...]
    outputs: tuple[Compared, ...]
    left: tuple[Left, ...]

    @property
    def passed(self) -> bool:
        """Whether something was checked, and all of it ran fast and is within its bound."""
        compared = (*self.layers, *self.outputs)
        return bool(self.layers and self.outputs) and all(row.verdict == "ok" for row in compared)

    @property
    def verdict(self) -> str:
        """One line."""
        wrong = [row for row in (*self.layers, *self.outputs) if row.verdict == "ABOVE"]
        idle = [row for row in self.layers if row.verdict == "NOT RUN"]
        if not self.layers:
            return "FAILED: nothing in this model can be made fast"
        if not self.outputs:
            return "FAILED: no output of the model could be compared"
        if wrong:
            return f"FAILED: {_count(wrong, 'error')} above the bound, the first of them in {wrong[0].name}"
        if idle:
            return f"FAILED: {_count(idle, 'layer')} never ran fast, so nothing was checked of {idle[0].name}"
        refused = [row for row in self.left if row.status == "refused"]
        said = f"; {_count(refused, 'layer')} refused" if refused else ""
        return f"passed: {_count(self.layers, 'layer')} and {_count(self.outputs, 'output')} within their bounds{said}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON. An error that is infinite (a NaN somewhere) is null."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "about": self.about,
            "batches": list(self.batches),
            "layers": [_row(row) for row in self.layers],
            "outputs": [_row(row) for row in self.outputs],
            "left": [asdict(row) for row in self.left],
        }

    def to_markdown(self) -> str:
        """The report."""
        lines = ["# fastencoder verify", "", f"**{self.verdict}**", "", *_table(("", ""), self.about.items())]
        lines += ["", "Batches: " + "; ".join(self.batches) + "."]
        lines += [
            "",
            "Errors are relative, of the worst real token: norm of the difference over norm of the reference. ",
        ]
        lines[-1] += "The bound is twice what stock itself is away in the same dtype, in fp32 at least 1e-5."
        if self.outputs:
            lines += ["", "## The whole model", "", *_table(("output", "in", *_NUMBERS), map(_output, self.outputs))]
        if self.layers:
            heading = ("layer", "class", "fast", "in", "calls fast", *_NUMBERS)
            lines += [
                "",
                "## Each layer, given the reference's hidden states",
                "",
                *_table(heading, map(_layer, self.layers)),
            ]
        delegated = [(f"`{row.name}`", row.delegated_calls, row.reason) for row in self.layers if row.delegated_calls]
        if delegated:
            of_calls = ("layer", "calls", "the latest because")
            lines += ["", "## Calls that ran the original code", "", *_table(of_calls, delegated)]
        if self.left:
            rows = [(f"`{row.name}`", row.what, row.status, row.reason) for row in self.left]
            lines += ["", "## Left as they are", "", *_table(("layer", "class", "status", "why"), rows)]
        return "\n".join(lines) + "\n"


_NUMBERS = ("error", "stock's own", "bound", "verdict")


def numbers(row: Compared) -> tuple[str, str, str, str]:
    """The last columns of a table, as text."""
    return f"{row.error:.1e}", f"{row.stock_error:.1e}", f"{row.bound:.1e}", row.verdict


def calls(row: Compared) -> str:
    """How many of a layer's calls ran fast."""
    return f"{row.fast_calls} of {row.fast_calls + row.delegated_calls}"


def _output(row: Compared) -> tuple[str, ...]:
    return f"`{row.name}`", row.dtype, *numbers(row)


def _layer(row: Compared) -> tuple[str, ...]:
    return f"`{row.name}`", row.what, row.level, row.dtype, calls(row), *numbers(row)


def _row(row: Compared) -> dict[str, Any]:
    finite = {key: None if value in (float("inf"),) else value for key, value in asdict(row).items()}
    return {**finite, "verdict": row.verdict}


def _table(heading: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"| {' | '.join('---' for _ in heading)} |"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"


def _count(rows: Sequence[Any], what: str) -> str:
    return f"{len(rows)} {what}{'' if len(rows) == 1 else 's'}"
