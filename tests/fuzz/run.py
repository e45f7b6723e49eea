"""One hypothesis run of one subject, and the failing example as a test that can be pasted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from . import kernels, models

SUBJECTS = {"models": (models.models(), models.check), "kernels": (kernels.calls, kernels.check)}
STATE = Path(".hypothesis/fuzz")


def quiet_worker() -> None:
    """For a process that does nothing but `run`."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


@dataclass
class Outcome:
    """What a run found: how many comparisons it made, and the smallest example that failed with what it said."""

    cases: int
    impossible: int = 0
    example: str | None = None
    error: str | None = None

    def as_test(self, subject: str) -> str:
        return (
            f"from tests.fuzz.{subject} import *\n\n\n"
            f"def test_found_by_fuzzing() -> None:\n    check(\n        {self.example}\n    )\n"
        )


def run(subject: str, examples: int, start: int | None) -> Outcome:
    """Draws `examples` examples of a subject. With a `start` that follows from it alone, failures are remembered on disk and
    come first in a later run; None draws the same ones each time and remembers nothing."""
    strategy, check = SUBJECTS[subject]
    outcome = Outcome(0)
    latest: list[Any] = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None if start is None else DirectoryBasedExampleDatabase(STATE / subject),
        derandomize=start is None,
        print_blob=False,
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def compare(example: Any) -> None:
        latest[:] = [example]
        try:
            outcome.cases += check(example)
        except models.Impossible:
            outcome.impossible += 1
            assume(False)

    compare.hypothesis.inner_test.__qualname__ = f"fuzz.{subject}"  # the key in the database
    runner = compare if start is None else seed(start)(compare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            runner()
        except Exception as error:  # hypothesis raises the error of the smallest example, which it ran last
            outcome.example, outcome.error = repr(latest[0]), f"{type(error).__name__}: {error}"
    return outcome
