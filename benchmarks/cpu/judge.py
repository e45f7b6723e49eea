"""Whether an answer is the answer of stock in fp32, at the real tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FP32_ERROR = 1e-4  # largest of a token: norm of the difference over the norm of the reference
BF16_COSINE = 0.999  # least of a sequence's mean-pooled embedding


@dataclass(frozen=True)
class Verdict:
    """How far an answer is from the reference, and whether that is near enough; `why` says what is wrong if not."""

    error: float
    cosine: float
    why: str = ""

    @property
    def equal(self) -> bool:
        return not self.why


def compare(answer: np.ndarray, reference: np.ndarray, lengths: list[int], dtype: str) -> Verdict:
    """Judge hidden states `[B, S, D]`, or pooled and normalised embeddings `[B, D]`.

    Args:
        reference: hidden states of stock in fp32, `[B, S, D]`.
        lengths: real tokens of each sequence, which come first.
        dtype: in which the answer was computed.
    """
    pooled = answer.ndim == 2
    expected = (reference.shape[0], reference.shape[2]) if pooled else reference.shape
    if answer.shape != expected:
        return Verdict(float("inf"), -1.0, f"shape {answer.shape} instead of {expected}")
    exact = np.stack([row[:length].mean(0, dtype=np.float64) for row, length in zip(reference, lengths, strict=True)])
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    if pooled:
        embeddings = answer.astype(np.float64)
        error = _error(embeddings, exact)
    else:
        embeddings = np.stack(
            [row[:length].mean(0, dtype=np.float64) for row, length in zip(answer, lengths, strict=True)]
        )
        rows = zip(answer, reference, lengths, strict=True)
        error = float(np.max([_error(a[:n], b[:n]) for a, b, n in rows]))  # unlike max, it keeps a NaN
    with np.errstate(invalid="ignore"):
        cosine = float(((embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)) * exact).sum(1).min())
    good = error <= FP32_ERROR if dtype == "fp32" else cosine >= BF16_COSINE  # a NaN is neither
    why = "" if good else f"error {error:.1e} (at most {FP32_ERROR:.0e})" if dtype == "fp32" else f"cosine {cosine:.5f}"
    return Verdict(error, cosine, why)


def _error(answer: np.ndarray, reference: np.ndarray) -> float:
    """The largest relative error of a row."""
    exact = reference.astype(np.float64)
    return float((np.linalg.norm(answer - exact, axis=-1) / np.linalg.norm(exact, axis=-1)).max())
