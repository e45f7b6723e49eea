"""What a device can reach at most: its datasheet, and what the vendor's GEMM and a copy reach in this very process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.clocks import Call, Spread, clock_for, interleaved

L2_BYTES = 128 * 2**20  # twice the largest second-level cache among the devices below


@dataclass(frozen=True)
class Datasheet:
    """Dense 16-bit matrix rate in FLOP/s, and memory bandwidth in bytes/s."""

    flops: float
    bandwidth: float


# The vendor's datasheets, by what torch calls the device; the first that fits.
DATASHEETS = {
    "H100 80GB HBM3": Datasheet(989.4e12, 3.35e12),  # SXM
    "H100 PCIe": Datasheet(756e12, 2.0e12),
    "H200": Datasheet(989.4e12, 4.8e12),
    "A100-SXM4-80GB": Datasheet(312e12, 2.039e12),
    "A100-SXM4-40GB": Datasheet(312e12, 1.555e12),
}


def datasheet(device_name: str) -> Datasheet | None:
    """None for a device that is not listed: then no fraction of its limits is reported."""
    return next((sheet for name, sheet in DATASHEETS.items() if name in device_name), None)


def operations(config: Any, lengths: Sequence[int]) -> float:
    """Floating-point operations of one forward of the layers, at real tokens.

    With D the hidden size, F the feed-forward size, L the layers and s the tokens of each sequence:
    `L * sum(s * (8 D^2 + 4 D F) + 4 s^2 D)` (for F = 4 D: `24 D^2 L + 4 s D L` a token).
    """
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return float(layers * sum(s * (8 * d * d + 4 * d * f) + 4 * s * s * d for s in lengths))


def weight_bytes(config: Any, itemsize: int = 2) -> float:
    """Bytes of the matrices of all layers, each of which a forward reads at least once."""
    d, f = config.hidden_size, config.intermediate_size
    return float(itemsize * config.num_hidden_layers * (4 * d * d + 2 * d * f))


def floor_seconds(config: Any, lengths: Sequence[int], device_name: str) -> float | None:
    """No forward is faster on this device: the larger of arithmetic and reading the weights."""
    sheet = datasheet(device_name)
    if sheet is None:
        return None
    return max(operations(config, lengths) / sheet.flops, weight_bytes(config) / sheet.bandwidth)


@dataclass
class Repeated:
    """Several calls as one, from a CUDA graph where that works: what a kernel takes when nobody waits for its launch."""

    run: Call
    count: int
    from_graph: bool


def repeated(calls: Sequence[Callable[[], object]], device: torch.device) -> Repeated:
    """Warm calls, made ready to be timed together. They should use different memory, together more than a cache holds."""
    for _ in range(2):
        for call in calls:
            call()

    def all_of_them(turn: int = 0) -> None:
        for call in calls:
            call()

    if device.type == "cpu":
        return Repeated(all_of_them, len(calls), False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_of_them()
    except RuntimeError:  # something in it asks the device
        torch.cuda.synchronize()
        return Repeated(all_of_them, len(calls), False)
    return Repeated(lambda turn: graph.replay(), len(calls), True)


def seconds_each(
    systems: dict[str, Sequence[Callable[[], object]]], device: torch.device, rounds: int = 15
) -> dict[str, Spread]:
    """Seconds of one call of every system, in interleaved rounds."""
    made = {name: repeated(calls, device) for name, calls in systems.items()}
    for one in made.values():
        one.run(0)
    times = interleaved({name: one.run for name, one in made.items()}, rounds, clock_for(device))
    return {name: Spread.of([t / made[name].count for t in sample]) for name, sample in times.items()}


def input_sets(bytes_of_one: float, device: torch.device) -> int:
    """How many sets of inputs together do not fit a cache."""
    return 2 if device.type == "cpu" else max(4, min(24, int(L2_BYTES / max(bytes_of_one, 1)) + 1))


def gemm_flops(shape: tuple[int, int, int]) -> float:
    """Of `[T, K] @ [K, N]`, given as (T, N, K)."""
    tokens, n, k = shape
    return 2.0 * tokens * n * k


def layer_shapes(config: Any, tokens: int) -> list[tuple[int, int, int]]:
    """The four products of a layer, as (T, N, K): QKV, output, and both of the feed-forward network."""
    d, f = config.hidden_size, config.intermediate_size
    return [(tokens, 3 * d, d), (tokens, d, d), (tokens, f, d), (tokens, d, f)]


def vendor_forward(config: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The vendor's GEMM on the very products of one forward, each layer with weights of its own: seconds and FLOP/s."""
    shapes = layer_shapes(config, tokens) * config.num_hidden_layers
    inputs = {k: torch.randn(tokens, k, device=device).to(dtype) for _, _, k in shapes}
    weights = [torch.randn(n, k, device=device).to(dtype) for _, n, k in shapes]

    def products() -> None:  # one call: a forward is what is timed, and its weights are more than a cache holds
        for (_, _, k), weight in zip(shapes, weights, strict=True):
            F.linear(inputs[k], weight)

    seconds = seconds_each({"vendor": [products]}, device, 9)["vendor"].median
    return {"seconds": seconds, "flops": sum(map(gemm_flops, shapes)) / seconds}


@cache
def vendor_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the vendor's GEMM at (T, N, K)."""
    tokens, n, k = shape
    sets = input_sets((tokens * (n + k) + n * k) * dtype.itemsize, device)
    pairs = [
        (torch.randn(tokens, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)) for _ in range(sets)
    ]
    calls = [lambda x=x, w=w: F.linear(x, w) for x, w in pairs]
    return gemm_flops(shape) / seconds_each({"vendor": calls}, device, 9)["vendor"].median


@cache
def copy_rate(moved: int, device: torch.device) -> float:
    """Bytes/s of a copy that moves (reads and writes) about as many bytes in all."""
    size = max(moved // 2, 16)
    sets = input_sets(2 * size, device)
    pairs = [tuple(torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2)) for _ in range(sets)]
    calls = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
    return 2 * size / seconds_each({"copy": calls}, device, 9)["copy"].median


def device_limits(device: torch.device, quick: bool) -> dict[str, Any]:
    """A large matrix product per dtype and a large copy."""
    size, moved = (256, 2**20) if quick else (8192, 2**31)
    found: dict[str, Any] = {"passed": True, "matmul_size": size, "matmul_tflops": {}}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))[: 1 if device.type == "cpu" else 2]:
        found["matmul_tflops"][name] = vendor_rate((size,) * 3, dtype, device) / 1e12
    found["copy_gb_per_s"] = copy_rate(moved, device) / 1e9
    return found
