"""The benchmark of `SentenceTransformer.encode`: its texts, what counts as right, and what is made of the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cpu import encode
from benchmarks.cpu.systems import ENCODERS, SYSTEMS


def test_two_thousand_real_paragraphs() -> None:
    texts = encode.texts(2000)
    assert len(set(texts)) == len(texts) == 2000 and all(text.strip() for text in texts)
    lengths = [len(text.split()) for text in texts]
    assert max(lengths) <= encode.WORDS and max(lengths) > 5 * np.median(lengths), "of mixed length"
    assert encode.texts(40) != texts[:40], "spread over all of them"
    with pytest.raises(ValueError, match="texts, not 10000000"):
        encode.texts(10_000_000)


def test_embeddings_are_judged_like_hidden_states() -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((5, 8)).astype(np.float32)
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    near = reference + 1e-6 * generator.standard_normal((5, 8)).astype(np.float32)
    assert encode.compare(near, reference, "fp32")["equal"]
    one_wrong = near.copy()
    one_wrong[3, 0] += 0.01
    assert "wrong" in encode.compare(one_wrong, reference, "fp32")
    assert encode.compare(one_wrong, reference, "bf16")["equal"]
    assert "wrong" in encode.compare(np.roll(reference, 1, axis=0), reference, "bf16"), "another text's"
    assert "wrong" in encode.compare(reference[:4], reference, "bf16")


def measured(**seconds: list[float]) -> dict[str, Any]:
    systems: dict[str, Any] = {
        f"encode {name.replace('_', ' ')}": {"seconds": each, "equal": True, "error": 1e-6, "cosine": 1.0}
        for name, each in seconds.items()
    }
    systems["encode openvino"] = {"wrong": "error 0.1", "error": 0.1, "cosine": 0.9, "equal": False}
    place = {"device": "a processor", "threads": 2}
    return {"texts": 100, "words": 2000, "systems": systems, "versions": {}, "environment": place}


def test_the_bar_is_the_best_backend_against_the_best_of_ours(tmp_path: Path) -> None:
    times = measured(torch=[4.0, 4.4, 4.2], onnx_fp32=[6.0, 6.0, 6.0], fastencoder=[2.0, 2.0, 2.0])
    times["systems"]["encode fastencoder unpadded"] = {"seconds": [1.0, 1.1, 1.05], "error": 0.0, "cosine": 1.0}
    found = encode.merge(tmp_path, "fp32", times)
    fp32, bf16 = encode.bars(found)
    assert fp32.measured == pytest.approx(4.0) and fp32.note == "torch" and fp32.met is True
    assert bf16.measured is None and bf16.met is None
    assert [path.name for path in encode.write(tmp_path, found)] == ["encode.json", "encode.md"]
    page = (tmp_path / "encode.md").read_text(encoding="utf-8")
    assert "wrong answers: error 0.1" in page and "| torch | 4.20 | 24 | 4.00 |" in page
    slower = measured(torch=[2.0], fastencoder=[2.0])
    _, bf16 = encode.bars(encode.merge(tmp_path, "bf16", slower))
    assert bf16.met is False and set(encode.read_json(tmp_path / "encode.json") or {}) == {"fp32", "bf16"}


def test_names_are_of_one_list() -> None:
    assert not set(ENCODERS) & set(SYSTEMS)
    assert "encode fastencoder compute bf16" not in encode._systems("fp32")
    assert "encode torch fp32" not in encode._systems("fp32") and "encode onnx fp32" in encode._systems("fp32")
    assert set(encode._systems("bf16")) == set(ENCODERS)
