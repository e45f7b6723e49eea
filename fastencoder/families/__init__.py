"""Adapters: which layer classes of transformers are understood, and where each keeps its weights.

One short file a family; a new layer class in a known family is one line. Names do not determine the maths (BART and
mBART share theirs), so every class is listed by its exact name, and nothing is matched by structure.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..spec import Adapter
from . import (
    deberta,
    detection,
    external,
    post_ln,
    pre_ln,
    pre_ln_kinds,
    pre_ln_vision,
    qformer,
    relative_bias,
    rope,
    sandwich,
    t5,
    vision_packed,
    vision_rope,
    windows,
)

_FAMILIES = (
    detection,
    post_ln,
    pre_ln,
    pre_ln_kinds,
    pre_ln_vision,
    deberta,
    qformer,
    relative_bias,
    rope,
    sandwich,
    t5,
    vision_packed,
    vision_rope,
    windows,
)


def builtin_adapters() -> Iterator[tuple[str, Adapter, tuple[str, ...]]]:
    """Yields (qualified layer class, adapter, model types) for every layer class that ships with the package."""
    for family in _FAMILIES:
        for table_adapter, rows in family.TABLES:
            for path, model_types in rows.items():
                yield f"transformers.models.{path}", table_adapter, tuple(model_types.split())
    for table_adapter, rows in external.TABLES:
        for path, model_types in rows.items():
            yield path, table_adapter, tuple(model_types.split())
