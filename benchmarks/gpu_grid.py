"""The cells of the speed grid, in the order of their importance, and which systems meet where."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from benchmarks import models
from benchmarks.gpu_systems import AUTOTUNE, COMPILED, EAGER, FAST, FLASH, GRAPHS, NESTED, REDUCE, STOCK
from benchmarks.models import Model, lengths_of

NEEDS_NO_COMPILER = (STOCK, EAGER, FLASH, NESTED, FAST, GRAPHS)
BATCHES, LENGTHS, PADDINGS = (1, 8, 32, 128), (32, 128, 512), (0.0, 0.5)


@dataclass(frozen=True)
class Cell:
    """A batch of `batch` sequences of at most `seqlen` tokens, of whose positions a share is padding."""

    model: Model
    dtype: str
    batch: int
    seqlen: int
    padding: float = 0.0
    systems: tuple[str, ...] = NEEDS_NO_COMPILER

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.model.name} {self.dtype} {self.batch}x{self.seqlen} padding={self.padding:.0%}"

    @property
    def lengths(self) -> list[int]:
        """Real tokens of every sequence."""
        if self.batch == 1:
            return [round(self.seqlen * (1 - self.padding))]
        return lengths_of(self.batch, self.seqlen, self.padding)


# Those that a bar names: tokens per second, the latency of one text, and what half padding saves.
_FIRST = ((128, 128, 0.0), (1, 128, 0.0), (128, 128, 0.5), (32, 512, 0.0), (32, 512, 0.5), (32, 128, 0.0), (32, 128, 0.5))


def grid(quick: bool) -> list[Cell]:
    """Every cell, first those of the bars, then the rest of BERT-base, of BERT-large, and a few others."""
    if quick:
        return [
            Cell(models.BERT_BASE, "bf16", 4, 16, 0.5),
            Cell(models.BERT_BASE, "bf16", 1, 16, 0.5),
            Cell(models.VIT_BASE, "fp32", 1, 17, systems=(STOCK, FAST)),
        ]
    both = (models.BERT_BASE, models.BERT_LARGE)
    every = product(LENGTHS, BATCHES, PADDINGS)
    rest = [(b, s, p) for s, b, p in every if (b, s, p) not in _FIRST]
    cells = [Cell(model, "bf16", *where) for model in both for where in _FIRST]
    cells += [Cell(model, "bf16", *where) for model in both for where in rest]
    few = (STOCK, FAST, GRAPHS)
    cells += [Cell(models.VIT_BASE, "bf16", batch, 197, systems=few) for batch in (1, 32, 128)]
    cells += [Cell(models.BERT_BASE, "fp16", 128, 128, systems=few)]
    cells += [Cell(models.MINILM, "bf16", *where, systems=few) for where in ((1, 16, 0.0), (32, 128, 0.5), (256, 128, 0.7))]
    return cells


def compiled_grid(quick: bool) -> list[Cell]:
    """The cells of part "compile", each with one mode of torch.compile, best first: whatever the time allows."""
    if quick:
        return [
            Cell(models.BERT_BASE, "bf16", 4, 16, 0.5, (STOCK, FAST, COMPILED)),
            Cell(models.BERT_BASE, "bf16", 1, 16, 0.0, (STOCK, FAST, GRAPHS, REDUCE)),
        ]
    base, large = models.BERT_BASE, models.BERT_LARGE
    dynamic, reduce, tuned = ((STOCK, FAST, GRAPHS, mode) for mode in (COMPILED, REDUCE, AUTOTUNE))
    cells = [Cell(base, "bf16", *where, dynamic) for where in _FIRST if where[0] > 1]
    cells += [Cell(base, "bf16", 8, 128, 0.5, dynamic), Cell(base, "bf16", 128, 512, 0.5, dynamic)]
    cells += [Cell(base, "bf16", 1, 128, 0.0, reduce)]
    cells += [Cell(large, "bf16", *where, dynamic) for where in ((128, 128, 0.0), (128, 128, 0.5), (32, 512, 0.5))]
    cells += [Cell(base, "bf16", 128, 128, 0.0, tuned), Cell(base, "bf16", 1, 128, 0.0, tuned)]
    cells += [Cell(base, "bf16", 32, 128, 0.5, reduce), Cell(large, "bf16", 1, 128, 0.0, reduce)]
    return cells
