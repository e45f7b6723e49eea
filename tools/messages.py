"""Every message that the package has for a user, from its source: errors, warnings, refusals, reasons of delegated calls.

    python -m tools.messages            # print them, by file

`docs/troubleshooting.md` quotes them, and a test holds the two together. What a message fills in is written as "…".
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fastencoder"
FILLED = "…"

# Nobody is shown these: operations called by hand, examinations, the reader of sources, embeddings that run as ever.
LEFT_OUT = ("kernels", "fingerprints", "runtime/inspect_kernels.py", "layers/fast_embeddings.py")
# Exceptions that are caught where they are meant: no user sees them.
INTERNAL = {"AttributeError", "ImportError", "SystemExit", "NotAPaddingMask", "_SaysNothing", "Exit"}
# Functions whose answers are reasons: what they return or yield is shown.
REASONS = {
    "eligibility.py": {"_not_this_family", "_checks", "_check_*"},
    "families/external.py": {"*"},
    "layers/settings.py": {"refusal"},
    "report.py": {"_unknown"},
    "attention_level/padding.py": {"*"},
}


def template(node: ast.expr) -> str | None:
    """A string with what it fills in as "…"; None if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(FILLED if isinstance(part, ast.FormattedValue) else str(part.value) for part in node.values)  # type: ignore[attr-defined]
    return None


def strings() -> set[str]:
    """Every string of the package, docstrings among them."""
    found = (
        template(node) for path in PACKAGE.rglob("*.py") for node in ast.walk(_tree(path)) if isinstance(node, ast.expr)
    )
    return {text for text in found if text}


def messages() -> list[tuple[str, str]]:
    """(file, message) of everything that a user can meet, in the order of the source."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(LEFT_OUT):
            found += [
                (name, text) for text in dict.fromkeys(_of_file(name, _tree(path))) if len(text.strip(FILLED + " ")) > 3
            ]
    return found


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _of_file(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _called(node.exc) not in INTERNAL:
            yield from _first_text(node.exc)
        elif isinstance(node, ast.Call) and _called(node) in ("warn", "fail"):
            yield from _first_text(node)
        elif isinstance(node, ast.FunctionDef) and _gives_reasons(name, node.name):
            for inner in ast.walk(node):
                if isinstance(inner, (ast.Return, ast.Yield)) and inner.value is not None:
                    yield from _texts(inner.value)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _first_text(call: ast.Call) -> Iterator[str]:
    if call.args:
        yield from _texts(call.args[0])


def _texts(node: ast.expr) -> Iterator[str]:
    text = template(node)
    if text is not None:
        yield text


def _gives_reasons(file: str, function: str) -> bool:
    names = REASONS.get(file, set())
    return (
        "*" in names
        or function in names
        or any(name.endswith("*") and function.startswith(name[:-1]) for name in names)
    )


def main() -> None:
    previous = None
    for name, text in messages():
        if name != previous:
            print(f"\n# {name}")
        print(f"  {text}")
        previous = name


if __name__ == "__main__":
    main()
