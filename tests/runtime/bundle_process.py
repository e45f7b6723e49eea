"""What test_bundle.py runs in processes of its own, where the kernels are compiled and not interpreted.

Usage: python bundle_process.py FUNCTION ARGUMENTS_AS_JSON. Prints the function's result as JSON on the last line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from rich.console import Console

from fastencoder.cli import load_model
from fastencoder.kernels import stand_in
from fastencoder.kernels._triton import Launch
from fastencoder.runtime import bundle, compile_command
from fastencoder.runtime.dry_run import Bounds, Shape, dry_run

ARCHITECTURES = compile_command.ARCHITECTURES


def model_of(folder: str) -> torch.nn.Module:
    return load_model(folder)[0].to(torch.bfloat16)


def random_shapes(bounds: Bounds, count: int, seed: int) -> list[Shape]:
    """Batches of all sizes, small ones as often as large ones."""
    generator = random.Random(seed)
    shapes = []
    for _ in range(count):
        longest = min(bounds.max_seqlen, int(2 ** generator.uniform(0, bounds.max_seqlen.bit_length())))
        tokens = max(longest, min(bounds.max_tokens, int(2 ** generator.uniform(0, bounds.max_tokens.bit_length()))))
        sequences = generator.randint(-(-tokens // longest), tokens - longest + 1)
        shapes.append(Shape(tokens, sequences, longest))
    return shapes


def requested_and_asked(folder: str, max_tokens: int, max_seqlen: int, count: int) -> dict[str, tuple[list[str], list[str]]]:
    """By architecture: the cache keys that a bundle would hold, and those that batches of random shapes ask for."""
    bounds, model = Bounds(max_tokens, max_seqlen), model_of(folder)
    settings = compile_command.Settings(folder, ("sm_80", "sm_90"), "bf16", Path("unused"), bounds)
    requested = compile_command.requested(model, settings, Console(quiet=True))
    shapes = random_shapes(bounds, count, seed=0)
    return {name: (_keys(name, launches), asked_for(model, name, shapes)) for name, launches in requested.items()}


def asked_for(model: torch.nn.Module, architecture: str, shapes: list[Shape]) -> list[str]:
    """The cache keys that batches of these shapes ask for, on every GPU of an architecture."""
    found: set[str] = set()
    for limits in ARCHITECTURES[architecture]:
        found |= set(_keys(architecture, dry_run(model, limits, shapes)))
    return sorted(found)


def _keys(architecture: str, launches: list[Launch]) -> list[str]:
    with stand_in.standing_in(ARCHITECTURES[architecture][0].capability):
        return sorted({stand_in.cache_key(launch) for launch in launches})


def keys_of_every_shape(folder: str, architecture: str, max_tokens: int, max_seqlen: int) -> list[str]:
    """The cache keys of every batch that there is, one by one: only for a few tokens."""
    shapes = [
        Shape(tokens, sequences, longest)
        for tokens in range(1, max_tokens + 1)
        for longest in range(1, min(tokens, max_seqlen) + 1)
        for sequences in {-(-tokens // longest), tokens - longest + 1}
    ]
    return asked_for(model_of(folder), architecture, shapes)


def warm_up_with(bundle_folder: str | None, folder: str, architecture: str, max_tokens: int, max_seqlen: int) -> dict:
    """What happens to Triton's cache when batches are launched: how many kernels are found, and how many compiled."""
    hits, compiled = 0, 0

    def listen(*, cache_hit: bool, **rest: object) -> None:
        nonlocal hits, compiled
        hits, compiled = hits + cache_hit, compiled + (not cache_hit)

    triton.knobs.compilation.listener = listen
    limits = ARCHITECTURES[architecture][0]
    launches = dry_run(model_of(folder), limits, random_shapes(Bounds(max_tokens, max_seqlen), 40, seed=1))
    with stand_in.standing_in(limits.capability):
        keys = {stand_in.cache_key(launch) for launch in launches}
        loaded = bundle_folder is not None and bundle.load_bundle(bundle_folder)
        for launch in launches if loaded else launches[:1]:
            kernel = stand_in.warm_up(launch)
            assert kernel.asm["cubin"] and kernel.metadata.target.arch == 10 * limits.capability[0]
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    return {
        "loaded": loaded,
        "keys": len(keys),
        "hits": hits,
        "compiled": compiled,
        "written": sorted(path.name for path in cache.iterdir()) if cache.exists() else [],
    }


def _edit(folder: Path, **changes: object) -> None:
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cubin(folder: Path) -> Path:
    return sorted(folder.glob("kernels/*/*.cubin"))[0]


def _rename_first(folder: Path, name: str) -> None:
    kernels = json.loads((folder / bundle.MANIFEST).read_text())["kernels"]
    kernels[0]["files"] = {name: "0" * 64}
    _edit(folder, kernels=kernels)


DAMAGE = {
    "fastencoder": lambda folder: _edit(folder, fastencoder="0.0.1"),
    "triton": lambda folder: _edit(folder, triton="3.5.0"),
    "another build": lambda folder: _edit(folder, compiler="0" * 64),
    "other TRITON_": lambda folder: _edit(folder, settings={"DISABLE_PTXAS_OPT": "true"}),
    "other kernel sources": lambda folder: _edit(folder, sources="0" * 64),
    "another ptxas": lambda folder: _edit(folder, assemblers={"sm_90": "ptxas 1.0"}),
    "this GPU is sm_90": lambda folder: _edit(folder, assemblers={"sm_75": "ptxas"}),
    "not of format": lambda folder: _edit(folder, format=99),
    "no manifest.json": lambda folder: (folder / bundle.MANIFEST).unlink(),
    "cannot be read": lambda folder: os.truncate(folder / bundle.MANIFEST, 500),
    "manifest.json is damaged": lambda folder: _edit(folder, kernels=[{"key": "A"}]),
    "is damaged": lambda folder: os.truncate(_cubin(folder), _cubin(folder).stat().st_size - 1),
    ".cubin is damaged": lambda folder: _cubin(folder).write_bytes(_cubin(folder).read_bytes()[:-1] + b"?"),
    ".cubin is missing": lambda folder: _cubin(folder).unlink(),
    f"its {bundle.MANIFEST} is damaged": lambda folder: _rename_first(folder, "../../../outside.json"),
}


def load_damaged(bundle_folder: str, scratch: str) -> dict[str, dict]:
    """For each kind of damage: whether the bundle was loaded, the warnings, and whether Triton was left alone."""
    outcome = {}
    for expected, damage in DAMAGE.items():
        copy = Path(scratch) / "copy"
        shutil.copytree(bundle_folder, copy)
        damage(copy)
        with stand_in.standing_in((9, 0)), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = bundle.load_bundle(copy)
        outcome[expected] = {
            "loaded": loaded,
            "warnings": [str(warning.message) for warning in caught],
            "untouched": triton.knobs.cache.manager_class is None and not bundle._loaded,
        }
        shutil.rmtree(copy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = bundle.load_bundle(bundle_folder)  # nobody stands in for a GPU
    if not torch.cuda.is_available():
        outcome["finds no GPU"] = {"loaded": loaded, "warnings": [str(w.message) for w in caught], "untouched": True}
    return outcome


def launch_twice(named: str) -> dict:
    """What two launches say when FASTENCODER_BUNDLE is `named`."""
    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple) -> Callable:
            return lambda **options: launched.append(grid)

    os.environ["FASTENCODER_BUNDLE"] = named
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            Launch(Kernel(), (1,), {}, {}, 4, 1).run(torch.device("cpu"))
    return {"launched": len(launched), "warnings": [str(warning.message) for warning in caught]}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
