"""The normalised source of a class: what it computes, without what it is called.

Written are the class and everything of its own file that it mentions, directly or not: classes, functions, constants; and the
same of other files of `transformers.models` from which it takes parts. Left out is what computes nothing: comments,
docstrings, annotations, the words of errors and of warnings, decorators that only document. Module-level names become
numbers, in the order in which they are first met, so copies under other names read the same. Names of attributes and
arguments stay: an adapter finds the parts of a layer by them. Names of other libraries are written in full, however they were
imported.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
from dataclasses import dataclass

from . import source
from .source import SourceFile, Unreadable

FOLLOWED = "transformers.models."
LENGTH = 16  # hexadecimal digits of a fingerprint

_DOCUMENTING = ("auto_docstring", "add_start_docstrings", "add_end_docstrings", "replace_return_docstrings")
_SPEAKING = ("logger", "warnings")

# Names of a scope, and what they stand for: None for a variable, a dotted name for an import.
_Scope = dict[str, str | None]


@dataclass(frozen=True)
class Closure:
    """What a class is made of.

    Args:
        fingerprint: of the normalised source, hexadecimal.
        text: the normalised source.
        parts: the file and name of each definition, the class itself first.
    """

    fingerprint: str
    text: str
    parts: tuple[tuple[SourceFile, str], ...]


def closure(module: str, name: str) -> Closure:
    """The closure of the class `name` of a module.

    Raises:
        Unreadable: its source is not there, or does not define it.
    """
    file = source.read(module)
    if name not in file.definitions:
        raise Unreadable(f"{file.path} does not define {name}")
    writer = _Writer()
    writer.number(file, name)
    text = writer.write_all()
    digest = hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
    return Closure(digest, text, tuple((file, name) for file, name in writer.parts))


class _Writer:
    def __init__(self) -> None:
        self.parts: list[tuple[SourceFile, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}
        self._written: set[int] = set()  # statements that define several names

    def number(self, file: SourceFile, name: str) -> str:
        """What stands for a definition: its number."""
        key = (file.name, name)
        if key not in self._numbers:
            self._numbers[key] = len(self.parts)
            self.parts.append((file, name))
        return f"${self._numbers[key]}"

    def write_all(self) -> str:
        lines: list[str] = []
        done = 0
        while done < len(self.parts):
            for file, name in self.parts[done:]:
                done += 1
                lines += [self._statement_once(file, statement) for statement in file.definitions[name]]
            for file in {file.name: file for file, _ in self.parts}.values():
                lines += [self._statement_once(file, statement) for statement in file.loose if self._concerns(file, statement)]
        return "\n".join(line for line in lines if line)

    def _concerns(self, file: SourceFile, statement: ast.stmt) -> bool:
        return any(
            isinstance(node, ast.Name) and (file.name, node.id) in self._numbers for node in ast.walk(statement)
        )

    def _statement_once(self, file: SourceFile, statement: ast.stmt) -> str:
        if id(statement) in self._written:
            return ""
        self._written.add(id(statement))
        return _Scoped(self, file).write(statement)

    def dotted(self, name: str) -> str:
        """A name of another module, marked as such; a definition of another modelling file of transformers is followed."""
        module, _, last = name.rpartition(".")
        if module.startswith(FOLLOWED) and source.exists(module):
            file = source.read(module)
            if last in file.definitions:
                return self.number(file, last)
            if last in file.imports and file.imports[last] != name:
                return self.dotted(file.imports[last])
        return f"@{name}"


class _Scoped:
    """Writes syntax trees inside one scope of one file.

    Args:
        scope: the names of the functions around.
        own: the names of the class body, if this is one: functions inside do not see them.
    """

    def __init__(
        self, writer: _Writer, file: SourceFile, scope: _Scope | None = None, own: _Scope | None = None
    ) -> None:
        self.writer = writer
        self.file = file
        self.scope = scope or {}
        self.visible = {**self.scope, **(own or {})}

    def write(self, node: object) -> str:
        if isinstance(node, list):
            return "[" + " ".join(filter(None, map(self.write, node))) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        special = getattr(self, f"_write_{type(node).__name__}", None)
        return special(node) if special else self._plainly(node)

    def _plainly(self, node: ast.AST) -> str:
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        kept = [f"{name}={self.write(value)}" for name, value in fields if name not in ("ctx", "kind", "type_comment")]
        return f"({' '.join([type(node).__name__, *kept])})"

    def _inside(self, names: _Scope) -> _Scoped:
        return _Scoped(self.writer, self.file, {**self.scope, **names})

    # ---- names

    def _write_Name(self, node: ast.Name) -> str:
        return self._name(node.id)

    def _name(self, name: str) -> str:
        if name in self.visible:
            imported = self.visible[name]
            return name if imported is None else self.writer.dotted(imported)
        if name in self.file.definitions:
            return self.writer.number(self.file, name)
        if name in self.file.imports:
            return self.writer.dotted(self.file.imports[name])
        if hasattr(builtins, name) or name.startswith("__"):
            return f"!{name}"
        raise Unreadable(f"{self.file.path} does not say what {name} is")

    def _write_Attribute(self, node: ast.Attribute) -> str:
        path = [node.attr]
        root = node.value
        while isinstance(root, ast.Attribute):
            path.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name):
            imported = self._import_behind(root.id)
            if imported is not None:
                return self._attribute_of_import(imported, path[::-1])
        return f"{self.write(node.value)}.{node.attr}"

    def _import_behind(self, name: str) -> str | None:
        if name in self.visible:
            return self.visible[name]
        return None if name in self.file.definitions else self.file.imports.get(name)

    def _attribute_of_import(self, imported: str, path: list[str]) -> str:
        for part in range(len(path)):  # `modeling_bert.BertLayer` is followed as `BertLayer` would be
            written = self.writer.dotted(".".join([imported, *path[: part + 1]]))
            if written.startswith("$"):
                return ".".join([written, *path[part + 1 :]])
        return ".".join([self.writer.dotted(imported), *path])

    # ---- scopes

    def _write_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
        decorators = [self.write(each) for each in node.decorator_list if not _documents(each)]
        inner = self._inside({**_arguments(node.args), **self._locals(node.body)})
        head = f"{type(node).__name__} {self._name(node.name)} {decorators} {_signature(node.args)}"
        return f"({head} {self._defaults(node.args)} {inner.write(node.body)})"

    _write_AsyncFunctionDef = _write_FunctionDef

    def _write_Lambda(self, node: ast.Lambda) -> str:
        body = self._inside(_arguments(node.args)).write(node.body)
        return f"(Lambda {_signature(node.args)} {self._defaults(node.args)} {body})"

    def _write_ClassDef(self, node: ast.ClassDef) -> str:
        decorators = [self.write(each) for each in node.decorator_list if not _documents(each)]
        body = _Scoped(self.writer, self.file, self.scope, own=self._locals(node.body))
        bases = f"{self.write(node.bases)} {self.write(node.keywords)}"
        return f"(ClassDef {self._name(node.name)} {bases} {decorators} {body.write(node.body)})"

    def _comprehension(self, node: ast.AST) -> str:
        names: _Scope = {
            each.id: None for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        }
        return self._inside(names)._plainly(node)

    _write_ListComp = _write_SetComp = _write_DictComp = _write_GeneratorExp = _comprehension

    def _locals(self, body: list[ast.stmt]) -> _Scope:
        names: _Scope = dict.fromkeys(source.bound_names(body))
        stack: list[ast.AST] = list(body)
        while stack:
            node = stack.pop()
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names.update(source.imported_names(node, self.file.name))
            elif isinstance(node, ast.Global):
                for name in node.names:
                    names.pop(name, None)
            if not isinstance(node, source.SCOPES):
                stack.extend(ast.iter_child_nodes(node))
        return names

    def _defaults(self, arguments: ast.arguments) -> str:
        return f"{self.write(arguments.defaults)}{[self.write(each) for each in arguments.kw_defaults]}"

    # ---- what computes nothing

    def _write_Expr(self, node: ast.Expr) -> str:
        return "" if source.is_text(node) or _speaks(node.value) else self._plainly(node)

    def _write_Pass(self, node: ast.Pass) -> str:
        return ""

    def _write_AnnAssign(self, node: ast.AnnAssign) -> str:
        if node.value is None:
            return ""
        return f"(Assign targets=[{self.write(node.target)}] value={self.write(node.value)})"

    def _write_Raise(self, node: ast.Raise) -> str:
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return f"(Raise {self.write(error)})"

    def _write_Assert(self, node: ast.Assert) -> str:
        return f"(Assert {self.write(node.test)})"

    def _write_Global(self, node: ast.Global) -> str:
        return ""

    def _write_Import(self, node: ast.Import | ast.ImportFrom) -> str:
        names = source.imported_names(node, self.file.name)
        return f"(Import {' '.join(f'{name}={self.writer.dotted(names[name])}' for name in sorted(names))})"

    _write_ImportFrom = _write_Import


def _arguments(arguments: ast.arguments) -> _Scope:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg: None for argument in every if argument is not None}


def _signature(arguments: ast.arguments) -> str:
    plain = [argument.arg for argument in arguments.args]
    words = [f"/{argument.arg}" for argument in arguments.posonlyargs] + plain
    words += [f"*{arguments.vararg.arg}"] if arguments.vararg else ["*"]
    words += [argument.arg for argument in arguments.kwonlyargs]
    words += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"({' '.join(words)})"


def _documents(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id in _DOCUMENTING


def _speaks(value: ast.expr) -> bool:
    """A message to a logger or to `warnings`."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    return isinstance(value.func.value, ast.Name) and value.func.value.id in _SPEAKING
