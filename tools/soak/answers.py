"""Texts of ragged length, and the right embedding of each, computed before any server runs.

The reference is the stock model in fp32, one text at a time: without padding, without a neighbour, without fastencoder and
without the server's code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastencoder.demo.data import paragraphs

MEAN_WORDS, MOST_WORDS = 25, 120  # of a text; about 1.4 tokens a word
MOST_TOKENS = 256  # that the server takes
ALIKE = 0.99  # cosine from which two texts would be mistaken for one another
COORDINATE = 1e-5  # fp32: the largest difference of a coordinate of a vector of length 1
COSINE = 0.999  # 16 bits


@dataclass(frozen=True)
class Answers:
    """N texts, their tokens [N] and right embeddings [N, D] (float32, length 1)."""

    texts: tuple[str, ...]
    tokens: np.ndarray
    vectors: np.ndarray

    def wrong(self, given: object, of: Sequence[int], dtype: str) -> str:
        """What is wrong with the embeddings given for the texts `of`; empty if they are right.

        fp32: no coordinate differs by more than COORDINATE. bf16, fp16: each cosine is at least COSINE, each length 1.
        """
        right = self.vectors[list(of)]
        try:
            vectors = np.array(given, dtype=np.float32)
        except (TypeError, ValueError):
            return "the embeddings are no numbers, or not equally many"
        if vectors.shape != right.shape:
            return f"embeddings {vectors.shape} instead of {right.shape}"
        if dtype == "fp32":
            worst = float(np.abs(vectors - right).max())
            return "" if worst <= COORDINATE else f"a coordinate differs by {worst:.1e}"
        lengths = np.linalg.norm(vectors, axis=1)
        if not np.abs(lengths - 1).max() <= 1e-3:
            return "an embedding has not the length 1"
        least = float((vectors * right).sum(1).min())
        return "" if least >= COSINE else f"a cosine is {least:.5f}"


def prose(count: int, seed: int = 0) -> list[str]:
    """`count` different pieces of Python's language reference; the numbers of words are lognormal, 2 to MOST_WORDS."""
    draw = random.Random(seed)
    pool = [words for paragraph in paragraphs(10**9) if len(words := paragraph.split()) >= 2]
    found: dict[str, None] = {}
    while len(found) < count:
        size = round(draw.lognormvariate(math.log(MEAN_WORDS) - 0.32, 0.8))
        words: list[str] = []
        while len(words) < size:
            words += draw.choice(pool)
        found[" ".join(words[: min(max(size, 2), MOST_WORDS)])] = None
    return list(found)


def distinct(answers: Answers) -> Answers:
    """Without texts that mean the same as an earlier one: if two were exchanged, it has to show."""
    keep: list[int] = []
    for index, vector in enumerate(answers.vectors):
        if not keep or float((answers.vectors[keep] @ vector).max()) < ALIKE:
            keep.append(index)
    return Answers(tuple(answers.texts[i] for i in keep), answers.tokens[keep], answers.vectors[keep])


def of_stock(folder: Path, count: int, seed: int = 0) -> Answers:
    """The answers of the stock model of a folder: mean of the tokens' last hidden states, normalised.

    Fewer than `count` texts: those are left out that are too long, or mean the same as another.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    texts: list[str] = []
    tokens: list[int] = []
    vectors: list[np.ndarray] = []
    with torch.inference_mode():
        for text in prose(count, seed):
            inputs = tokenizer(text, return_tensors="pt")
            if inputs["input_ids"].shape[1] > MOST_TOKENS:
                continue
            mean = model(**inputs).last_hidden_state[0].mean(0)
            texts.append(text)
            tokens.append(inputs["input_ids"].shape[1])
            vectors.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    return distinct(Answers(tuple(texts), np.array(tokens), np.stack(vectors)))
