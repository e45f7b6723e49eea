"""Checks and first timings on a CUDA device, with nothing to install: `make gpu`, or `python benchmarks/gpu.py`.

Three parts, each in a process of its own, so that a kernel that takes the device down ends only its part: "kernels" (every
operation against float64), "parity" (whole models in fp32, fp16 and bf16), "speed" (against stock sdpa and torch.compile).
Results are in gpu.json after every row; a run goes on where the last one ended, as long as machine and code are the same.
Exit status: 0 all right, 1 something failed or is not finished, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from rich.console import Console

    from benchmarks import gpu_report
    from benchmarks.files import output_folder, read_json
except ModuleNotFoundError as missing:
    print(f"{sys.executable} has no {missing.name}: this needs torch, transformers, rich and matplotlib", file=sys.stderr)
    raise SystemExit(2) from None

PARTS = ("kernels", "parity", "speed")
SHARE = {"kernels": 0.35, "parity": 0.2, "speed": 0.45}  # of the time; what a part leaves goes to the next
ATTEMPTS = 3  # processes for one part: each goes on behind the row that ended the one before
NO_DEVICE, DEVICE_LOST = 2, 3
GRACE = 90.0  # seconds that the last row of a part may take


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.deadline is not None:
        return run_part(options)
    console = Console()
    names = PARTS if options.part == "all" else (options.part,)
    ends = time.time() + 60 * options.minutes
    for index, name in enumerate(names):
        left = max(ends - time.time(), 0.0)
        deadline = time.time() + left * SHARE[name] / sum(SHARE[later] for later in names[index:])
        status = attempts(options, name, deadline, console)
        if status == NO_DEVICE:
            return NO_DEVICE
    return finish(options, console, names)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", *PARTS), default="all", help="one part is done anew; all go on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program, no more")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rows: a dry run")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an earlier run")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; rows that are left are said to be")
    parser.add_argument("--out", type=Path, help="folder for the results (default: $OUT, else benchmarks/results)")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # of the process of one part
    return parser.parse_args(arguments)


def attempts(options: argparse.Namespace, name: str, deadline: float, console: Console) -> int:
    """Run a part in new processes until one comes to its end. Returns the last one's exit status."""
    fresh, status = options.fresh or options.part != "all", 1
    for _ in range(ATTEMPTS):
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--device", options.device]
        command += ["--deadline", str(deadline), "--out", str(output_folder(options.out)), *["--quick"] * options.quick]
        command += ["--fresh"] * fresh
        fresh = False
        environment = {**os.environ, "COLUMNS": str(console.width)}
        try:
            status = subprocess.run(command, timeout=deadline + GRACE - time.time(), env=environment).returncode
        except subprocess.TimeoutExpired:
            console.print(f"{name}: a row did not end within {GRACE:.0f} s of its time; stopped", style="red")
            return 1
        if status in (0, 1, NO_DEVICE):
            return status
        console.print(f"{name}: the process ended with status {status}; going on in a new one", style="red")
    return status


def run_part(options: argparse.Namespace) -> int:
    """The process of one part."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        print(f"benchmarks/gpu.py: {why}; nothing was run. A dry run without one: --device cpu --quick", file=sys.stderr)
        return NO_DEVICE

    from benchmarks.common import environment
    from benchmarks.store import Store, run_rows

    torch.backends.cudnn.allow_tf32 = False  # float32 is a reference here, also in convolutions
    torch.set_grad_enabled(False)
    device = torch.device(options.device)
    console = Console()
    console.rule(options.part)
    store = Store(output_folder(options.out) / "gpu.json", environment(device), options.quick)
    if options.fresh:
        store.data["parts"].pop(options.part, None)
    # Only what the part needs: transformers and the compiler take seconds to import.
    if options.part == "kernels":
        from benchmarks import gpu_kernels

        rows = gpu_kernels.rows(device, options.quick)
    elif options.part == "parity":
        from benchmarks import gpu_parity

        rows = gpu_parity.rows(device, options.quick)
    else:
        from benchmarks import gpu_speed

        rows = gpu_speed.rows(device, options.quick, store, options.deadline)
    if not run_rows(store, options.part, rows, console, options.deadline):
        return DEVICE_LOST
    results = store.part(options.part)["rows"]
    console.print(f"{options.part}: {sum(found['passed'] for found in results.values())} of {len(rows)} rows passed")
    return 0 if all(found["passed"] for found in results.values()) else 1


def finish(options: argparse.Namespace, console: Console, names: tuple[str, ...]) -> int:
    """Write the report and the plots, say what failed."""
    out = output_folder(options.out)
    data = read_json(out / "gpu.json")
    if data is None:
        console.print("no part left any result", style="red")
        return 1
    text = gpu_report.markdown(data)
    (out / "gpu.md").write_text(text, encoding="utf-8")
    written = [out / "gpu.json", out / "gpu.md"]
    try:
        written += gpu_report.plots(data, out)
    except ImportError as error:
        console.print(f"no plots: {error}", markup=False)
    console.rule("result")
    for row, found in data["parts"].get("speed", {}).get("rows", {}).items():
        for system, result in found.get("systems", {}).items():
            if result.get("status") == "timed" and system != "stock sdpa":
                share = "" if result["of_matmul"] is None else f", {result['of_matmul']:.0%} of matmul"
                ratio, ms = result["ratio_to_stock"]["median"], result["ms"]["median"]
                console.print(f"{row} {system}: {ratio:.2f}x, {ms:.3f} ms{share}", markup=False, highlight=False)
    wrong = gpu_report.failures(data)
    wrong += [f"{name}: nothing was run" for name in names if name not in data["parts"]]
    for line in wrong:
        console.print(f"FAILED {line}", markup=False, style="red", soft_wrap=True)
    console.print("written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
