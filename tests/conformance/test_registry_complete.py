"""Every registered layer class has a conformance row, or a written reason why not; and no row is stale."""

from __future__ import annotations

import fastencoder

from .case import UNREGISTERED, Absent
from .cases import CASES, WITHOUT_ROW

REGISTERED = {entry.layer_class for entry in fastencoder.registry.entries()}


def _builtin(names: set[str]) -> set[str]:
    """Other tests may have registered classes of their own."""
    return {name for name in names if name.startswith(("transformers.", "torch.nn.", "timm."))}


def test_every_registered_class_has_a_row() -> None:
    rows = {case.layer_class_name for case in CASES}
    assert _builtin(REGISTERED) - rows - set(WITHOUT_ROW) == set()


def test_rows_are_of_registered_classes() -> None:
    rows = {case.layer_class_name for case in CASES if case.expect != UNREGISTERED and not case.by_source}
    assert rows - REGISTERED == set()


def test_rows_that_are_not_plainly_fast_say_why() -> None:
    assert all(case.why for case in CASES if case.expect != "fast" or case.patterns or case.padding_delegates)


def test_written_reasons_are_not_stale() -> None:
    rows = {case.layer_class_name for case in CASES}
    assert not rows & set(WITHOUT_ROW)
    assert set(WITHOUT_ROW) <= REGISTERED
    assert all(WITHOUT_ROW.values())


def test_most_classes_exist_here() -> None:
    """Rows are skipped where transformers has no such class: that must stay the exception."""
    absent = []
    for case in CASES:
        try:
            case.layer_class()
        except Absent:
            absent.append(case.id)
    assert len(absent) <= len(CASES) // 10, absent


def test_registry_answers_by_model_type() -> None:
    """The model type of each row's config leads to the row's layer class, where the registry names that type."""
    known = {model_type for entry in fastencoder.registry.entries() for model_type in entry.model_types}
    found = 0
    for case in CASES:
        try:
            config_class = getattr(case.model_class(), "config_class", None)
        except Absent:
            continue
        model_type = getattr(config_class, "model_type", None)
        if model_type in known and case.layer_class_name in REGISTERED:
            classes = {entry.layer_class for entry in fastencoder.registry.by_model_type(model_type)}
            assert case.layer_class_name in classes, f"{case.id}: {model_type} -> {classes}"
            found += 1
    assert found > 60
