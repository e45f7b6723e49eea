"""Every fenced block of a page, in order, in one namespace: Python runs, shell lines run or are checked, text is text.

A block that cannot run here carries the reason in a comment on the line before it, `<!-- not run: needs a CUDA device -->`.
Its Python is compiled, and runs where the reason does not hold; its shell lines are checked without being run. What a block
takes for granted comes from an invisible block, a comment that begins with `<!-- invisible-code-block: python`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sybil import Document, Example, Sybil
from sybil.evaluators.python import PythonEvaluator, pad
from sybil.parsers.markdown import CodeBlockParser

from .shell import check_line, logical_lines, run_line

ROOT = Path(__file__).parents[2]
CUDA = "needs a CUDA device"
_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n.*?^ *```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")


def pages() -> list[str]:
    """Every Markdown file that a user reads, relative to the root."""
    found = (
        path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/*.md") for path in ROOT.glob(pattern)
    )
    return sorted(str(path.relative_to(ROOT)) for path in found)


@dataclass
class Done:
    """What was done with the blocks of a page."""

    run: int = 0
    checked: Counter[str] = field(default_factory=Counter)  # blocks that were not run, by reason
    text: int = 0


def evaluate(page: Path) -> Done:
    """Evaluates the blocks of a page in the current folder. Raises what a block raises, and ValueError for one of no kind."""
    done = Done()

    def reason(example: Example) -> str | None:
        found = _NOT_RUN.search(example.document.text[: example.region.start])
        return found[1] if found and not (found[1] == CUDA and torch.cuda.is_available()) else None

    def python(example: Example) -> None:
        why = reason(example)
        if why is None:
            PythonEvaluator()(example)
        else:
            compile(pad(example.parsed, example.line + example.parsed.line_offset), example.path, "exec")
        count(example, why)

    def shell(example: Example) -> None:
        why = reason(example)
        for line in logical_lines(example.parsed):
            check_line(line)
            if why is None:
                run_line(line)
        count(example, why)

    def text(example: Example) -> None:
        done.text += 1

    def count(example: Example, why: str | None) -> None:
        if example.document.text.startswith("<!--", example.region.start):
            return  # an invisible block
        if why is None:
            done.run += 1
        else:
            done.checked[why] += 1

    kinds = {"python": python, "bash": shell, "text": text}
    document = Sybil([CodeBlockParser(kind, evaluator) for kind, evaluator in kinds.items()]).parse(page)
    for example in document.examples():
        example.evaluate()
    _nothing_was_passed_over(document, done)
    return done


def _nothing_was_passed_over(document: Document, done: Done) -> None:
    kinds = Counter(match[1] for match in _FENCE.finditer(document.text))
    if unknown := set(kinds) - {"python", "bash", "text"}:
        raise ValueError(f"{document.path}: a block of language {unknown} is none that is tested")
    if kinds.total() != done.run + done.checked.total() + done.text:
        raise ValueError(f"{document.path}: {kinds} blocks, and only {done} were evaluated")
