"""What can be made fast in a model, what cannot, and why: `explain(model)`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import fingerprints, registry
from .attention_level import AttentionSite, AttentionState, VarlenAttention, find_sites, own_class
from .eligibility import Finding, inspect_layer
from .families.left_out import LEFT_OUT
from .layers import FastLayer, LayerState, trial
from .layers.invariance import layer_refusal, refusals_outside
from .layers.settings import Memory, Settings, computing_dtype, fastest_dtype, plain_weights, refusal
from .layers.weights import extra_bytes
from .spec import LayerSpec
from .versions import untested

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
        level: how much of it is or would be fast: "layer" (all of it), "attention" (it keeps its own code, and padding is
            left out of its attention) or None.
        status: "fast" (converted), "eligible", "refused" (a known encoder layer that fails a check) or "left alone" (no
            encoder layer, or of a class that is not known).
        reasons: why it is refused or left alone; for a fast layer, why calls ran its original code, if any did; at the
            level "attention", also why batches with padding run the original attention, if they do.
        extra_bytes: what it costs in memory beside the model's own parameters, once it is fast and has run.
        notes: how it is known what it computes, if not by its class's name; and where it does not compute in the dtype that was
            asked for.
        compute_dtype: what it computes in ("float32", "bfloat16", ...); None where its own code computes.
        lean_bytes: what `extra_bytes` would be with `memory="lean"`; None where that cannot be, because what it computes in
            takes a copy of its weights.
    """

    name: str
    layer_class: str
    family: str | None
    level: str | None
    status: str
    reasons: tuple[str, ...]
    extra_bytes: int
    notes: tuple[str, ...] = ()
    compute_dtype: str | None = None
    lean_bytes: int | None = 0


class Report:
    """The rows of `explain`. Prints as a table, iterates as `LayerRow`s.

    Attributes:
        untested_versions: one line for each installed package whose version was never tested.
    """

    def __init__(self, model_class: str, rows: list[LayerRow]) -> None:
        self.model_class = model_class
        self.rows = rows
        self.untested_versions = untested()

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
    def levels(self) -> dict[str, str | None]:
        """For each layer class, the level that all of its layers reach; None if some of them reach none."""
        found: dict[str, set[str | None]] = {}
        for row in self.rows:
            found.setdefault(row.layer_class, set()).add(row.level)
        order = (None, "attention", "layer")
        return {layer_class: min(levels, key=order.index) for layer_class, levels in found.items()}

    @property
    def extra_bytes(self) -> int:
        """Bytes beside the model's own parameters, of all layers that are or would be fast."""
        return sum(row.extra_bytes for row in self.rows)

    @property
    def lean_bytes(self) -> int | None:
        """What `extra_bytes` would be with `memory="lean"`; None where that cannot be."""
        each = [row.lean_bytes for row in self.rows]
        return None if None in each else sum(bytes_ for bytes_ in each if bytes_)

    def summary(self) -> str:
        """One line."""
        counts = [(len(self._with(status)), status) for status in ("fast", "eligible", "refused", "left alone")]
        said = ", ".join(f"{count} {status}" for count, status in counts if count) or "no encoder layer found"
        return f"{self.model_class}: {said}{self._computes_in()}{self._memory()}"

    def _computes_in(self) -> str:
        found = dict.fromkeys(row.compute_dtype for row in self.rows if row.compute_dtype)
        return f"; computes in {', '.join(found)}" if found else ""

    def _memory(self) -> str:
        if not self.extra_bytes:
            return ""
        lean = "" if self.lean_bytes is None else f", with memory=\"lean\" {self.lean_bytes / 2**20:,.1f} MiB"
        return f"; extra memory {self.extra_bytes / 2**20:,.1f} MiB{lean}"

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
        for heading, ratio in (("layer", 5), ("class", 4), ("family", 2)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        for heading in ("level", "status"):
            table.add_column(heading, no_wrap=True)
        table.add_column("why", ratio=6, overflow="fold")
        for names, row in self._runs():
            colour = {"fast": "green", "eligible": "green", "refused": "red"}.get(row.status, "dim")
            class_name = row.layer_class.rpartition(".")[2]
            status = f"[{colour}]{row.status}[/]"
            why = "; ".join(row.reasons + row.notes)
            table.add_row(names, class_name, row.family or "-", row.level or "-", status, why)
        if self.untested_versions:
            table.caption = "\n".join(f"warning: {line}" for line in self.untested_versions)
            table.caption_justify = "left"
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
            "lean_bytes": self.lean_bytes,
            "untested_versions": list(self.untested_versions),
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
    said_a, said_b = ((row.layer_class, row.level, row.status, row.reasons, row.notes) for row in (a, b))
    return parent_a == parent_b and said_a == said_b


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def explain(
    model: nn.Module,
    *,
    compute_dtype: torch.dtype | None = None,
    memory: Memory = "default",
    batch_invariant: bool = False,
) -> Report:
    """Says for every encoder layer of a model whether it is fast, could be, or why it cannot. Touches nothing.

    A model whose weights are on the meta device is judged as if they were loaded.

    Args:
        model: a module, fast or not.
        compute_dtype: as for `to_fast`: what a conversion with it would do. Layers that are fast already have their own.
        memory: likewise.
        batch_invariant: likewise. With it there is a row, too, for each part outside of the layers that stands in its way.

    Raises:
        ValueError: `compute_dtype`, `memory` or `batch_invariant` has a value that `to_fast` does not take.
        TypeError: `model` is not a `torch.nn.Module`.
    """
    settings = Settings(compute_dtype, memory, batch_invariant)
    check_is_module(model)
    known = fingerprints.find_all(model)
    rows = survey(model, known, find_sites(model, known), settings, allow_meta=True)
    return Report(type(model).__name__, [row for row, _ in rows])


def check_is_module(model: object) -> None:
    """Raises TypeError for anything but a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, such as a model of transformers, not {type(model).__name__}")


def survey(
    model: nn.Module,
    known: dict[str, fingerprints.Known],
    sites: list[AttentionSite],
    settings: Settings,
    allow_meta: bool = False,
) -> list[tuple[LayerRow, nn.Module]]:
    """A row for each encoder layer, with the layer itself; `known` and `sites` are what is understood of the model."""
    by_layer: dict[str, list[AttentionSite]] = {}
    around: set[str] = set()  # containers of such layers are no layers
    for site in sites:
        path = layer_around(site, model)
        by_layer.setdefault(path, []).append(site)
        around.update(path[:end] for end, letter in enumerate(path) if letter == ".")
    rows = []
    inside = tuple(f"{name}." for name in known)  # the parts of a layer are no layers (T5 keeps them in lists)
    for name, module in model.named_modules():
        if name in by_layer:
            rows.append((_row_of_attention(name, module, by_layer[name], settings), module))
            continue
        if name.startswith(inside) and name not in known:
            continue
        row = _row(name, module, known.get(name), settings, allow_meta)
        if row is not None and not (row.level is None and name in around):
            rows.append((row, module))
    return rows + (_rows_outside(model, [row for row, _ in rows]) if settings.batch_invariant else [])


def _rows_outside(model: nn.Module, rows: list[LayerRow]) -> list[tuple[LayerRow, nn.Module]]:
    """A refused row for each part outside of the layers whose bits would depend on the batch."""
    inside = tuple(row.name for row in rows if row.status != "left alone")
    return [
        (LayerRow(name, registry.qualified_name(type(module)), None, None, "refused", (reason,), 0), module)
        for name, module, reason in refusals_outside(model, inside)
    ]


def layer_around(site: AttentionSite, model: nn.Module) -> str:
    """The innermost element of a list that has weights beside this attention; the attention itself if there is none."""
    path = site.name
    while path := path.rpartition(".")[0]:
        if path.rpartition(".")[2].isdigit():
            inside = site.name.removeprefix(f"{path}.") + "."
            parameters = model.get_submodule(path).named_parameters()
            if any(parameter.dim() > 1 and not name.startswith(inside) for name, parameter in parameters):
                return path
    return site.name


def _row_of_attention(name: str, module: nn.Module, sites: list[AttentionSite], settings: Settings) -> LayerRow:
    converted = [site.module for site in sites if isinstance(site.module, VarlenAttention)]
    reasons = dict.fromkeys(site.padding_is_read for site in sites if site.padding_is_read)
    kept = tuple(f"padding stays in the attention: {reason}" for reason in reasons)
    for attention in converted:
        kept += _delegations(attention._fastencoder_attention, "attention")
    class_name = registry.qualified_name(own_class(module))
    weight = next(module.parameters(), None)
    if not converted and weight is not None and fastest_dtype(settings.compute_dtype, weight) != weight.dtype:
        reason = f"only its attention is understood, so it cannot compute in {settings.compute_dtype}"
        return LayerRow(name, class_name, None, None, "refused", (f"{reason}: convert without compute_dtype",), 0)
    if not converted and settings.batch_invariant:
        reason = "only its attention is understood: its other sums may go over the batch in any order"
        return LayerRow(name, class_name, None, None, "refused", (reason,), 0)
    status = "fast" if converted else "eligible"
    return LayerRow(name, class_name, None, "attention", status, tuple(dict.fromkeys(kept)), 0)


def _row(
    name: str, module: nn.Module, known: fingerprints.Known | None, settings: Settings, allow_meta: bool
) -> LayerRow | None:
    if isinstance(module, FastLayer):  # it keeps its adapter, whatever the registry says by now
        layer_class, adapter = module.original_class, module._fastencoder.adapter
    else:
        if known is None:
            reason = _unknown(name, module)
            class_name = registry.qualified_name(type(module))
            return LayerRow(name, class_name, None, None, "left alone", (reason,), 0) if reason else None
        layer_class, adapter = type(module), known.adapter.of(module)
    class_name = registry.qualified_name(layer_class)
    finding = inspect_layer(module, layer_class, adapter, allow_meta)
    if isinstance(module, FastLayer):
        settings = module._fastencoder.settings
        reasons = _delegations(module._fastencoder, "layer")
        row = LayerRow(name, class_name, adapter.family, "layer", "fast", reasons, 0, _notes(module, known))
        return _with_costs(row, module, finding.spec, settings) if finding.spec else row
    if not finding.spec:
        return LayerRow(name, class_name, adapter.family, None, _status(finding), finding.reasons, 0)
    failed = trial.trial_of(module, layer_class).failed if known is not None and known.unproven else None
    weights = plain_weights(module, finding.spec)
    failed = failed or refusal(settings, finding.spec, weights)
    if failed is None and settings.batch_invariant:
        failed = layer_refusal(module, finding.spec, weights)
    if failed is not None:
        return LayerRow(name, class_name, adapter.family, None, "refused", (failed,), 0)
    row = LayerRow(name, class_name, adapter.family, "layer", "eligible", (), 0, _notes(module, known))
    return _with_costs(row, module, finding.spec, settings)


def _with_costs(row: LayerRow, layer: nn.Module, spec: LayerSpec, settings: Settings) -> LayerRow:
    """The row of a layer with what it computes in, and the memory that it takes for that."""
    weights = plain_weights(layer, spec)
    dtype = computing_dtype(settings, spec, weights)
    lean = replace(settings, memory="lean", batch_invariant=False)
    notes = row.notes
    if settings.compute_dtype not in (None, dtype):
        why = refusal(settings, spec, weights) or f"this processor is no faster in {_short(settings.compute_dtype)}"
        notes += (f"computes in {_short(dtype)}: {why}",)
    return replace(
        row,
        extra_bytes=extra_bytes(spec, weights, settings),
        notes=notes,
        compute_dtype=_short(dtype),
        lean_bytes=None if dtype != weights[0].dtype or settings.batch_invariant else extra_bytes(spec, weights, lean),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _notes(module: nn.Module, known: fingerprints.Known | None) -> tuple[str, ...]:
    if known is not None and known.like is not None:
        return (f"same source as {known.like.rpartition('.')[2]}",)
    if known is None or not known.unproven:
        return ()
    if isinstance(module, FastLayer) and len(module._fastencoder.to_prove) < len(trial.KINDS):
        return ("checked numerically against its own forward: its source differs from the tested versions",)
    return ("its source differs from the tested versions: its first call is checked against its own forward",)


def _delegations(state: LayerState | AttentionState, what: str) -> tuple[str, ...]:
    if not state.delegated_calls:
        return ()
    every = state.delegated_calls + state.fast_calls
    return (f"{state.delegated_calls} of {every} calls ran the original {what}; the latest because {state.last_reason}",)


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
    left_out = LEFT_OUT.get(registry.qualified_name(type(module)))
    if left_out is not None:
        return f"there is no fast layer of this class: it {left_out}"
    known = next((base for base in type(module).__mro__[1:] if registry.by_class(base)), None)
    if known is not None:
        return f"a subclass of {known.__name__}: its code may differ, so only {known.__name__} itself is fast"
    if "decoder" in name.lower() or "decoder" in type(module).__name__.lower():
        return "a decoder layer"
    return "this layer class is not registered"


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters())
