"""The examination of the kernels that needs no GPU: `make kernels`, or `python -m fastencoder.runtime.inspect_kernels`.

Every configuration that a kernel's heuristics can choose is compiled for every compute capability. It must compile, spill no
registers, fit the shared memory that there is, and multiply on the matrix units. `configurations.py` of each operation says
which configurations there are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table

from .. import kernels
from ..kernels import stand_in
from ..kernels._triton import DeviceLimits, Launch
from ..kernels.machine_code import Resources, limits_of, read_resources
from .accepted import ACCEPTED, Accepted
from .compiling import compile_tasks, progress

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """What the examination found out about one configuration."""

    operation: str
    name: str
    capability: str
    triton: str
    problems: tuple[str, ...]
    accepted: tuple[str, ...] = ()  # problems with the reason why they are left
    registers: int = 0
    spills: int = 0  # instructions
    shared_bytes: int = 0
    shared_limit: int = 0
    matrix_instructions: tuple[str, ...] = ()


def operations() -> list[str]:
    """The operations that have kernels."""
    found = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg]
    return [name for name in found if importlib.util.find_spec(f"{kernels.__name__}.{name}.triton_kernel")]


def configurations(operation: str, limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Every configuration of one operation's kernels on a device, by name."""
    module = importlib.import_module(f"{kernels.__name__}.{operation}.configurations")
    yield from module.configurations(limits)


def inspect(
    capabilities: Iterable[str], chosen: Iterable[str], only: str = "", jobs: int | None = None
) -> list[Finding]:
    """Compiles every configuration of the chosen operations whose name contains `only`, for every capability."""
    triton.knobs.compilation.disable_line_info = True  # the same machine code, an eighth sooner
    wanted: list[tuple[str, str, str, str]] = []  # operation, name, capability, key
    tasks: dict[str, tuple[Launch, DeviceLimits]] = {}  # by key: configurations may share a kernel
    for capability in capabilities:
        major, minor = capability.split(".")
        limits = limits_of((int(major), int(minor)))
        with stand_in.standing_in(limits.capability):
            for operation in chosen:
                for name, launch in configurations(operation, limits):
                    if only in name:
                        key = stand_in.cache_key(launch)
                        tasks.setdefault(key, (launch, limits))
                        wanted.append((operation, name, capability, key))
    keys = list(tasks)
    results: dict[str, Resources | Exception] = {}
    with progress() as bar:
        step = bar.add_task(f"triton {triton.__version__}", total=len(tasks))
        for position, result in compile_tasks(list(tasks.values()), _look, jobs):
            results[keys[position]] = result
            bar.advance(step)
    return [_finding(operation, name, capability, results[key]) for operation, name, capability, key in wanted]


def _look(compiled: Any, launch: Launch, limits: DeviceLimits) -> Resources:
    return read_resources(launch.kernel.__name__, compiled, launch, limits)


def _finding(operation: str, name: str, capability: str, result: Resources | Exception) -> Finding:
    if isinstance(result, Exception):
        first_line = str(result).strip().splitlines()[0]
        return _judged(Finding(operation, name, capability, triton.__version__, (f"does not compile: {first_line}",)))
    return _judged(
        Finding(
            operation,
            name,
            capability,
            triton.__version__,
            tuple(result.problems),
            registers=result.registers,
            spills=result.spill_stores + result.spill_loads,
            shared_bytes=result.shared_bytes,
            shared_limit=result.shared_limit,
            matrix_instructions=tuple(sorted(result.matrix_instructions)),
        )
    )


def _judged(finding: Finding) -> Finding:
    """With the accepted problems set apart."""
    accepted, problems = [], []
    for problem in finding.problems:
        reason = next((known.reason for known in ACCEPTED if known.covers(finding, problem)), None)
        if reason is None:
            problems.append(problem)
        else:
            accepted.append(f"{problem}: {reason}")
    return Finding(**{**vars(finding), "problems": tuple(problems), "accepted": tuple(accepted)})


def table(findings: list[Finding]) -> Table:
    """One row for each operation, release of Triton, and capability."""
    out = Table(title="Kernels, compiled without a GPU", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("operation", "triton", "capability"):
        out.add_column(heading, no_wrap=True)
    for heading in ("config\nurations", "most\nregisters", "most shared\nKiB, of", "spills"):
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("matrix\ninstructions", no_wrap=True)
    out.add_column("problems", justify="right")
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.operation, finding.triton, finding.capability), []).append(finding)
    ordered = sorted(groups, key=lambda group: (group[0], group[1], float(group[2])))
    previous: tuple[str, str] | None = None
    for group in ordered:
        operation, release, capability = group
        rows = groups[group]
        if previous is not None and (operation, release) != previous:
            out.add_section()
        repeated = (operation, release) == previous
        previous = (operation, release)
        problems = sum(bool(row.problems) for row in rows)
        accepted = sum(bool(row.accepted) for row in rows)
        out.add_row(
            "" if repeated else operation,
            "" if repeated else release,
            capability,
            str(len(rows)),
            str(max(row.registers for row in rows)),
            f"{max(row.shared_bytes for row in rows) / 1024:.0f} of {max(row.shared_limit for row in rows) // 1024}",
            str(sum(row.spills for row in rows)),
            " ".join(sorted({name for row in rows for name in row.matrix_instructions})) or "-",
            (f"[red]{problems}[/]" if problems else "0") + (f" ({accepted} accepted)" if accepted else ""),
        )
    return out


def unused(findings: list[Finding]) -> list[str]:
    """Entries of `ACCEPTED` about kernels that were examined, and that cover nothing any more."""
    return [known.name for known in ACCEPTED if any(map(known.concerns, findings)) and not _covers_any(known, findings)]


def _covers_any(known: Accepted, findings: list[Finding]) -> bool:
    said = ((finding, text.removesuffix(f": {known.reason}")) for finding in findings for text in finding.accepted)
    return any(known.covers(finding, problem) for finding, problem in said)


def with_other_triton(folder: Path, arguments: list[str]) -> list[Finding]:
    """The same examination in a process of its own that finds another release of Triton in `folder`."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "fastencoder.runtime.inspect_kernels", *arguments, "--quiet", "--json", file.name]
        subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        return [_from_json(row) for row in json.loads(Path(file.name).read_text())]


def _from_json(row: dict[str, Any]) -> Finding:
    return Finding(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})


def main() -> int:
    """Prints one table and every problem; 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("capabilities", nargs="*", default=CAPABILITIES, help="compute capabilities, e.g. 8.0 9.0")
    parser.add_argument("--operation", action="append", choices=operations(), help="only this one; may be repeated")
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations whose name contains this")
    parser.add_argument("--jobs", type=int, help="processes; otherwise one for each core")
    parser.add_argument("--also", type=Path, metavar="DIR", help="a folder with another release of Triton (pip --target)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every finding there")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    options = parser.parse_args()
    out = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    start = time.monotonic()
    findings = inspect(options.capabilities, options.operation or operations(), options.only, options.jobs)
    if options.also:
        arguments = [*options.capabilities, "--only", options.only, *(["--jobs", str(options.jobs)] if options.jobs else [])]
        arguments += [f"--operation={name}" for name in options.operation or ()]
        findings += with_other_triton(options.also, arguments)
    if options.json:
        options.json.write_text(json.dumps([vars(finding) for finding in findings], indent=1) + "\n")
    wrong = [finding for finding in findings if finding.problems]
    stale = [] if options.only or options.operation or options.quiet else unused(findings)
    if not options.quiet:
        out.print(table(findings))
        for finding in wrong:
            what = f"{finding.name}, {finding.capability}, triton {finding.triton}: {'; '.join(finding.problems)}"
            out.print(what, style="red", highlight=False, markup=False, soft_wrap=True)
        for name in stale:
            out.print(f"ACCEPTED has an entry for {name} that is not needed any more", style="red", highlight=False)
        out.print(f"{len(findings)} kernels in {time.monotonic() - start:.0f} s, {len(wrong)} with a problem", highlight=False)
    return int(bool(wrong or stale or not findings))


if __name__ == "__main__":
    raise SystemExit(main())
