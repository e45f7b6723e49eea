"""The kernels that only move memory access 16 bytes at a time, wherever rows are multiples of that: read from their PTX.

The kernels of this process are interpreted, so another process compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Prints {name: {"ld": [bits, ...], "st": [bits, ...]}} of the launches whose names are given.
WIDTHS = r"""
import importlib, json, re, sys
from fastencoder.kernels import machine_code, stand_in

# "@%p1 ld.global.v4.b32 { ... }" -> ld, v4, 32
access = re.compile(r"^\s*(?:@%p\d+ )?(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", re.MULTILINE)
limits = machine_code.limits_of((9, 0))
found = {}
for operation in ("add_norm", "embed_norm", "pack", "padding"):
    module = importlib.import_module(f"fastencoder.kernels.{operation}.configurations")
    for name, launch in module.configurations(limits):
        if name in sys.argv[1:]:
            with stand_in.standing_in(limits.capability):
                ptx = stand_in.warm_up(launch).asm["ptx"]
            widths = found[name] = {"ld": set(), "st": set()}
            for kind, vector, bits in access.findall(ptx):
                widths[kind].add(int(vector or 1) * int(bits))
print(json.dumps({name: {kind: sorted(bits) for kind, bits in widths.items()} for name, widths in found.items()}))
"""

# Loads and stores, in bits: 128, and the ids or indices of a row; the marks of `read_mask` are written one by one.
EXPECTED = {
    "add_norm-bf16-384-few-residual-sum": ({128}, {128}),
    "add_norm-fp16-384-residual-sum": ({128}, {128}),
    "add_norm-fp16-760-residual-sum": ({128}, {128}),
    "add_norm-fp16-768-residual-sum": ({128}, {128}),
    "add_norm-fp32-768-residual-sum": ({128}, {128}),
    "add_norm-fp16-16384-residual-sum": ({128}, {128}),
    "add_norm-fp32-1024-few-parts4-residual-xbias-sum": ({128}, {128}),
    "embed_norm-fp16-384-types-positions-bias": ({64, 128}, {128}),
    "embed_norm-bf16-768-i32-types-positions-bias": ({32, 128}, {128}),
    "pack-bf16-72-i32": ({32, 128}, {128}),
    "pack-bf16-768-i64": ({64, 128}, {128}),
    "unpack-bf16-72-i32": ({32, 128}, {128}),
    "unpack-bf16-768-i64": ({64, 128}, {128}),
}
# One query against all others: the tile in vectors, the one row in what is left for a thread.
SQUARES = ("read_mask-bool-queries-vectors", "read_mask-bf16-queries-vectors", "read_mask-fp32-queries-vectors")


@pytest.fixture(scope="module")
def widths() -> dict[str, dict[str, list[int]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WIDTHS, *EXPECTED, *SQUARES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_move_in_vectors(widths, name):
    loads, stores = EXPECTED[name]
    assert (set(widths[name]["ld"]), set(widths[name]["st"])) == (loads, stores)


@pytest.mark.parametrize("name", SQUARES)
def test_squares_are_read_in_vectors(widths, name):
    assert max(widths[name]["ld"]) == 128
    assert len(widths[name]["ld"]) == 2
