"""`SentenceTransformer.encode` of real paragraphs: fastencoder beside sentence-transformers' own backends."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clocks import Spread, ratios
from benchmarks.cpu import cell, judge, results
from benchmarks.cpu.bars import HEADER, Bar
from benchmarks.cpu.pool import Pool
from benchmarks.cpu.systems import ENCODE_BATCH, ENCODERS, Source
from benchmarks.files import markdown_table, read_json, write_json, write_text

FILE, PAGE = "encode.json", "encode.md"
STOCK, NAME = "encode torch", "encode"
LEAST = {"fp32": 1.5, "bf16": 2.5}  # times as fast as the best of its own backends
WORDS = 150  # of a text: longer paragraphs are cut in pieces, as a user of a model for short texts would cut them
Results = dict[str, dict[str, Any]]  # dtype -> what was measured


def texts(count: int) -> list[str]:
    """`count` different paragraphs of `pydoc_data.topics`, spread evenly over it; long ones are several texts.

    Raises:
        ValueError: there are not so many.
    """
    from fastencoder.demo.data import paragraphs

    words = (paragraph.split() for paragraph in paragraphs(10**9))
    pieces = (" ".join(each[start : start + WORDS]) for each in words for start in range(0, len(each), WORDS))
    every = list(dict.fromkeys(pieces))
    if not 0 < count <= len(every):
        raise ValueError(f"there are {len(every)} texts, not {count}")
    return [every[index * len(every) // count] for index in range(count)]


def measure(
    source: Source, dtype: str, count: int, rounds: int, threads: int, say: cell.Say, tick: Callable
) -> dict[str, Any]:
    """Every system's embeddings compared with stock's in fp32, then the right ones timed in turn.

    Raises:
        RuntimeError: stock does not run.
    """
    with tempfile.TemporaryDirectory(prefix="fastencoder-bench-") as name:
        folder = Path(name)
        file = folder / "texts.npz"
        chosen = texts(count)
        np.savez(file, texts=np.array(chosen))
        with Pool([STOCK], source, "fp32", threads, say) as pool:
            said = pool.warm(NAME, file, [], folder) if pool.running else pool.status
        if "warm_seconds" not in said[STOCK]:
            raise RuntimeError(f"stock does not run: {said[STOCK]}")
        reference = np.load(folder / f"{STOCK}.npy")
        with Pool(_systems(dtype), source, dtype, threads, say) as pool:
            found = {system: dict(status) for system, status in pool.status.items()}
            for system, reply in pool.warm(NAME, file, [], folder).items():
                found[system] |= reply
                if "warm_seconds" in reply:
                    found[system] |= compare(np.load(folder / f"{system}.npy"), reference, dtype)
            right = [system for system, result in found.items() if result.get("equal")]
            say(f"timing {len(right)} systems")
            calls = {system: partial(cell.call, pool, system, NAME) for system in right}
            for system, times in cell.in_turn(calls, rounds, tick).items():
                if len(times) == rounds:
                    found[system]["seconds"] = times
                else:
                    found[system] |= {"failed": pool.status[system].get("failed", "it failed while it was timed")}
            kept = {system: cell.kept(result) for system, result in found.items()}
            return {
                "texts": count,
                "words": sum(len(text.split()) for text in chosen),
                "systems": kept,
                "versions": pool.versions,
            }


def _systems(dtype: str) -> list[str]:
    """In fp32 those with a dtype of their own do not differ from the others, but for ONNX Runtime, which has no other."""
    same = ("encode torch fp32", "encode openvino fp32") if dtype == "fp32" else ()
    return [name for name, system in ENCODERS.items() if name not in same and dtype not in system.without]


def compare(answer: np.ndarray, reference: np.ndarray, dtype: str) -> dict[str, Any]:
    """Judge embeddings `[N, D]` against those of stock in fp32, by the rules of the other cells."""
    verdict = judge.compare(answer, reference[:, None], [1] * len(reference), dtype)
    found = {"error": verdict.error, "cosine": verdict.cosine, "equal": verdict.equal}
    return found if verdict.equal else found | {"wrong": verdict.why}


def merge(folder: Path, dtype: str, measured: dict[str, Any]) -> Results:
    """Put what was measured in `encode.json`; returns all that is there."""
    found: Results = {**(read_json(folder / FILE) or {}), dtype: measured}
    write_json(folder / FILE, found)
    return found


def write(folder: Path, found: Results) -> list[Path]:
    """`encode.md`, of what is in `encode.json`."""
    write_text(folder / PAGE, markdown(found))
    return [folder / FILE, folder / PAGE]


def bars(found: Results) -> Iterator[Bar]:
    """Ours over the best of sentence-transformers' own backends, in the same rounds."""
    for dtype, least in LEAST.items():
        times = _times(found.get(dtype, {}))
        mine, theirs = _fastest(times, ours=True), _fastest(times, ours=False)
        lead = ratios(times[mine], times[theirs]).median if mine and theirs else None
        yield Bar(f"encode {dtype}, over the best backend", least, lead, _short(theirs) if theirs else "")


def markdown(found: Results) -> str:
    """The whole report."""
    rows = [bar.line() for bar in bars(found)]
    blocks = ["# SentenceTransformer.encode on this CPU", HOW, markdown_table(HEADER, rows)]
    for dtype, measured in found.items():
        where = measured["environment"]
        blocks.append(f"## {dtype}")
        blocks.append(
            f"{measured['texts']:,} texts, {measured['words']:,} words, on {where['device']}, "
            f"{where['threads']} threads."
        )
        blocks.append(
            markdown_table(["", "seconds", "texts/s", "fastencoder over it", "error", "cosine"], list(_rows(measured)))
        )
    return "\n\n".join(blocks) + "\n"


HOW = (
    "all-MiniLM-L6-v2 with its real weights turns paragraphs of Python's language reference into vectors: "
    f"`model.encode(texts, batch_size={ENCODE_BATCH})`, with tokenizing, sorting by length and pooling. Every system runs in a "
    "process of its own; in every round each is timed once, and the others sleep. Times are medians over the rounds, ratios "
    "are of times of the same round. *Error* and *cosine* are the worst of an embedding against stock in fp32; one that is "
    "not near enough (fp32: error 1e-4, bf16: cosine 0.999) has no speed. In bf16 every system may also compute in fp32; ONNX "
    "Runtime has nothing else on a CPU. *Unpadded* is fastencoder with sentence-transformers' `unpad_inputs=True`."
)


def _rows(measured: dict[str, Any]) -> Iterator[list[str]]:
    times = _times(measured)
    mine = _fastest(times, ours=True)
    for system, result in measured["systems"].items():
        near = [f"{result['error']:.1e}", f"{result['cosine']:.5f}"] if "error" in result else ["", ""]
        if system not in times:
            yield [_short(system), results.said(result), "", "", *near]
            continue
        seconds = Spread.of(times[system]).median
        lead = f"{ratios(times[mine], times[system]).median:.2f}" if mine else ""
        yield [_short(system), f"{seconds:.2f}", f"{measured['texts'] / seconds:,.0f}", lead, *near]


def _times(measured: dict[str, Any]) -> dict[str, list[float]]:
    return {name: result["seconds"] for name, result in measured.get("systems", {}).items() if result.get("seconds")}


def _fastest(times: dict[str, list[float]], ours: bool) -> str | None:
    there = {name: statistics.median(each) for name, each in times.items() if ("fastencoder" in name) is ours}
    return min(there, key=there.__getitem__) if there else None


def _short(system: str) -> str:
    return system.removeprefix("encode ")
