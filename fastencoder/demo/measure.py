"""Answers and times of two models: what each of them says, whether that is the same, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastencoder.demo.data import Batch

#: Largest relative error of a float32 model at this size (norm of the difference over norm of the stock output).
FP32_BOUND = 5e-5
#: A low-precision fast model may be this many times as far from the float32 answers as the low-precision stock model.
LOW_PRECISION_FACTOR = 2.0

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
Tick = Callable[[], None]


def name(dtype: torch.dtype) -> str:
    """fp32, fp16 or bf16."""
    return NAMES[dtype]


@dataclass(frozen=True)
class Answers:
    """What a model says about all batches, in float32 on the CPU.

    tokens [T, D]: last hidden state of the T real tokens. embeddings [N, D]: mean over each text's tokens, normalised
    to length 1, as sentence-transformers does for this model.
    """

    tokens: torch.Tensor
    embeddings: torch.Tensor


@dataclass(frozen=True)
class Difference:
    """How far one set of answers is from another.

    token_error: norm of the difference over the norm of the reference, over all real tokens. largest: largest
    difference of any embedding coordinate. cosine: smallest cosine of a text's two embeddings. neighbours: how
    many of the ``texts`` texts have the same nearest neighbour among all the others.
    """

    token_error: float
    largest: float
    cosine: float
    neighbours: int
    texts: int


@dataclass(frozen=True)
class Check:
    """One dtype's answers: fast against stock of the same dtype, and both against stock in float32."""

    dtype: torch.dtype
    fast_to_stock: Difference
    stock_to_exact: Difference
    fast_to_exact: Difference

    @property
    def passed(self) -> bool:
        """Equal within the rounding of the dtype: the bounds are at the top of this file."""
        if self.dtype == torch.float32:
            return self.fast_to_stock.token_error <= FP32_BOUND
        return self.fast_to_exact.token_error <= LOW_PRECISION_FACTOR * self.stock_to_exact.token_error


@dataclass(frozen=True)
class Speed:
    """Real tokens a second of both sides, and the ratio of their times with the lowest and highest of any round."""

    stock: float
    fast: float
    ratio: float
    ratio_low: float
    ratio_high: float


def answers(model: Any, batches: list[Batch], tick: Tick = lambda: None) -> tuple[Answers, float]:
    """Run every batch once. Returns the answers, and the seconds that it took (a rough figure, nothing was warm)."""
    tokens, embeddings = [], []
    began = time.perf_counter()
    for batch in batches:
        hidden = model(**batch.inputs).last_hidden_state.float()
        mask = batch.inputs["attention_mask"]
        tokens.append(hidden[mask.bool()].cpu())
        embeddings.append(pool(hidden, mask).cpu())
        tick()
    return Answers(torch.cat(tokens), torch.cat(embeddings)), time.perf_counter() - began


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens, then length 1: hidden [B, S, D], mask [B, S] -> [B, D]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """Index of each row's most similar other row: [N, D] -> int64 [N]."""
    similarity = embeddings.double() @ embeddings.double().T
    return similarity.fill_diagonal_(-torch.inf).argmax(1)


def difference(one: Answers, reference: Answers) -> Difference:
    """How far ``one`` is from ``reference``."""
    a, b = one.embeddings.double(), reference.embeddings.double()
    same = nearest(one.embeddings) == nearest(reference.embeddings)
    return Difference(
        token_error=float((one.tokens - reference.tokens).double().norm() / reference.tokens.double().norm()),
        largest=float((a - b).abs().max()),
        cosine=float(torch.nn.functional.cosine_similarity(a, b).min()),
        neighbours=int(same.sum()),
        texts=len(same),
    )


def compare(dtype: torch.dtype, stock: Answers, fast: Answers, exact: Answers) -> Check:
    """``exact`` is what the stock model says in float32."""
    return Check(dtype, difference(fast, stock), difference(stock, exact), difference(fast, exact))


def interleaved(stock: Any, fast: Any, batches: list[Batch], rounds: int, tick: Tick = lambda: None) -> Speed:
    """Time both models on every batch in turn, ``rounds`` times, so that a slow spell of the machine meets both.

    Who goes first changes with every batch. Each batch counts with the median of its times. Only the model's forward is
    timed; both models must have seen the batches before.
    """
    times: dict[str, list[list[float]]] = {"stock": [[] for _ in batches], "fast": [[] for _ in batches]}
    sides = [("stock", stock), ("fast", fast)]
    for turn in range(rounds):
        for index, batch in enumerate(batches):
            for side, model in sides if (turn + index) % 2 == 0 else reversed(sides):
                times[side][index].append(seconds(model, batch))
            tick()
    total = {side: sum(statistics.median(of_batch) for of_batch in times[side]) for side in times}
    by_round = [
        sum(of_batch[turn] for of_batch in times["stock"]) / sum(of_batch[turn] for of_batch in times["fast"])
        for turn in range(rounds)
    ]
    tokens = sum(batch.tokens for batch in batches)
    return Speed(
        stock=tokens / total["stock"],
        fast=tokens / total["fast"],
        ratio=total["stock"] / total["fast"],
        ratio_low=min(by_round),
        ratio_high=max(by_round),
    )


def seconds(model: Any, batch: Batch) -> float:
    """Wall time of one forward, with all of its work on the device done."""
    on_cuda = batch.inputs["input_ids"].is_cuda
    if on_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(**batch.inputs)
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
