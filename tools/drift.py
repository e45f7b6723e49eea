"""What the newest releases of transformers, torch and triton change: `make drift`, made to run on a schedule.

    python -m tools.drift            makes .venv-drift with the newest versions that install (of torch a CPU build), and
                                     examines them there
    python -m tools.drift --here     examines the versions of this interpreter

Three things are printed: which versions are newer than those that were tested, which layer classes have another source than
the recorded ones, and which rows of the conformance suite fail.

Exit status: 0 all rows pass (a class whose source changed is found at its first call, so that alone is no failure); 1 a row
fails, or none ran; 2 the environment could not be made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastencoder import registry, versions
from fastencoder.fingerprints import __main__ as fingerprints
from fastencoder.fingerprints.normalised import FOLLOWED
from fastencoder.fingerprints.record import FILE, load

ROOT = Path(__file__).parents[1]
SUITE = ("tests/conformance/test_conformance.py", "tests/conformance/test_registry_complete.py")
# What has to be newest; the rest is what the tests need.
PACKAGES = ("transformers", "triton")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.drift", description=__doc__.split("\n")[0])
    parser.add_argument("--here", action="store_true", help="examine this interpreter's versions; install nothing")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-drift", help="where the environment is made")
    parser.add_argument("--torch", help="requirement to install first; default: the newest CPU build that pip finds")
    parser.add_argument("--only", default="", help="of the conformance suite what pytest's -k selects")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest")
    options = parser.parse_args(arguments)
    if options.here:
        return examine(options.only, options.workers)
    try:
        python = environment(options.venv, options.torch)
    except subprocess.CalledProcessError as error:
        print(
            f"the environment could not be made: {' '.join(map(str, error.cmd))} ended with {error.returncode}",
            file=sys.stderr,
        )
        return 2
    command = [python, "-m", "tools.drift", "--here", "--only", options.only, "--workers", str(options.workers)]
    return subprocess.run(command, cwd=ROOT).returncode


def environment(folder: Path, torch: str | None) -> Path:
    """An interpreter with the newest versions, made or brought up to date; torch comes first, so that nothing else chooses it.

    Raises:
        subprocess.CalledProcessError: pip has failed, and has said why.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    wanted = torch or newest_torch(python)
    print(f"installing {wanted}, and the newest {' and '.join(PACKAGES)}", flush=True)
    subprocess.run([*pip, wanted], check=True)
    subprocess.run([*pip, *PACKAGES, "--editable", f"{ROOT}[test]", wanted], check=True)
    # It asks for torchvision, which would bring another torch.
    subprocess.run([*pip, "--no-deps", "timm"], check=True)
    return python


def newest_torch(python: Path) -> str:
    """A requirement for the newest CPU build of torch that pip finds; where it finds none, for the newest release."""
    done = subprocess.run(
        [python, "-m", "pip", "index", "versions", "torch"], check=True, capture_output=True, text=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("Available versions:"))
    return choose_torch([version.strip() for version in line.partition(":")[2].split(",")])


def choose_torch(available: Sequence[str]) -> str:
    """The requirement for the highest of some versions: of the CPU builds, if there are any. Others bring gigabytes."""
    builds = [version for version in available if version.endswith("+cpu")] or list(available)
    newest = max(
        builds, key=lambda version: [int(part) for part in version.partition("+")[0].split(".") if part.isdigit()]
    )
    return f"torch=={newest}"


def examine(only: str, workers: int) -> int:
    """Prints what differs between the installed versions and the tested ones, and gives the exit status."""
    out = Console() if sys.stdout.isatty() else Console(width=120)
    out.print(*_version_lines(), sep="\n", highlight=False)
    changed = list(_changed_classes())
    fingerprints.show(versions.installed("transformers") or "none", changed, _count_installed())
    ran, failed = conformance(only, workers)
    if failed:
        table = Table(title="rows of the conformance suite that fail", title_justify="left")
        table.add_column("row", overflow="fold")
        table.add_column("why", overflow="fold")
        for name, why in failed:
            table.add_row(escape(name), escape(why))
        out.print(table)
    out.print(f"conformance: {ran} rows ran, {len(failed)} failed.", highlight=False)
    if not ran:
        out.print("No row ran, so nothing is known.", highlight=False)
    return int(bool(failed) or not ran)


def _version_lines() -> Iterator[str]:
    for package, (oldest, newest) in versions.TESTED.items():
        tested = f"tested with {versions.dotted(oldest)} to {versions.dotted(newest)}"
        yield f"{package} {versions.installed(package) or 'is not installed'} ({tested})"
    yield from (f"untested: {line}" for line in versions.untested())


def _names() -> set[str]:
    return {entry.layer_class for entry in registry.entries() if entry.layer_class.startswith(FOLLOWED)}


def _changed_classes() -> Iterator[fingerprints.Difference]:
    record, version = load(FILE), versions.installed("transformers") or ""
    yield from fingerprints.compare(record, version, fingerprints.installed(_names()), _names())
    yield from fingerprints.unregistered(record, _names())


def _count_installed() -> int:
    return len(fingerprints.installed(_names()))


def conformance(only: str, workers: int) -> tuple[int, list[tuple[str, str]]]:
    """How many rows of the conformance suite ran in this interpreter, and those that failed, each with its reason."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rN", "--tb=short", "--no-header", f"--junitxml={results}"]
        command += ["-n", str(workers), "--dist", "worksteal", *SUITE, *(["-k", only] if only else [])]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.DEVNULL)
        return read_results(results)


def read_results(path: Path) -> tuple[int, list[tuple[str, str]]]:
    """The same, from a JUnit file; nothing ran where there is none."""
    if not path.is_file():
        return 0, []
    ran, failed = 0, []
    for case in ET.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        ran += 1
        wrong = next((found for found in (case.find("failure"), case.find("error")) if found is not None), None)
        if wrong is not None:
            said = (wrong.get("message") or wrong.text or "").strip().splitlines()
            failed.append((f"{case.get('classname')}::{case.get('name')}", said[0][:300] if said else "no message"))
    return ran, failed


if __name__ == "__main__":
    sys.exit(main())
