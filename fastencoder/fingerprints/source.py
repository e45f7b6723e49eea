"""One file of Python source, as a table: what each of its names is defined by.

Read from disk, so that nothing has to be imported for it.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

COMPOUND = (ast.If, ast.Try, ast.With, ast.For, ast.While)


@dataclass(frozen=True, eq=False)
class SourceFile:
    """A module's source.

    Args:
        name: the module's dotted name.
        path: of the file.
        definitions: the statements that bind each name of the module, in order. A name that is bound inside an `if` or a
            `try` of the module is defined by the whole of it.
        imports: what each imported name stands for, as a dotted name.
        loose: statements that may change what was defined before: calls, assignments to attributes, loops.
        import_statements: all of them. Code compiles to other instructions without those of its file.
    """

    name: str
    path: Path
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    loose: list[ast.stmt] = field(default_factory=list)
    import_statements: list[ast.stmt] = field(default_factory=list)


class Unreadable(Exception):
    """There is no source that says what a class is."""


def read(module: str) -> SourceFile:
    """The source of a module that is imported, or of a file of transformers.

    Raises:
        Unreadable: there is no such file, or its names cannot be known.
    """
    path = _path(module)
    if path is None or path.suffix != ".py":
        raise Unreadable(f"the source of {module} is not there")
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise Unreadable(f"the source of {module} is not there: {error}") from None
    return _parse(module, path, stamp)


def exists(module: str) -> bool:
    """Whether a module has a file of source."""
    path = _path(module)
    return path is not None and path.is_file()


def _path(module: str) -> Path | None:
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None:
        return Path(loaded)
    if module.startswith("transformers."):
        return transformers_folder().joinpath(*module.split(".")[1:]).with_suffix(".py")
    return None


@cache
def transformers_folder() -> Path:
    """Where the installed transformers is. Does not import it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise Unreadable("transformers is not installed")
    return Path(spec.origin).parent


@lru_cache(maxsize=32)  # the classes of a model come from few files, one after the other
def _parse(module: str, path: Path, stamp: int) -> SourceFile:
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from None
    file = SourceFile(module, path)
    for statement in tree.body:
        _enter(file, statement)
    return file


def _enter(file: SourceFile, statement: ast.stmt) -> None:
    if _is_main(statement):
        return
    if isinstance(statement, (ast.Import, ast.ImportFrom, *COMPOUND)):
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                file.import_statements.append(node)
                file.imports.update(imported_names(node, file.name))
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return
    names = set(bound_names([statement]))
    for name in names:
        file.definitions.setdefault(name, []).append(statement)
    if isinstance(statement, COMPOUND) or not (names or isinstance(statement, ast.Pass) or is_text(statement)):
        file.loose.append(statement)


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in {
        node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)
    }


def is_text(statement: ast.stmt) -> bool:
    """A docstring, or any other constant that stands alone."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def imported_names(statement: ast.Import | ast.ImportFrom, module: str) -> dict[str, str]:
    """Local name -> dotted name, of an import in `module`.

    Raises:
        Unreadable: it imports `*`.
    """
    if isinstance(statement, ast.Import):
        return {
            alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0]
            for alias in statement.names
        }
    source = statement.module or ""
    if statement.level:
        package = module.split(".")[: -statement.level]
        source = ".".join([*package, *filter(None, [source])])
    if any(alias.name == "*" for alias in statement.names):
        raise Unreadable(f"{module} imports all names of {source}")
    return {alias.asname or alias.name: f"{source}.{alias.name}" for alias in statement.names}


def bound_names(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that statements bind in their own scope, without imports."""
    stack: list[ast.AST] = list(statements)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            yield node.id
        elif isinstance(node, ast.ExceptHandler) and node.name or isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest
        if not isinstance(node, SCOPES):
            stack.extend(ast.iter_child_nodes(node))


# What is bound inside these is not bound outside.
SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
