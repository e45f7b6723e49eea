"""One table for every part of the GPU examination, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.files import markdown_table

Rows = dict[str, Any]
_DTYPES = ("fp32", "fp16", "bf16")


def kernels(rows: Rows) -> list[str]:
    """One line for every operation and dtype, and one for every file of tests."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, found in rows.items():
        operation, what = name.split()[:2]
        groups.setdefault(f"{operation} {what}" if what in _DTYPES or operation == "pytest" else operation, []).append(found)
    lines, tests = [], []
    for group, members in groups.items():
        if group.startswith("pytest"):
            found = members[0]
            counts = found.get("counts", {})
            said = ", ".join(f"{count} {name}" for name, count in counts.items()) or found.get("not_available", "")
            tests.append([group, said or found.get("why", "it did not end")])
            continue
        there = [found for found in members if "not_available" not in found]
        ways = [found[way] for found in there for way in ("api", "kernel") if way in found]
        missing = f" ({len(members) - len(there)} not available)" * (len(there) < len(members))
        lines.append(
            [
                group,
                f"{sum(found['passed'] for found in there)} of {len(there)}{missing}",
                f"{max((way.get('error', 0.0) for way in ways), default=0.0):.1e}",
                f"{max((way.get('ratio', 0.0) for way in ways), default=0.0):.2f}",
                f"{max((way.get('bound_used', 0.0) for way in ways), default=0.0):.2f}",
                f"{sum(bool(found.get('api', {}).get('launched')) for found in there)} of {len(there)}",
            ]
        )
    blocks = [
        "Errors against float64, and as a multiple of torch's own in the same dtype; 'bound used' above 1 fails.",
        markdown_table(["", "passed", "largest error", "largest ratio to torch", "bound used", "ran in Triton"], lines),
    ]
    return blocks + [markdown_table(["tests", "result"], tests)] * bool(tests)


def parity(rows: Rows) -> list[str]:
    """One line a row."""
    lines = []
    for name, found in rows.items():
        errors = [f"{found[key]:.1e}" if key in found else "" for key in ("stock_error", "fast_error", "bar")]
        calls = f"{found['fast_calls']}/{found['delegated_calls']}" if "fast_calls" in found else ""
        calls = f"{found['replays']} replays" if "replays" in found else calls
        lines.append([name, *errors, calls, found.get("not_available") or ("yes" if found["passed"] else "NO")])
    return [
        "Relative errors against stock in float64, at real tokens.",
        markdown_table(["", "stock", "fast", "bar", "calls fast/delegated", "passed"], lines),
    ]


SPEED_HEADER = ["", "system", "ms", "real tokens/s", "x stock", "ours is", "TFLOP/s", "of vendor GEMM", "of floor", "error"]
SPEED_EXPLAINED = (
    "Milliseconds: medians with quartiles over interleaved rounds. 'x stock' is stock sdpa's time over this one's, 'ours is' "
    "this one's over fastencoder's (the faster of its two), both in the same round. TFLOP/s count real tokens only; 'of vendor "
    "GEMM' divides them by what the vendor's GEMM reaches on the four products of these layers, 'of floor' is the least time "
    "that the datasheet allows over this one. Errors are relative to stock in fp32; a system with wrong answers is not timed."
)


def speed(rows: Rows) -> list[str]:
    """One line for every cell and system."""
    blocks = [SPEED_EXPLAINED]
    limits = next((found for found in rows.values() if "matmul_tflops" in found), None)
    if limits is not None:
        reached = ", ".join(f"{dtype} {tflops:,.1f} TFLOP/s" for dtype, tflops in limits["matmul_tflops"].items())
        copied = f"copy {limits['copy_gb_per_s']:,.0f} GB/s, read and written"
        blocks.append(f"In the same process: {limits['matmul_size']}³ matrix product {reached}; {copied}.")
    lines = []
    for name, found in rows.items():
        for system, result in found.get("systems", {}).items():
            if result.get("status") != "timed":
                lines.append([name, system, result.get("status", "not timed"), *[""] * (len(SPEED_HEADER) - 3)])
                continue
            ms, lead = result["ms"], result.get("ours_is_faster")
            lines.append(
                [
                    name,
                    system,
                    f"{ms['median']:.3f} ({ms['low']:.3f} to {ms['high']:.3f})",
                    f"{result['tokens_per_s']:,.0f}",
                    f"{result['ratio_to_stock']['median']:.2f}",
                    "" if lead is None else f"{lead['median']:.2f}",
                    f"{result['tflops']:.1f}",
                    f"{result['of_vendor_gemm']:.0%}",
                    "" if result["of_floor"] is None else f"{result['of_floor']:.0%}",
                    f"{result['error']:.1e}",
                ]
            )
    return [*blocks, markdown_table(SPEED_HEADER, lines)]


COMPILE_EXPLAINED = (
    "Each fixed shape of reduce-overhead and max-autotune, and each model of the dynamic mode, has to be compiled. So "
    "torch.compile is measured on the cells of the bars first, and on as many more as the time allows; a batch of one only "
    "with CUDA graphs (reduce-overhead, max-autotune), which is what compilation is used for there."
)


def compiled(rows: Rows) -> list[str]:
    """As `speed`, with the reason why most cells are not there."""
    return [COMPILE_EXPLAINED, *speed(rows)]


def launches(rows: Rows) -> list[str]:
    """One line a model."""
    lines = []
    for name, found in rows.items():
        if "launches_a_layer" not in found:
            lines.append([name, found.get("not_available", found.get("why", "")), *[""] * 4])
            continue
        counts = [f"{found['launches_a_layer']:g}", f"{found['launches_a_forward']} ({found['layers']} layers)"]
        counts += [str(found["host_calls"]), str(found["syncs_a_forward"])]
        lines.append([name, *counts, found["above_the_bar"]])
    header = ["", "kernels a layer", "kernels a forward", "calls that launch", "waits a forward", "above the bar"]
    return [markdown_table(header, lines)]


def rates(rows: Rows) -> list[str]:
    """One line for every kernel and shape."""
    lines = []
    for name, found in rows.items():
        if "us" not in found:
            lines.append([name, found.get("not_available", found.get("why", "")), *[""] * 4])
            continue
        us, tflops = found["us"], f"{found['tflops']:.1f}" if found["tflops"] else ""
        time = f"{us['median']:.2f} ({us['low']:.2f} to {us['high']:.2f})"
        lines.append([name, time, f"{found['gb_per_s']:,.0f}", tflops, f"{found['of_limit']:.0%}", found["limit"]])
    return [
        "bf16, from a CUDA graph of calls on up to 24 sets of inputs in turn, more than a cache holds where they are large "
        "enough. The limit is a copy of as many bytes, likewise, or the vendor's GEMM at the same shape (attention: at 4096³).",
        markdown_table(["", "µs", "GB/s", "TFLOP/s", "of limit", "limit"], lines),
    ]


def dispatch(rows: Rows) -> list[str]:
    """One line a contest: what the heuristics chose, and what was fastest."""
    lines = []
    for name, found in rows.items():
        us = found.get("us", {})
        if not us:
            lines.append([name, found.get("not_available", found.get("why", "")), *[""] * 5])
            continue
        vendor, chosen = (f"{us[key]:.1f}" if key in us else "" for key in ("vendor", "chosen"))
        lost = f"{found['lost']:.0%}" if "lost" in found else ""
        lines.append([name, found["choice"], chosen, vendor, found["best"], f"{us[found['best']]:.1f}", lost])
    return [
        "Microseconds of one call. 'lost' is what the heuristics' choice takes more than the fastest candidate.",
        markdown_table(["", "choice", "its µs", "vendor µs", "fastest", "its µs", "lost"], lines),
    ]


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "kernels": kernels,
    "parity": parity,
    "speed": speed,
    "launches": launches,
    "rates": rates,
    "dispatch": dispatch,
    "compile": compiled,
}
