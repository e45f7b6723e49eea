"""CUDA graphs: all layers of a stack as one launch, for batches small enough that launching is what takes the time.

A graph replays fixed addresses and fixed launch grids, so it is captured for a bucket of shapes (packed tokens, sequences,
longest sequence) rounded up, with buffers of its own that a batch is copied into. What the rounding adds belongs to no
sequence: attention leaves it out, and every other operation treats tokens one by one.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..kernels._triton import cdiv, dot_precision, next_power_of_2
from ..kernels.varlen_attention import tile_list

MAX_GRAPHS = 32  # of one stack; batches of further buckets run without a graph
MAX_TOKENS = 4096  # above, the kernels take longer than their launches, and rounding up costs more than it saves

# (values, offsets, max_seqlen, tiles) -> values: what a graph holds. `tiles` is attention's list of work.
Forward = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor]


class Bucket(NamedTuple):
    """What one graph was captured for; a batch fits if it has at most as many of each."""

    tokens: int
    sequences: int
    longest: int


def bucket_of(lengths: Sequence[int]) -> Bucket:
    """The bucket of a batch with these sequence lengths: at most an eighth (at least 16) more tokens than it has."""
    tokens = max(sum(lengths), 1)
    step = max(16, next_power_of_2(tokens) // 16)
    sequences = 1
    while sequences < len(lengths):
        sequences *= 4
    return Bucket(cdiv(tokens, step) * step, sequences, max(16, next_power_of_2(max(lengths, default=1))))


@dataclass
class _Captured:
    graph: Any
    queries: int  # of one tile of attention's work
    values: torch.Tensor  # [tokens, D], what a replay reads
    plan: torch.Tensor  # int32: tiles [n, 2], then offsets [sequences + 2]
    output: torch.Tensor  # [tokens, D], what a replay writes


class GraphRunner:
    """The graphs of one stack, in one memory pool.

    Safe to use from several threads and streams: one batch at a time is copied in, replayed and copied out.

    Attributes:
        replays, captures: how many batches ran from a graph, and how many graphs were captured.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.clear()
        self.replays = 0
        self.captures = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of the model captures its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def clear(self) -> None:
        """Forgets every graph and gives their memory back."""
        with self._lock:
            self._captured: dict[tuple, _Captured] = {}
            self._seen: set[tuple] = set()
            self._weights: tuple = ()
            self._pool: Any = None
            self._last_use: Any = None
            self._failed = False

    def run(
        self,
        lengths: Sequence[int],
        hidden: torch.Tensor,
        take: Callable[[torch.Tensor], torch.Tensor],
        weights: tuple,
        queries_of: Callable[[int], int],
        forward: Forward,
        finish: Callable[[torch.Tensor], torch.Tensor],
        capture_now: bool = False,
    ) -> torch.Tensor | None:
        """Runs a packed batch from a graph; None if it has to run without one.

        A bucket is captured when it comes for the second time, so that a shape that never comes again costs nothing.

        Args:
            lengths: of the sequences, in tokens.
            hidden: `[..., D]`, the input with its padding.
            take: the real tokens `[T, D]` of `hidden`.
            weights: what the graphs depend on; another one (by equality) makes all of them anew.
            queries_of: how many queries of a sequence attention takes at a time, by the length of the longest one.
            forward: the layers, on buffers as large as the bucket.
            finish: makes new tensors of the output `[T, D]`, which the next replay overwrites.
            capture_now: do not wait for the second time.
        """
        if self._failed or not has_graphs(hidden.device) or not 0 < sum(lengths) <= MAX_TOKENS:
            return None
        bucket = bucket_of(lengths)
        key = (bucket, hidden.dtype, dot_precision(hidden.dtype))
        with self._lock:
            if weights != self._weights:
                self.clear()
                self._weights = weights
            captured = self._captured.get(key)
            if captured is None:
                if not capture_now and key not in self._seen:
                    self._seen.add(key)
                    return None
                if len(self._captured) >= MAX_GRAPHS:
                    return None
                captured = self._capture(bucket, queries_of(bucket.longest), hidden, forward)
                if captured is None:
                    return None
                self._captured[key] = captured
            return self._replay(captured, bucket, lengths, take(hidden), finish)

    def _capture(self, bucket: Bucket, queries: int, hidden: torch.Tensor, forward: Forward) -> _Captured | None:
        with torch.inference_mode(False), torch.no_grad():  # buffers that both modes may write to
            inputs = hidden.new_zeros(bucket.tokens, hidden.shape[-1])
            plan = make_plan(bucket, queries, ()).to(hidden.device)
            tiles, offsets = plan_parts(plan, bucket)
            try:
                if self._pool is None:
                    self._pool = new_pool(hidden.device)
                graph, output = capture(
                    lambda: forward(inputs, offsets, bucket.longest, tiles), hidden.device, self._pool
                )
            except torch.OutOfMemoryError:
                self.clear()  # the memory that is left may do for running without graphs
                self._failed = True
                _warn_failed("there is not enough memory")
                return None
            except Exception as error:
                self._failed = True
                _warn_failed(f"{type(error).__name__}: {error}")
                return None
        self.captures += 1
        return _Captured(graph, queries, inputs, plan, output)

    def _replay(
        self,
        captured: _Captured,
        bucket: Bucket,
        lengths: Sequence[int],
        values: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        plan = make_plan(bucket, captured.queries, lengths)
        on_device = values.is_cuda
        if on_device and self._last_use is not None:
            self._last_use.wait()  # the last batch may be on another stream
        with torch.no_grad():
            captured.plan.copy_(plan.pin_memory() if on_device else plan, non_blocking=True)
            captured.values[: values.shape[0]].copy_(values)
            captured.graph.replay()
            output = finish(captured.output[: values.shape[0]])
        if on_device:
            if self._last_use is None:
                self._last_use = torch.cuda.Event()
            self._last_use.record()
        self.replays += 1
        return output


def make_plan(bucket: Bucket, queries: int, lengths: Sequence[int]) -> torch.Tensor:
    """Tiles and offsets of a batch in a bucket, on the host: one copy to the device. The sequences that the batch does not
    have are empty, and so is one more, which the tiles that it does not need name."""
    # No batch in the bucket has more tiles: all but the last of a sequence are full.
    most = min(bucket.tokens // queries + bucket.sequences, bucket.sequences * cdiv(bucket.longest, queries))
    tiles = torch.tensor([[bucket.sequences, 0]], dtype=torch.int32).repeat(most, 1)
    listed = tile_list(lengths, queries)
    tiles[: len(listed)] = listed
    offsets = torch.zeros(bucket.sequences + 2, dtype=torch.int32)
    offsets[1 : len(lengths) + 1] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    offsets[len(lengths) + 1 :] = sum(lengths)
    return torch.cat([tiles.flatten(), offsets])


def plan_parts(plan: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the tiles `[n, 2]` and the offsets `[sequences + 2]` in a plan."""
    count = plan.shape[0] - (bucket.sequences + 2)
    return plan[:count].view(-1, 2), plan[count:]


def has_graphs(device: torch.device) -> bool:
    """Whether launches on this device can be captured, and are not being captured by somebody else."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def new_pool(device: torch.device) -> Any:
    """A memory pool that the graphs of one stack share: they never run at the same time."""
    return torch.cuda.graph_pool_handle()


def capture(function: Callable[[], torch.Tensor], device: torch.device, pool: Any) -> tuple[Any, torch.Tensor]:
    """Records what `function` launches on `device`: the graph, and the tensor that its replays write."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what happens once (compiling, workspaces) happens before
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and launch meanwhile: only this one is watched.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = function()
    return graph, output


def _warn_failed(why: str) -> None:
    warnings.warn(
        f"fastencoder: a CUDA graph could not be captured ({why}). The layers run without graphs from now on: results stay "
        "right, small batches are slower.",
        RuntimeWarning,
        stacklevel=2,
    )
