"""The fingerprints of the tested versions, which ship with the package: `recorded.json`.

Generated (`python -m fastencoder.fingerprints update`), one line a class: `"module.Class": {"version": fingerprint}`.
A class that a version does not have has no entry for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

FILE = Path(__file__).with_name("recorded.json")


@dataclass(frozen=True)
class Record:
    """What was recorded.

    Args:
        versions: of transformers, ascending.
        classes: qualified layer class -> version -> fingerprint.
    """

    versions: tuple[str, ...]
    classes: Mapping[str, Mapping[str, str]]

    def fingerprints(self, layer_class: str) -> frozenset[str]:
        """Those of one class, in all versions; empty if it was not recorded."""
        return frozenset(self.classes.get(layer_class, {}).values())

    def alike(self, fingerprint: str) -> tuple[str, ...]:
        """The classes that had a fingerprint in some version, in alphabetical order."""
        return self._classes_by_fingerprint.get(fingerprint, ())

    @cached_property
    def _classes_by_fingerprint(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name in sorted(self.classes):
            for fingerprint in self.fingerprints(name):
                found[fingerprint] = (*found.get(fingerprint, ()), name)
        return found

    def updated(self, version: str, found: Mapping[str, str], registered: set[str]) -> Record:
        """With the fingerprints `found` in a version, and without classes that are not registered any more."""
        classes: dict[str, dict[str, str]] = {}
        for name in sorted(registered):
            entries = {**self.classes.get(name, {})}
            entries.pop(version, None)
            if name in found:
                entries[version] = found[name]
            if entries:
                classes[name] = {key: entries[key] for key in sorted(entries, key=sort_key)}
        return Record(tuple(sorted({*self.versions, version}, key=sort_key)), classes)

    def without(self, version: str) -> Record:
        """Without one version."""
        kept = {
            name: {key: value for key, value in entries.items() if key != version} for name, entries in self.classes.items()
        }
        versions = tuple(each for each in self.versions if each != version)
        return Record(versions, {name: entries for name, entries in kept.items() if entries})

    def to_json(self) -> str:
        """One line a class."""
        lines = [f"  {json.dumps(name)}: {json.dumps(self.classes[name])}" for name in sorted(self.classes)]
        return f'{{"versions": {json.dumps(self.versions)}, "classes": {{\n' + ",\n".join(lines) + "\n}}\n"


def sort_key(version: str) -> tuple[int, ...]:
    """Orders versions by their numbers."""
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))


@cache
def recorded() -> Record:
    """What ships with the package; read once."""
    return load(FILE)


def load(path: Path) -> Record:
    """A record from a file; an empty one if there is none."""
    if not path.is_file():
        return Record((), {})
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Record(tuple(stored["versions"]), stored["classes"])
