"""What several test files ask for by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from .tiny import bert


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """The folder of a tiny BERT; no test writes in it."""
    folder = tmp_path_factory.mktemp("model")
    bert().save_pretrained(folder)
    return folder
