"""Real MiniLM on real paragraphs on the CPU, against stock sdpa of the same dtype: `python benchmarks/cpu_minilm.py`.

Four workloads: W1 ragged batches as they come (32 paragraphs, mean length 0.30 of the longest), W2 no padding at all,
W3 one short text, W4 a few texts of which one is very long. Answers are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.clocks import HostClock, Spread, interleaved, ratios
from benchmarks.common import DTYPES, environment, error_bar, relative_error
from benchmarks.files import markdown_table, output_folder, write_json
from fastencoder import to_fast
from fastencoder.demo.data import DemoError, load, paragraphs

BARS = {("fp32", "W1"): 3.5, ("bf16", "W1"): 4.0}  # every other workload: 1.0
TITLES = {
    "W1": "32 paragraphs, mean/max 0.30",
    "W2": "32 x 128, no padding",
    "W3": "1 x 16",
    "W4": "8 paragraphs, one above 400",
}
FEWEST_ROUNDS = 15
LONGEST = 512  # tokens at which a paragraph is cut

Inputs = dict[str, torch.Tensor]


def padded(sequences: list[list[int]]) -> Inputs:
    """Right-padded `input_ids` and `attention_mask` `[B, S]`."""
    seqlen = max(map(len, sequences))
    ids = torch.zeros(len(sequences), seqlen, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def draw(texts: Callable[[], list[list[int]]], accepts: Callable[[list[int]], bool], tries: int = 200_000) -> Inputs:
    """A batch of texts whose lengths are accepted, by rejection.

    Raises:
        RuntimeError: none of `tries` drawn batches was.
    """
    for _ in range(tries):
        chosen = texts()
        if accepts([len(text) for text in chosen]):
            return padded(chosen)
    raise RuntimeError(f"no batch was accepted in {tries} tries")


def workloads(texts: list[list[int]], batches: int, seed: int) -> dict[str, list[Inputs]]:
    """The batches of every workload, from tokenized paragraphs; the same for the same seed.

    `batches` are made of W1 and W3; W2 and W4 take long, and get one.
    """
    chance = random.Random(seed)
    stream = [token for text in texts for token in text[1:-1]]  # without the special tokens at both ends
    first, last = texts[0][0], texts[0][-1]
    long = [text for text in texts if len(text) >= 400]
    middling = [text for text in texts if 40 <= len(text) < 400]

    def pieces(count: int, length: int) -> list[list[int]]:
        starts = [chance.randrange(len(stream) - length) for _ in range(count)]
        return [[first, *stream[start : start + length - 2], last] for start in starts]

    def mean_to_max(lengths: list[int]) -> bool:
        return abs(statistics.mean(lengths) / max(lengths) - 0.30) <= 0.005

    def about_150(lengths: list[int]) -> bool:
        return abs(statistics.mean(lengths) - 150) <= 10

    return {
        "W1": [draw(lambda: chance.sample(texts, 32), mean_to_max) for _ in range(batches)],
        "W2": [padded(pieces(32, 128))],
        "W3": [padded(pieces(1, 16)) for _ in range(batches)],
        "W4": [draw(lambda: [chance.choice(long), *chance.sample(middling, 7)], about_150)],
    }


def real_tokens(model: Any, inputs: Inputs) -> torch.Tensor:
    """The model's last hidden state at the real tokens, `[T, D]` in float32."""
    return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()].float()


def check(stock: Any, fast: Any, exact: Any, batches: list[Inputs], dtype: str) -> dict[str, Any]:
    """The largest relative error of both against stock in float32, and whether the fast one is near enough."""
    stock_error = fast_error = 0.0
    passed = True
    for inputs in batches:
        reference = real_tokens(exact, inputs)
        one, other = (relative_error(real_tokens(model, inputs), reference) for model in (stock, fast))
        passed &= other <= error_bar(dtype, one)
        stock_error, fast_error = max(stock_error, one), max(fast_error, other)
    return {"stock_error": stock_error, "fast_error": fast_error, "same_answers": passed}


def measure(stock: Any, fast: Any, batches: list[Inputs], rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Times of both on every batch. The ratio is over all pairs of times: same batch, same round, one after the other."""
    medians: dict[str, list[float]] = {"stock": [], "fast": []}
    pairs: list[float] = []
    by_batch: list[float] = []
    for inputs in batches:
        calls = {"stock": lambda _, x=inputs: stock(**x), "fast": lambda _, x=inputs: fast(**x)}
        for call in calls.values():
            call(0)
        times = interleaved(calls, rounds, HostClock(), tick)
        for side, sample in times.items():
            medians[side].append(statistics.median(sample))
        pairs += [slow / quick for slow, quick in zip(times["stock"], times["fast"], strict=True)]
        by_batch.append(ratios(times["fast"], times["stock"]).median)
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    result: dict[str, Any] = {"ratio": Spread.of(pairs).to_dict(), "ratio_by_batch": by_batch}
    for side, seconds in medians.items():
        result[side] = {"ms": 1000 * statistics.mean(seconds), "tokens_per_s": tokens / sum(seconds)}
    return result


def describe(batches: list[Inputs]) -> dict[str, Any]:
    """Shapes, real tokens and share of padding."""
    masks = [inputs["attention_mask"] for inputs in batches]
    tokens, positions = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return {
        "shapes": [list(mask.shape) for mask in masks],
        "tokens": [int(mask.sum()) for mask in masks],
        "mean_to_max": [float(mask.sum(1).float().mean() / mask.shape[1]) for mask in masks],
        "padding_share": 1 - tokens / positions,
    }


def line(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    ratio = row.get("ratio")
    return [
        f"{row['dtype']} {row['workload']}",
        TITLES[row["workload"]],
        f"{row['padding_share']:.0%}",
        f"{row['stock_error']:.1e}",
        f"{row['fast_error']:.1e}",
        *(
            ["wrong answers", "not timed"] + [""] * 3
            if ratio is None
            else [
                f"{row['stock']['ms']:.2f}",
                f"{row['fast']['ms']:.2f}",
                f"{row['fast']['tokens_per_s']:,.0f}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                f"{row['bar']:.1f} {'met' if row['bar_met'] else 'MISSED'}",
            ]
        ),
    ]


HEADER = ["", "workload", "padding", "stock error", "fast error", "stock ms", "fast ms", "fast tokens/s", "ratio", "bar"]
_NOT_SHOWN = ("workload", "fast tokens/s", "stock error", "fast error")


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = found["environment"]
    flags = ", ".join(flag for flag, present in where["cpu_flags"].items() if present) or "unknown"
    return "\n\n".join(
        [
            "# all-MiniLM-L6-v2 on the CPU: fastencoder against stock sdpa",
            f"{where['device']}, {where['threads']} threads of {where['cpu_count']} CPUs ({flags}); "
            f"torch {where['torch']}, transformers {where['transformers']}, Python {where['python']}; {where['date']}. "
            f"Measured by `python benchmarks/cpu_minilm.py`: {found['options']['rounds']} interleaved rounds "
            f"(W3: ten times as many) over {found['options']['batches']} batches of W1 and W3 and one of W2 and W4. "
            "Times are medians per batch; the ratio is stock time over fast time of the same batch and round, median and "
            "quartiles. Errors are relative to stock in fp32, at real tokens; where they are too large nothing is timed.",
            markdown_table(HEADER, [line(row) for row in found["rows"]]),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="W1,W2,W3,W4", help="which of W1,W2,W3,W4")
    parser.add_argument("--dtypes", default="fp32,bf16", help="which of fp32,bf16,fp16")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, help="of each batch; ten times as many for W3")
    parser.add_argument("--batches", type=int, default=2, help="of W1 and W3; W2 and W4 get one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="chooses the paragraphs")
    parser.add_argument("--model", type=Path, help="another model's folder (default: the packaged MiniLM)")
    parser.add_argument("--out", type=Path, help="folder for cpu_minilm.json and .md (default: $OUT, benchmarks/results)")
    options = parser.parse_args(arguments)

    console = Console()
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    try:
        exact, tokenizer, folder = load(options.model, device)
    except DemoError as error:
        console.print(f"cpu_minilm: {error}", markup=False)
        return 2
    texts = tokenizer(paragraphs(10**6), truncation=True, max_length=LONGEST)["input_ids"]
    wanted = options.workloads.split(",")
    made = {name: b for name, b in workloads(texts, options.batches, options.seed).items() if name in wanted}

    rounds = {name: options.rounds * (10 if name == "W3" else 1) for name in made}
    found: dict[str, Any] = {
        "environment": environment(device),
        "options": {"rounds": options.rounds, "batches": options.batches, "seed": options.seed},
        "rows": [],
    }
    out = output_folder(options.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.inference_mode(), Progress(*columns, console=console, transient=True) as progress:
        for dtype in options.dtypes.split(","):
            stock, fast = pair(folder, DTYPES[dtype])
            for name, batches in made.items():
                task = progress.add_task(f"{dtype} {name}", total=rounds[name] * len(batches))
                row = {"dtype": dtype, "workload": name, **describe(batches)}
                row |= check(stock, fast, exact, batches, dtype)
                if row["same_answers"]:
                    row |= measure(stock, fast, batches, rounds[name], lambda task=task: progress.advance(task))
                    row["bar"] = BARS.get((dtype, name), 1.0)
                    row["bar_met"] = row["ratio"]["median"] >= row["bar"]
                found["rows"].append(row)
                write_json(out / "cpu_minilm.json", found)
                (out / "cpu_minilm.md").write_text(report(found) + "\n", encoding="utf-8")
                progress.remove_task(task)

    # Without the description, so that it fits a narrow terminal.
    table = Table(*(name for name in HEADER if name not in _NOT_SHOWN))
    for row in found["rows"]:
        table.add_row(*(cell for name, cell in zip(HEADER, line(row), strict=True) if name not in _NOT_SHOWN))
    console.print(table)
    console.print(f"written: {out / 'cpu_minilm.json'}, {out / 'cpu_minilm.md'}", markup=False, soft_wrap=True)
    return 0 if all(row["same_answers"] for row in found["rows"]) else 1


@torch.inference_mode(False)  # the weights of a model loaded in inference mode would be another kind of tensor
def pair(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The stock and the fast model."""
    stock, fast = (load(folder, torch.device("cpu"))[0].to(dtype) for _ in range(2))
    return stock, to_fast(fast)


if __name__ == "__main__":
    sys.exit(main())
