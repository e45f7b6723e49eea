"""Whether what the package depends on has known vulnerabilities: `make audit`.

    python -m tools.audit            asks pip-audit about every version in requirements.lock

The lock pins all that the package needs at run time, on Linux, with a CPU build of torch, each file by its sha256
(`pip install --require-hashes -r requirements.lock`). `make lock` makes it anew.

Exit status: 0 every version was looked up, and none is known to be vulnerable; 1 one is; 2 the lock is not one; 3 nothing is
known: pip-audit is missing, the database cannot be reached, or it has not heard of a version.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
_PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!_-]+)")

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class LockError(ValueError):
    """The lock does not say exactly what is installed. The message is one line."""


def main() -> int:
    """Runs the command and gives its exit status."""
    try:
        pinned = read_lock(LOCK.read_text(encoding="utf-8"), required())
    except (OSError, LockError) as error:
        print(f"requirements.lock: {error}", file=sys.stderr)
        return 2
    return audit(pinned, _run)


def required() -> set[str]:
    """The names of the package's own dependencies, as the lock writes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {_normal(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in project["dependencies"]}  # type: ignore[index]


def read_lock(text: str, needed: set[str]) -> dict[str, str]:
    """Package -> version, of a lock.

    Raises:
        LockError: an entry has no exact version or no hash, one has an address, or a dependency is missing.
    """
    found = {}
    for entry in re.sub(r"\\\n", " ", text).splitlines():
        entry = entry.partition("#")[0].strip()
        if not entry:
            continue
        pinned = _PINNED.match(entry)
        if pinned is None or "://" in entry:
            raise LockError(f"'{entry[:60]}' is not a package with an exact version")
        if not _HASH.search(entry):
            raise LockError(f"{pinned[1]} has no sha256")
        found[_normal(pinned[1])] = pinned[2]
    if missing := needed - set(found):
        raise LockError(
            f"{', '.join(sorted(missing))}: required by pyproject.toml, and not there. `make lock` makes it anew"
        )
    return found


def audit(pinned: dict[str, str], run: Run) -> int:
    """Asks pip-audit about pinned versions, prints what it says, and gives the exit status of the command."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        # A local label ("+cpu") names a build; vulnerabilities are known by release.
        listed.write_text("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in pinned.items()))
        options = (
            "--no-deps",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "--format",
            "json",
            "--requirement",
            str(listed),
        )
        try:
            done = run([sys.executable, "-m", "pip_audit", *options])
        except OSError as error:
            return _nothing_known(str(error))
    try:
        answers = json.loads(done.stdout)["dependencies"]
        vulnerable = [(each["name"], each["version"], each["vulns"]) for each in answers if each.get("vulns")]
        answered = {_normal(each["name"]) for each in answers if "vulns" in each}
    except (ValueError, KeyError, TypeError):
        return _nothing_known((done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode}"])[-1])
    for name, version, problems in vulnerable:
        for problem in problems:
            print(f"{name} {version}: {problem['id']}, fixed in {', '.join(problem['fix_versions']) or 'no release'}")
    unknown = sorted(set(pinned) - answered)
    print(f"{len(answered)} of {len(pinned)} packages audited, {len(vulnerable)} vulnerable.")
    if vulnerable:
        return 1
    return _nothing_known(f"no answer about {', '.join(unknown)}") if unknown else 0


def _nothing_known(why: str) -> int:
    print(f"not audited: {why}", file=sys.stderr)
    return 3


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
