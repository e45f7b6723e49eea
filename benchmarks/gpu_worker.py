"""What runs in a process of one part: its share of the rows. Imports only what the part needs, and that late."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time

from benchmarks.files import output_folder
from benchmarks.gpu_processes import DEVICE_LOST, NO_DEVICE, PREPARE
from benchmarks.store import Row, Store, run_rows, share_out


def work(options: argparse.Namespace) -> int:
    """Run the share `options.index` of `options.count` of part `options.worker`. Returns the exit status."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        print(f"benchmarks/gpu.py: {why}; nothing was run. A dry run without one: --device cpu --quick", file=sys.stderr)
        return NO_DEVICE
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    journal = output_folder(options.out) / "gpu.jsonl"
    if options.worker == PREPARE:
        from benchmarks.common import environment

        Store.begin(journal, environment(device), options.quick)
        return 0

    torch.backends.cudnn.allow_tf32 = False  # float32 is a reference here, also in convolutions
    torch.set_grad_enabled(False)
    store = Store(journal)
    module = importlib.import_module(f"benchmarks.gpu_{options.worker}")
    rows = module.rows(device, options.quick, options.deadline)
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise AssertionError(f"two rows of {options.worker} share one name")
    if options.index == 0 and not options.warm:
        store.append({"part": options.worker, "expected": names})
    mine = share_out(rows, options.index, options.count)
    if options.warm:
        _warm(mine, options.deadline)
        return 0
    parent = os.getppid()

    def over() -> bool:
        return time.time() > options.deadline or os.getppid() != parent  # nobody waits for this any more

    good = run_rows(store, options.worker, mine, over, _settle, _device_answers)
    return 0 if good else DEVICE_LOST


def _warm(rows: list[Row], deadline: float) -> None:
    """Compile what the rows will time. An error shows again, and is written down, when they do."""
    for row in rows:
        if row.warm is not None and time.time() < deadline:
            with contextlib.suppress(Exception):
                row.warm()


def _settle() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_answers() -> bool:
    """False after an illegal memory access and the like, from which a process does not recover."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return int(torch.ones(3, device="cuda").sum()) == 3
    except Exception:
        return False
