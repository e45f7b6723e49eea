"""Bundles: a folder with the compiled kernels that a model will ask for, under the names by which Triton's cache knows them.

`write_bundle` makes one on any machine; `load_bundle` gives it to Triton on a server, which then finds every kernel and
compiles none. A bundle is data: a manifest, and for each kernel the GPU's machine code and its description in JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.cache import CacheManager, FileCacheManager, triton_key

from .. import __version__

MANIFEST = "manifest.json"
_FORMAT = 1
_ENTRIES = "kernels"
_KEPT = (".json", ".cubin")  # the stages in between are for people who debug a compiler

_lock = threading.Lock()
_loaded: dict[str, dict[str, str]] = {}  # cache key -> file name -> path


class BundleError(ValueError):
    """A folder is not a bundle that may be used here. The message is one line for the user."""


@dataclass(frozen=True)
class Entry:
    """One compiled kernel.

    Attributes:
        key: the name of its folder in Triton's cache.
        architecture: `"sm_90"`, say.
        files: sha256 by file name.
    """

    key: str
    architecture: str
    files: dict[str, str]


def write_bundle(folder: Path, groups: Mapping[str, Iterable[Mapping[str, str]]], about: Mapping[str, Any]) -> list[Entry]:
    """Makes a bundle of kernels that lie in Triton's cache. An earlier bundle in `folder` is replaced as a whole.

    Args:
        groups: for each architecture, the `metadata_group` of every compiled kernel: file names with their paths.
        about: what the bundle was made for; written to the manifest, and not checked.

    Raises:
        BundleError: `folder` holds something else than a bundle.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        new = Path(made) / "bundle"
        new.mkdir()
        entries = [_copy(group, name, new) for name, found in groups.items() for group in found]
        manifest = {
            "format": _FORMAT,
            **requirements(),
            "assemblers": {architecture: _assembler(architecture) for architecture in groups},
            "about": dict(about),
            "kernels": [asdict(entry) for entry in sorted(entries, key=lambda entry: (entry.architecture, entry.key))],
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    return entries


def check_replaceable(folder: Path) -> None:
    """Raises BundleError unless `folder` is free for a bundle: absent, empty, or a bundle already."""
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"'{folder}' is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise BundleError(f"'{folder}' holds other files than a bundle's, and would have to be replaced")


def load_bundle(folder: str | Path) -> bool:
    """Lets Triton find the kernels of a bundle, if all of it is as it was made and fits this process.

    Several bundles may be loaded. Call it in the process that runs the model: it asks the GPU for its architecture.

    Returns:
        True if the bundle is used. Otherwise False, after one warning that says why; kernels are compiled as ever.
    """
    try:
        found = dict(_checked_entries(Path(folder)))
    except BundleError as error:
        warnings.warn(
            f"fastencoder: the bundle '{folder}' is not used: {error}. Kernels are compiled when they are first needed.",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    with _lock:
        _loaded.update(found)
        _install()
    return True


def requirements() -> dict[str, Any]:
    """What must be the same where a bundle is made and where it is used, by name."""
    return {
        "fastencoder": __version__,
        "triton": triton.__version__,
        "compiler": hashlib.sha256(triton_key().encode()).hexdigest(),  # builds of one release may differ
        "settings": dict(sorted(get_cache_invalidating_env_vars().items())),
        "sources": _source_hash(),
    }


_MEANING = {
    "fastencoder": "fastencoder",
    "triton": "triton",
    "compiler": "another build of triton",
    "settings": "other TRITON_ environment variables",
    "sources": "other kernel sources",
}


def _checked_entries(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The files of every kernel by cache key. Raises BundleError."""
    manifest = _read_manifest(folder)
    for name, here in requirements().items():
        there = manifest.get(name)
        if there != here:
            versions = f"{name} {there}, and this is {here}" if name in ("fastencoder", "triton") else _MEANING[name]
            raise BundleError(f"it was made with {versions}")
    _check_architecture(manifest)
    for described in manifest["kernels"]:
        try:
            entry = Entry(**described)
            files = {name: _checked_file(folder, entry, name) for name in entry.files}
        except (TypeError, AttributeError) as error:
            raise BundleError(f"its {MANIFEST} is damaged") from error
        yield entry.key, files


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"there is no {MANIFEST} in it") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise BundleError(f"its {MANIFEST} is not of format {_FORMAT}")
    if not isinstance(manifest.get("kernels"), list) or not isinstance(manifest.get("assemblers"), dict):
        raise BundleError(f"its {MANIFEST} is damaged")
    return manifest


def _check_architecture(manifest: dict[str, Any]) -> None:
    try:
        target = driver.active.get_current_target()
    except RuntimeError as error:
        raise BundleError(f"Triton finds no GPU ({error})") from error
    here = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    if here not in manifest["assemblers"]:
        raise BundleError(f"it was made for {', '.join(manifest['assemblers'])}, and this GPU is {here}")
    if manifest["assemblers"][here] != _assembler(here):
        raise BundleError("it was made with another ptxas")


def _checked_file(folder: Path, entry: Entry, name: str) -> str:
    if not re.fullmatch(r"[A-Z2-7]+", entry.key) or not re.fullmatch(r"\w+\.(json|cubin)", name):
        raise BundleError(f"its {MANIFEST} is damaged")
    path = (folder / _ENTRIES / entry.key / name).resolve()
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{entry.key}/{name} is missing") from error
    if hashlib.sha256(contents).hexdigest() != entry.files[name]:
        raise BundleError(f"{entry.key}/{name} is damaged")
    return str(path)


def _copy(group: Mapping[str, str], architecture: str, bundle: Path) -> Entry:
    files = {name: Path(path) for name, path in group.items() if name.endswith(_KEPT)}
    (key,) = {path.parent.name for path in files.values()}
    target = bundle / _ENTRIES / key
    target.mkdir(parents=True)
    hashes = {}
    for name, path in sorted(files.items()):
        contents = path.read_bytes()
        (target / name).write_bytes(contents)
        hashes[name] = hashlib.sha256(contents).hexdigest()
    return Entry(key, architecture, hashes)


def _assembler(architecture: str) -> str:
    """ptxas as Triton names it for an architecture. It is part of every cache key."""
    return str(make_backend(GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)).hash())


def _source_hash() -> str:
    """sha256 over everything that kernels are made of: their sources, and what chooses their tiles."""
    root = Path(__file__).parents[1] / "kernels"
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _install() -> None:
    """Puts the bundles in front of whatever cache Triton uses."""
    behind = triton.knobs.cache.manager_class or FileCacheManager
    if not issubclass(behind, BundleCache):
        triton.knobs.cache.manager_class = type("BundleCache", (BundleCache,), {"behind": behind})


class BundleCache(CacheManager):
    """Triton's cache for one key: the bundle's files if a bundle has the key, otherwise the cache behind it."""

    behind: type[CacheManager] = FileCacheManager

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._arguments = (key, override, dump)
        self._files = {} if override or dump else _loaded.get(key, {})
        self._rest: CacheManager | None = None

    def _cache(self) -> CacheManager:
        """Made when it is needed: making it creates a folder, and a server's disk may be read-only."""
        if self._rest is None:
            self._rest = self.behind(*self._arguments)
        return self._rest

    def get_file(self, filename: str) -> str | None:
        """The path of one file, or None."""
        return self._files.get(filename) or self._cache().get_file(filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The paths of everything that belongs to a kernel's description `filename`, or None."""
        return dict(self._files) if filename in self._files else self._cache().get_group(filename)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """Stores one file in the cache behind; bundles are never written to."""
        return self._cache().put(data, filename, binary)

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        """Stores which files belong together, in the cache behind."""
        return self._cache().put_group(filename, group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache(), name)
