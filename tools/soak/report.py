"""The JSON and the page of a run: measured numbers only, and the machine on which they were measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import statistics
from typing import Any

from benchmarks.files import markdown_table

from .answers import COORDINATE, COSINE, Answers
from .plan import Found, Times

BAR = 3.0  # converted over unconverted throughput, bf16


def data(
    found: Found, answers: Answers, times: Times, clients: int, environment: dict[str, Any], threads: int
) -> dict[str, Any]:
    """Everything that the page is made of."""
    packages = ("fastapi", "uvicorn", "httpx")
    return {
        "environment": environment | {name: importlib.metadata.version(name) for name in packages},
        "threads": threads,
        "clients": clients,
        "times": dataclasses.asdict(times),
        "texts": {
            "number": len(answers.texts),
            "tokens": {
                "least": int(answers.tokens.min()),
                "mean": float(answers.tokens.mean()),
                "most": int(answers.tokens.max()),
            },
        },
        **dataclasses.asdict(found),
    }


def ratios(sides: dict[str, list[dict[str, float]]], what: str) -> list[float]:
    """Converted over stock, of the phases of the same round; not a number where stock answered nothing in time."""
    pairs = zip(sides["fast"], sides["stock"], strict=True)
    return [fast[what] / stock[what] if stock[what] else math.nan for fast, stock in pairs]


def page(run: dict[str, Any]) -> str:
    """Markdown."""
    env, texts = run["environment"], run["texts"]
    flags, lengths, times = env.get("cpu_flags") or {}, texts["tokens"], run["times"]
    lines = [
        "# Soak: the example server under load",
        "",
        f"`make soak`, {env['date'][:10]}. {env['device']}, {env['cpu_count']} CPUs for the server and its clients "
        f"(AMX: {'yes' if flags.get('amx_bf16') else 'no'}, avx512_bf16: {'yes' if flags.get('avx512_bf16') else 'no'}); "
        f"Python {env['python']}, torch {env['torch']}, transformers {env['transformers']}, FastAPI {env['fastapi']}, "
        f"uvicorn {env['uvicorn']}; sources {env['source_digest']}.",
        "",
        f"`examples/server.py` with the real all-MiniLM-L6-v2, {_threads(run['threads'])}. {run['clients']} clients ask "
        f"without a pause, 1 to 8 texts at a time, out of {texts['number']} texts of {lengths['least']} to {lengths['most']} "
        f"tokens (mean {lengths['mean']:.0f}). Each answer is compared with that of the stock model in fp32 to the text alone: "
        f"in fp32 no coordinate may differ by more than {COORDINATE:g}, in bf16 each cosine is at least {COSINE}.",
        "",
        f"**{run['answered']:,} requests were answered and compared, and {len(run['problems'])} promises broken.**",
        "",
        *[f"- {problem}" for problem in run["problems"]],
        "",
        "## Converted and unconverted",
        "",
        f"The same server with and without `--stock`, in turn: {times['rounds']} rounds of {times['phase']:.0f} seconds for "
        "each. Medians of the rounds; ratios are of phases of the same round. The clients take their part of the processor, in "
        "both. The latency is that of a server which is never idle.",
        "",
        markdown_table(
            [
                "dtype",
                "server",
                "texts/s",
                "tokens/s",
                "p50 ms",
                "p99 ms",
                "throughput over stock",
                "stock p99 over its",
            ],
            [row for dtype, sides in run["comparison"].items() for row in _sides(dtype, sides)],
        ),
        "",
        *_bar(run["comparison"]),
        "## Endurance",
        "",
        "The converted server at saturation, with hostile clients beside. Growth is of the resident memory after the warm-up: "
        f"the largest of the medians of eight parts of the time over that of the first; at most {times['growth']:.0%}.",
        "",
        markdown_table(
            ["dtype", "seconds", "requests compared", "texts/s", "p50 ms", "p99 ms", "resident MiB", "growth"],
            [
                [
                    dtype,
                    f"{row['seconds']:.0f}",
                    f"{row['answered']:,}",
                    f"{row['texts/s']:.0f}",
                    f"{row['p50 ms']:.0f}",
                    f"{row['p99 ms']:.0f}",
                    f"{row['resident MiB']:.0f}",
                    f"{row['growth']:+.2%}",
                ]
                for dtype, row in run["endurance"].items()
            ],
        ),
        "",
        "What the hostile clients sent, and how often. A bad request that did not get its status and its reason is a broken "
        "promise, and listed above:",
        "",
        markdown_table(["sent", "times"], [[kind, str(number)] for kind, number in sorted(run["hostile"].items())]),
        "",
        "## Killed, and told to end",
        "",
        "SIGKILL under load, then started again, with clients that never stop asking: " + _event(run["killed"]) + ".",
        "",
        "SIGTERM with requests in work: " + _event(run["drained"]) + ".",
        "",
    ]
    return "\n".join(lines)


def _threads(threads: int) -> str:
    return f"{threads} threads" if threads else "as many threads as torch chooses"


def _event(numbers: dict[str, float]) -> str:
    return ", ".join(f"{what} {number:g}" for what, number in numbers.items())


def _sides(dtype: str, sides: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    rows = []
    for side, phases in sides.items():
        middle = {what: statistics.median(phase[what] for phase in phases) for what in phases[0]}
        over = ["", ""]
        if side == "fast" and "stock" in sides:
            faster = ratios(sides, "texts/s")
            over = [
                f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})",
                f"{1 / statistics.median(ratios(sides, 'p99 ms')):.2f}",
            ]
        numbers = [f"{middle[what]:,.0f}" for what in ("texts/s", "tokens/s", "p50 ms", "p99 ms")]
        rows.append([dtype, "fastencoder" if side == "fast" else "stock", *numbers, *over])
    return rows


def _bar(comparison: dict[str, Any]) -> list[str]:
    sides = comparison.get("bf16", {})
    if "stock" not in sides:
        return []
    measured = statistics.median(ratios(sides, "texts/s"))
    return [f"Bar: {BAR:g} times the throughput in bf16. {'Met' if measured >= BAR else 'MISSED'}: {measured:.2f}.", ""]
