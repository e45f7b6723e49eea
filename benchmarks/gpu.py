"""The whole examination on a CUDA device, with nothing to install: `make gpu`, or `python benchmarks/gpu.py`.

    kernels     every operation, compiled, in fp16, bf16 and fp32, against float64; the kernel tests where pytest is
    parity      whole models in fp32, fp16 and bf16; CUDA graphs; torch.compile
    speed       the grid of batch, length and padding, against stock and what else needs no compiler
    launches    kernel launches a layer and host synchronisations a forward
    rates       each kernel at real shapes: time, rate, fraction of what the device reaches
    dispatch    vendor GEMM against Triton, and attention's two paths, for the tables in the heuristics
    compile     the same cells against torch.compile in three modes

Each part runs in processes of its own, so that a kernel that takes the device down ends only a row. Every row is in
gpu.jsonl as soon as it is known: a run killed at any moment goes on where it ended, as long as machine and code are the
same. Exit status: 0 all right, 1 a wrong answer, or something is not finished, 2 no CUDA device. Slowness is no failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from rich.console import Console

    from benchmarks import gpu_report
    from benchmarks.files import RESULTS, output_folder
    from benchmarks.gpu_processes import NO_DEVICE, prepare, run_part
    from benchmarks.store import Store
except ModuleNotFoundError as missing:
    print(f"{sys.executable} has no {missing.name}: this needs torch, transformers, rich and matplotlib", file=sys.stderr)
    raise SystemExit(2) from None

# In the order in which they run, with the share of the time that each may take; what one leaves goes to those after it.
PARTS = {"kernels": 24, "parity": 14, "speed": 26, "launches": 3, "rates": 6, "dispatch": 10, "compile": 17}
REPORT = "report"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        from benchmarks.gpu_worker import work

        return work(options)
    console = Console()
    out = output_folder(options.out)
    journal = out / "gpu.jsonl"
    if not journal.exists() and (RESULTS / journal.name).exists() and not options.quick:
        journal.write_bytes((RESULTS / journal.name).read_bytes())  # brought along from an earlier machine
    names = tuple(PARTS) if options.part == "all" else (options.part,)
    if options.part != REPORT:
        if prepare(options, out) == NO_DEVICE:
            return NO_DEVICE
        ends = time.time() + 60 * options.minutes
        for index, name in enumerate(names):
            left = max(ends - time.time(), 0.0)
            deadline = time.time() + left * PARTS[name] / sum(PARTS[later] for later in names[index:])
            run_part(options, name, out, deadline, console)
            Store(journal).write(out / "gpu.json")
    return finish(out, console, names)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", *PARTS, REPORT), default="all", help="which part goes on; report: none")
    parser.add_argument("--minutes", type=float, default=8.75, help="for everything; what is left is said to be (8.75)")
    parser.add_argument("--fresh", action="store_true", help="keep nothing that an earlier run found for these parts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program, no more")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rows: a dry run")
    parser.add_argument("--out", type=Path, help="folder for the results (default: $OUT, else benchmarks/results)")
    # A process of one part: which, of how many, and when it ends.
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def finish(out: Path, console: Console, names: tuple[str, ...]) -> int:
    """Write the report and the plots, say what failed."""
    data = Store(out / "gpu.jsonl").data
    if not data:
        console.print("no part left any result", style="red")
        return 1
    written = gpu_report.write(data, out)
    console.rule("result")
    for line in gpu_report.closing(data):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    wrong = gpu_report.failures(data)
    wrong += [f"{name}: nothing was run" for name in names if name != REPORT and name not in data["parts"]]
    for line in wrong:
        console.print(f"FAILED {line}", markup=False, style="red", soft_wrap=True)
    console.print("written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
