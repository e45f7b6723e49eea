"""What changed in the layer classes of the installed transformers: `python -m fastencoder.fingerprints check|update`.

`check` compares them with what was recorded. Exit status 1: a registered class changed, is gone, or was never recorded.
`update` records the installed version, beside those that are recorded already; run it once in an environment of each.
`forget VERSION` drops a version that is no longer tested.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import registry
from . import source
from .normalised import FOLLOWED, closure
from .record import FILE, Record, load, sort_key
from .source import Unreadable

# Bad news first.
CHANGED, GONE, NEW, LIKE = "changed", "gone", "not recorded", "not registered"
_WRONG = (CHANGED, GONE, NEW)


@dataclass(frozen=True)
class Difference:
    """One class that is not as it was recorded."""

    kind: str
    layer_class: str
    says: str


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastencoder.fingerprints", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="list what changed in the installed transformers")
    commands.add_parser("update", help="record the installed transformers")
    commands.add_parser("forget", help="drop a version").add_argument("version")
    options = parser.parse_args(arguments)
    version = importlib.metadata.version("transformers")
    record = load(FILE)
    names = {entry.layer_class for entry in registry.entries() if entry.layer_class.startswith(FOLLOWED)}
    if options.command == "forget":
        FILE.write_text(record.without(options.version).to_json(), encoding="utf-8")
        return 0
    found = installed(names)
    if options.command == "update":
        FILE.write_text(record.updated(version, found, names).to_json(), encoding="utf-8")
        print(f"{FILE.name}: {len(found)} of {len(names)} registered classes are in transformers {version}")
        return 0
    differences = [*compare(record, version, found, names), *unregistered(record, names)]
    show(version, differences, len(found))
    return int(any(difference.kind in _WRONG for difference in differences))


def installed(names: Iterable[str]) -> dict[str, str]:
    """Layer class -> fingerprint, of the classes that the installed transformers has."""
    found = {}
    for name in sorted(names):
        module, _, layer = name.rpartition(".")
        if source.exists(module) and layer in source.read(module).definitions:
            found[name] = closure(module, layer).fingerprint
    return found


def compare(record: Record, version: str, found: dict[str, str], names: set[str]) -> Iterator[Difference]:
    """How registered classes differ from the record: from this version if it is there, else from the latest before it."""
    before = [each for each in record.versions if sort_key(each) <= sort_key(version)] or list(record.versions[:1])
    for name in sorted(names):
        entries = record.classes.get(name, {})
        if name in found and not entries:
            yield Difference(NEW, name, "registered, and in no version recorded")
        elif name in found and found[name] not in entries.values():
            yield Difference(CHANGED, name, f"recorded for {', '.join(entries)}; here it has another source")
        elif name not in found and before and before[-1] in entries:
            yield Difference(GONE, name, f"{before[-1]} has it")


def unregistered(record: Record, names: set[str]) -> Iterator[Difference]:
    """Classes of transformers that are not registered and have the source of one that is."""
    for path in _modelling_files():
        module = f"{FOLLOWED}{path.parent.name}.{path.stem}"
        for name in _layer_classes(module):
            qualified = f"{module}.{name}"
            if qualified in names:
                continue
            try:
                alike = [each for each in record.alike(closure(module, name).fingerprint) if each in names]
            except Unreadable:
                continue
            if alike:
                others = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
                yield Difference(LIKE, qualified, f"same source as {alike[0].rpartition('.')[2]}{others}: supported")


def _modelling_files() -> list[Path]:
    return sorted(source.transformers_folder().glob("models/*/*.py"))


def _layer_classes(module: str) -> list[str]:
    """The classes of a modelling file that could be layers, by the names of their bases."""
    try:
        definitions = source.read(module).definitions if "modeling_" in module or "vision" in module else {}
    except Unreadable:
        return []
    bases = {
        name: {getattr(base, "attr", getattr(base, "id", "")) for base in statements[-1].bases}
        for name, statements in definitions.items()
        if isinstance(statements[-1], ast.ClassDef)
    }
    return [name for name, of in bases.items() if of & {"GradientCheckpointingLayer", "Module"} and _is_named_so(name)]


def _is_named_so(name: str) -> bool:
    return name.endswith(("Layer", "Block", "LayerStableLayerNorm"))


def show(version: str, differences: list[Difference], total: int) -> None:
    """A table of what differs; one line if nothing does."""
    out = Console() if sys.stdout.isatty() else Console(width=120)
    if differences:
        table = Table(title=f"transformers {version}, against what was recorded", title_justify="left")
        for heading in ("", "layer class", ""):
            table.add_column(heading, overflow="fold")
        for difference in sorted(differences, key=lambda each: ((*_WRONG, LIKE).index(each.kind), each.layer_class)):
            colour = "red" if difference.kind in _WRONG else "green"
            name = difference.layer_class.removeprefix(FOLLOWED)
            table.add_row(f"[{colour}]{difference.kind}[/]", name, difference.says)
        out.print(table)
    wrong = sum(difference.kind in _WRONG for difference in differences)
    out.print(f"{total} registered classes are in transformers {version}; {wrong} differ from the record.", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
