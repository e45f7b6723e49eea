"""Base-size models of the families beside BERT on the CPU, against stock: `python benchmarks/cpu_families.py`.

The weights are random (transformers' own initialisation, made large enough that attention and biases matter), the batch is
ragged: 32 sequences, mean length 0.28 of the longest. Stock runs whatever attention transformers chooses for the class, which
is eager for MPNet, DeBERTa, T5 and RoFormer. No time is shown where the answers are not those of stock in float64.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from benchmarks.clocks import HostClock, Spread, interleaved
from benchmarks.common import environment, error_bar, relative_error
from benchmarks.files import markdown_table, output_folder, write_json
from fastencoder import explain, to_fast
from fastencoder.demo.data import ragged_lengths

BAR = 4.0
EAGER_ONLY = ("deberta-v3-base", "mpnet-base", "t5-base encoder", "roformer-base")
VOCABULARY = 2000  # few, because the embedding is no part of what is measured
LONGEST, BATCH, PADDING = 128, 32, 0.72

Inputs = dict[str, torch.Tensor]
HEADER = ["model", "level", "padding", "stock error", "fast error", "stock ms", "fast ms", "ratio", "bar"]


def _deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    return transformers.DebertaV2Model(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=768, num_layers=12, num_heads=12, d_ff=3072, d_kv=64)
    return transformers.T5EncoderModel(config)


def _roformer() -> nn.Module:
    return transformers.RoFormerModel(transformers.RoFormerConfig(vocab_size=VOCABULARY, embedding_size=768))


# Everything with its own defaults where nothing is said: those are of base size.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "deberta-v3-base": _deberta,
    "mpnet-base": lambda: transformers.MPNetModel(transformers.MPNetConfig(vocab_size=VOCABULARY)),
    "t5-base encoder": _t5,
    "roformer-base": _roformer,
    "modernbert-base": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "bert-base": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY)),
}


@torch.no_grad()
def make(name: str) -> nn.Module:
    """The model in float32 and evaluation mode."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1 and parameter_name.endswith("bias"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif parameter.dim() == 1:
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        elif "relative_attention_bias" in parameter_name:
            parameter.copy_(torch.randn_like(parameter))
        elif name != "t5-base encoder":  # which starts large
            parameter.mul_(2)
    return model


def ragged() -> Inputs:
    """A right-padded batch of shuffled lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(ragged_lengths(BATCH, LONGEST, PADDING))[torch.randperm(BATCH, generator=generator)]
    ids = torch.randint(5, VOCABULARY, (BATCH, LONGEST), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(LONGEST) < lengths[:, None]).long()}


def answer(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The last hidden state at the real tokens `[T, D]`."""
    return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


@torch.inference_mode(False)
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The stock and the fast model."""
    stock = make(name)
    return stock, to_fast(copy.deepcopy(stock))


def compare(name: str, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    """One row: errors, and if they are small enough the times."""
    stock, fast = pair(name)
    inputs = ragged()
    row: dict[str, Any] = {
        "model": name,
        "level": ", ".join(sorted({each.level or "none" for each in explain(fast)})),
        "padding_share": 1 - float(inputs["attention_mask"].float().mean()),
        "stock_attention": stock.config._attn_implementation,
    }
    answers = [answer(model, inputs) for model in (stock, fast)]
    calls: dict[str, Callable[[int], Any]] = {"stock": lambda _: stock(**inputs), "fast": lambda _: fast(**inputs)}
    times = interleaved(calls, rounds, HostClock(), tick)
    reference = answer(stock.double(), inputs)
    row["stock_error"], row["fast_error"] = (relative_error(each.double(), reference) for each in answers)
    row["same_answers"] = row["fast_error"] <= error_bar("fp32", row["stock_error"])
    if row["same_answers"]:
        row["ratio"] = Spread.of([a / b for a, b in zip(times["stock"], times["fast"], strict=True)]).to_dict()
        row["ms"] = {side: 1000 * sorted(sample)[len(sample) // 2] for side, sample in times.items()}
        row["bar"] = BAR if name in EAGER_ONLY else 1.0
        row["bar_met"] = row["ratio"]["median"] >= row["bar"]
    return row


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    errors = [f"{row[side]:.1e}" for side in ("stock_error", "fast_error")]
    said = [row["model"], row["level"], f"{row['padding_share']:.0%}", *errors]
    if "ratio" not in row:
        return [*said, "wrong answers", "not shown", "", ""]
    ratio, ms = row["ratio"], row["ms"]
    shown = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    bar = f"{row['bar']:.1f} {'met' if row['bar_met'] else 'MISSED'}"
    return [*said, f"{ms['stock']:.0f}", f"{ms['fast']:.0f}", shown, bar]


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = found["environment"]
    return "\n\n".join(
        [
            "# Base-size models on the CPU: fastencoder against stock, fp32",
            f"{where['device']}, {where['threads']} threads of {where['cpu_count']} CPUs; torch {where['torch']}, "
            f"transformers {where['transformers']}, Python {where['python']}; {where['date']}. Measured by `python "
            f"benchmarks/cpu_families.py`: {found['rounds']} interleaved rounds on one ragged batch of {BATCH} sequences of "
            f"up to {LONGEST} tokens. Times are medians; the ratio is stock time over fast time of the same round, median "
            "and quartiles. Errors are relative to stock in float64, at real tokens; where they are too large no time is "
            "shown.",
            markdown_table(HEADER, [line(row) for row in found["rows"]]),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"which of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for cpu_families.json and .md (default: $OUT, benchmarks/results)")
    options = parser.parse_args(arguments)
    wanted = options.models.split(",")
    if unknown := set(wanted) - set(MODELS):
        parser.error(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(MODELS)}")

    console = Console()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {"environment": environment(torch.device("cpu")), "rounds": options.rounds, "rows": []}
    out = output_folder(options.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.inference_mode(), Progress(*columns, console=console, transient=True) as progress:
        for name in wanted:
            task = progress.add_task(name, total=options.rounds)
            found["rows"].append(compare(name, options.rounds, lambda task=task: progress.advance(task)))
            progress.remove_task(task)
            write_json(out / "cpu_families.json", found)
            (out / "cpu_families.md").write_text(report(found) + "\n", encoding="utf-8")
    console.print(markdown_table(HEADER, [line(row) for row in found["rows"]]), markup=False, soft_wrap=True)
    return 0 if all(row["same_answers"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
