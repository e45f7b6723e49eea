"""What can be made fast in a model, what cannot, and why: `explain(model)`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import nn

from . import fingerprints, registry
from .eligibility import Finding, inspect_layer
from .layers import FastLayer, trial
from .layers.weights import extra_bytes

if TYPE_CHECKING:
    from rich.table import Table

_LAYER_NAMES = ("layer", "layers", "block", "blocks", "h", "resblocks")


@dataclass(frozen=True)
class LayerRow:
    """One layer of a model.

    Args:
        name: dotted path from the model.
        layer_class: qualified name of its (original) class.
        family: what it computes, or None if its class is not known.
        status: "fast" (converted), "eligible", "refused" (a known encoder layer that fails a check) or "left alone" (no
            encoder layer, or of a class that is not known).
        reasons: why it is refused or left alone; for a fast layer, why calls ran its original code, if any did.
        extra_bytes: what it costs in memory beside the model's own parameters, once it is fast and has run.
        notes: how it is known what it computes, if not by its class's name.
    """

    name: str
    layer_class: str
    family: str | None
    status: str
    reasons: tuple[str, ...]
    extra_bytes: int
    notes: tuple[str, ...] = ()


class Report:
    """The rows of `explain`. Prints as a table, iterates as `LayerRow`s."""

    def __init__(self, model_class: str, rows: list[LayerRow]) -> None:
        self.model_class = model_class
        self.rows = rows

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _with(self, status: str) -> list[LayerRow]:
        return [row for row in self.rows if row.status == status]

    @property
    def eligible(self) -> bool:
        """Whether `to_fast(model)` would succeed: something is eligible and nothing is refused."""
        return bool(self._with("eligible")) and not self._with("refused")

    @property
    def extra_bytes(self) -> int:
        """Bytes beside the model's own parameters, of all layers that are or would be fast."""
        return sum(row.extra_bytes for row in self.rows)

    def summary(self) -> str:
        """One line."""
        counts = [(len(self._with(status)), status) for status in ("fast", "eligible", "refused", "left alone")]
        said = ", ".join(f"{count} {status}" for count, status in counts if count) or "no encoder layer found"
        memory = f"; extra memory {self.extra_bytes / 2**20:,.1f} MiB" if self.extra_bytes else ""
        return f"{self.model_class}: {said}{memory}"

    def reasons(self, *statuses: str) -> str:
        """Each distinct reason once, with the layers that it holds for, as indented lines."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.status in statuses:
                for reason in row.reasons:
                    found.setdefault((row.layer_class.rpartition(".")[2], reason), []).append(row.name)
        return "\n".join(f"  {_some(names)} ({cls}): {reason}" for (cls, reason), names in found.items())

    def table(self) -> Table:
        """A rich table of at most 100 columns; equal neighbours share a line."""
        from rich.table import Table

        table = Table(title=self.summary(), title_justify="left", width=100)
        for heading, ratio in (("layer", 5), ("class", 4), ("family", 2), ("status", 2), ("why", 6)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        for names, row in self._runs():
            colour = {"fast": "green", "eligible": "green", "refused": "red"}.get(row.status, "dim")
            class_name = row.layer_class.rpartition(".")[2]
            why = "; ".join(row.reasons + row.notes)
            table.add_row(names, class_name, row.family or "-", f"[{colour}]{row.status}[/]", why)
        return table

    def _runs(self) -> Iterator[tuple[str, LayerRow]]:
        start = 0
        for end in range(1, len(self.rows) + 1):
            same = end < len(self.rows) and _alike(self.rows[start], self.rows[end])
            if not same:
                first, last = self.rows[start].name, self.rows[end - 1].name
                yield (first if first == last else f"{first} .. {last.rpartition('.')[2]}"), self.rows[start]
                start = end

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "model_class": self.model_class,
            "eligible": self.eligible,
            "extra_bytes": self.extra_bytes,
            "layers": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self.table())
        return text.getvalue().rstrip()

    __repr__ = __str__


def _alike(a: LayerRow, b: LayerRow) -> bool:
    parent_a, parent_b = a.name.rpartition(".")[0], b.name.rpartition(".")[0]
    alike = (a.layer_class, a.status, a.reasons, a.notes) == (b.layer_class, b.status, b.reasons, b.notes)
    return alike and parent_a == parent_b


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def explain(model: nn.Module) -> Report:
    """Says for every encoder layer of a model whether it is fast, could be, or why it cannot. Touches nothing.

    A model whose weights are on the meta device is judged as if they were loaded.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    return Report(type(model).__name__, [row for row, _ in survey(model, allow_meta=True)])


def check_is_module(model: object) -> None:
    """Raises TypeError for anything but a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, such as a model of transformers, not {type(model).__name__}")


def survey(model: nn.Module, allow_meta: bool = False) -> list[tuple[LayerRow, nn.Module]]:
    """A row for each encoder layer, with the layer itself."""
    check_is_module(model)
    rows = []
    in_lists = {id(each) for parent in model.modules() if isinstance(parent, nn.ModuleList) for each in parent}
    found: dict[tuple[type, bool], fingerprints.Known | None] = {}
    for name, module in model.named_modules():
        cls = module.original_class if isinstance(module, FastLayer) else type(module)
        is_placed = id(module) in in_lists and _has_weights(module)
        if (cls, is_placed) not in found:
            found[cls, is_placed] = fingerprints.find(cls, by_source=is_placed)
        row = _row(name, module, found[cls, is_placed], allow_meta)
        if row is not None:
            rows.append((row, module))
    return rows


def _row(name: str, module: nn.Module, known: fingerprints.Known | None, allow_meta: bool) -> LayerRow | None:
    if isinstance(module, FastLayer):  # it keeps its adapter, whatever the registry says by now
        layer_class, adapter = module.original_class, module._fastencoder.adapter
    else:
        if known is None:
            reason = _unknown(name, module)
            class_name = registry.qualified_name(type(module))
            return LayerRow(name, class_name, None, "left alone", (reason,), 0) if reason else None
        layer_class, adapter = type(module), known.adapter
    class_name = registry.qualified_name(layer_class)
    finding = inspect_layer(module, layer_class, adapter, allow_meta)
    memory = extra_bytes(finding.spec, next(module.parameters())) if finding.spec else 0
    notes = _notes(module, known)
    if isinstance(module, FastLayer):
        return LayerRow(name, class_name, adapter.family, "fast", _delegations(module), memory, notes)
    status, reasons = _status(finding), finding.reasons
    failed = trial.trial_of(module, layer_class).failed if known is not None and known.unproven else None
    if status == "eligible" and failed is not None:
        status, reasons, memory = "refused", (failed,), 0
    return LayerRow(name, class_name, adapter.family, status, reasons, memory, notes if status == "eligible" else ())


def _notes(module: nn.Module, known: fingerprints.Known | None) -> tuple[str, ...]:
    if known is not None and known.like is not None:
        return (f"same source as {known.like.rpartition('.')[2]}",)
    if known is None or not known.unproven:
        return ()
    if isinstance(module, FastLayer) and len(module._fastencoder.to_prove) < len(trial.KINDS):
        return ("checked numerically against its own forward: its source differs from the tested versions",)
    return ("its source differs from the tested versions: its first call is checked against its own forward",)


def _delegations(layer: FastLayer) -> tuple[str, ...]:
    state = layer._fastencoder
    if not state.delegated_calls:
        return ()
    every = state.delegated_calls + state.fast_calls
    return (f"{state.delegated_calls} of {every} calls ran the original layer; the latest because {state.last_reason}",)


def _status(finding: Finding) -> str:
    if finding.left_alone:
        return "left alone"
    return "eligible" if finding.spec else "refused"


def _unknown(name: str, module: nn.Module) -> str | None:
    """Why a module that sits where layers sit is left alone; None for everything else."""
    parts = name.split(".")
    if len(parts) < 2 or not parts[-1].isdigit() or parts[-2] not in _LAYER_NAMES:
        return None
    if not _has_weights(module):
        return None
    known = next((base for base in type(module).__mro__[1:] if registry.by_class(base)), None)
    if known is not None:
        return f"a subclass of {known.__name__}: its code may differ, so only {known.__name__} itself is fast"
    if "decoder" in name.lower() or "decoder" in type(module).__name__.lower():
        return "a decoder layer"
    return "this layer class is not registered"


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters())
