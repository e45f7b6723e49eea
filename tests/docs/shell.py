"""Lines of shell blocks. `fastencoder ...` runs, in this process; of every other command is checked that what it names
exists.

A command that is not known here is an error: add how it is checked.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import typer
from typer.testing import CliRunner

from fastencoder.cli import app

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# Commands that stand for themselves: they are only shown to be typed somewhere else.
_ELSEWHERE = {"apt", "curl"}


def logical_lines(source: str) -> Iterator[str]:
    """The commands of a block: comments and empty lines left out, continued lines joined."""
    for line in source.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def _parts(line: str) -> tuple[dict[str, str], list[str], str | None]:
    """(environment, words, the file that the output goes to) of a command."""
    words = shlex.split(line, comments=True)
    environment = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    into = words[-1] if ">" in words[-2:-1] else None
    return environment, words[:-2] if into else words, into


def check_line(line: str) -> None:
    """Raises ValueError if a command names something that is not there."""
    environment, (command, *rest), _ = _parts(line)
    if unknown := [name for name in environment if name not in _sources()]:
        raise ValueError(f"{line}: nothing reads {unknown}")
    known = {"make": _check_make, "pip": _check_pip, "python": _check_python, "fastencoder": _check_fastencoder}
    if command in known:
        known[command](line, rest)
    elif command not in _ELSEWHERE:
        raise ValueError(f"{line}: nobody has said how '{command}' is checked")


def run_line(line: str) -> None:
    """Runs a `fastencoder` command in the current folder, and demands exit status 0 or 1 ("the answer is no")."""
    environment, (command, *rest), into = _parts(line)
    if command != "fastencoder":
        return
    with mock.patch.dict(os.environ, environment):
        result = CliRunner().invoke(app, rest)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code not in (0, 1) or not result.stdout.strip():
        raise ValueError(f"{line}: exit status {result.exit_code}: {result.output}")
    if into:
        Path(into).write_text(result.stdout, encoding="utf-8")


def _check_make(line: str, rest: list[str]) -> None:
    """Targets and variables are those of the Makefile; `NAME_ARGS` have options that some program here takes."""
    for word in rest:
        name, given, value = word.partition("=")
        if not given and not re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE):
            raise ValueError(f"{line}: the Makefile has no target {name}")
        if given and not re.search(rf"^{re.escape(name)} \?=", MAKEFILE, re.MULTILINE):
            raise ValueError(f"{line}: the Makefile has no variable {name}")
        if given and name not in ("PYTEST_ARGS", "VENV_ARGS"):  # those are options of pytest and of venv
            _check_options(line, shlex.split(value))


def _check_pip(line: str, rest: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    action, *what = rest
    names = {name for target in what for group in re.findall(r"\[(.*)\]", target) for name in group.split(",")}
    if action != "install" or names - set(extras):
        raise ValueError(f"{line}: pyproject.toml has no extra {names - set(extras)}")


def _check_python(line: str, rest: list[str]) -> None:
    """`python -m module` and `python file.py` exist, and so do their options. `serve.py` is the reader's own program."""
    target, options = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    if rest[0] == "-m":
        found = importlib.util.find_spec(target) is not None
    else:
        found = (ROOT / target).is_file() or target == "serve.py"
    if not found:
        raise ValueError(f"{line}: there is no {target}")
    _check_options(line, options)


def _check_options(line: str, words: list[str]) -> None:
    for word in words:
        if word.startswith("--") and not any(word in text for text in _sources().values()):
            raise ValueError(f"{line}: no program here has the option {word}")


def _check_fastencoder(line: str, rest: list[str]) -> None:
    """Also of a line that is not run: the command and its options exist, and their number is right."""
    group = typer.main.get_command(app)
    context = group.make_context("fastencoder", rest[:1], resilient_parsing=True)
    command = group.get_command(context, rest[0]) if rest and not rest[0].startswith("-") else group  # type: ignore[attr-defined]
    if command is None:
        raise ValueError(f"{line}: there is no such command")
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    if wrong := {word for word in rest if word.startswith("--")} - options:
        raise ValueError(f"{line}: there is no option {wrong}")


class _Sources(dict):
    """The words of every program here by file: string constants, and parameters as the options that typer makes of them."""

    def __init__(self) -> None:
        super().__init__()
        for folder in ("fastencoder", "benchmarks", "examples", "tools"):
            for path in (ROOT / folder).rglob("*.py"):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                options = ["--" + n.arg.replace("_", "-") for n in ast.walk(tree) if isinstance(n, ast.arg)]
                self[str(path)] = "\n".join([*strings, *options])

    def __contains__(self, name: object) -> bool:
        return any(str(name) in text for text in self.values())


_made: list[_Sources] = []


def _sources() -> _Sources:
    if not _made:
        _made.append(_Sources())
    return _made[0]
