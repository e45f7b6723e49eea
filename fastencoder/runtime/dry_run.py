"""What a GPU would be asked to run: the real layer program on tensors without storage, with every launch written down.

Nothing here knows how a kernel chooses its tiles. Requests of many sizes go through `layers.program.run_layer`, and where two
neighbouring sizes ask for different kernels, the sizes between them are tried until the border is found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import fingerprints
from ..families.embeddings import EMBEDDINGS
from ..kernels import _dispatch, _triton, embed_norm
from ..kernels._triton import DeviceLimits, Launch, cdiv
from ..kernels.varlen_attention import query_block
from ..layers import FastLayer
from ..layers.binding import Binding
from ..layers.program import run_layer
from ..layers.settings import DEFAULT
from ..layers.weights import Projections
from ..packing import PackedBatch
from ..registry import qualified_name
from ..report import survey
from . import graphs


class Shape(NamedTuple):
    """A batch: how many tokens, in how many sequences, the longest of which has how many.

    With `1 <= longest <= tokens` and `sequences` between `tokens / longest` and `tokens - longest + 1`.
    """

    tokens: int
    sequences: int
    longest: int

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths with these sums; all but the longest are as equal as they can be."""
        rest, others = self.tokens - self.longest, self.sequences - 1
        return [self.longest, *(rest // others + (i < rest % others) for i in range(others))]


@dataclass(frozen=True)
class Bounds:
    """The largest batch that is looked at: tokens of all sequences together, and tokens of one of them."""

    max_tokens: int
    max_seqlen: int


# By kernel, options, constants, and what each argument is specialised on.
Key = tuple[Any, ...]


def dry_run(model: nn.Module, limits: DeviceLimits, shapes: Iterable[Shape]) -> list[Launch]:
    """The Triton launches of a model's fast layers for batches of these shapes, each kind of launch once.

    Args:
        model: a model with fast layers, or with layers that can be fast. It is not changed, and nothing of it is copied.
        limits: of the GPU.
        shapes: of the batches. Each is looked at as a batch that had padding, and as one that had none.

    Raises:
        ValueError: the model has no layer that can be fast.
    """
    layers = _Layers(model)
    found: dict[Key, Launch] = {}
    for shape in shapes:
        found.update(layers.ask(limits, shape) | layers.ask_about_masks(limits, shape))
    found.update(_embedding_launches(model, limits))
    return list(found.values())


def every_launch(model: nn.Module, limits: DeviceLimits, bounds: Bounds) -> list[Launch]:
    """The Triton launches that any batch within `bounds` can ask for, each kind once. Takes and raises what `dry_run` does."""
    layers = _Layers(model)
    found: dict[Key, Launch] = {}

    def few(tokens: int, longest: int) -> Shape:
        return Shape(tokens, cdiv(tokens, longest), longest)

    def ask(shape: Shape) -> frozenset[Key]:
        launches = layers.ask(limits, shape)
        found.update(launches)
        return frozenset(launches)

    lengths = _steps(min(bounds.max_seqlen, bounds.max_tokens))
    for longest in lengths:
        counts = [count for count in _steps(bounds.max_tokens) if count > longest]
        _explore(lambda count, longest=longest: ask(few(count, longest)), [longest, *counts])
        widest = Shape(bounds.max_tokens, bounds.max_tokens - longest + 1, longest)
        ask(widest)
        for shape in (widest, Shape(longest, 1, longest)):
            found.update(layers.ask_about_masks(limits, shape))
    for count in {lengths[-1], bounds.max_tokens}:
        _explore(lambda longest, count=count: ask(few(count, longest)), lengths)
    found.update(_embedding_launches(model, limits))
    return list(found.values())


def _steps(limit: int) -> list[int]:
    """1 to `limit`: powers of two, and what lies just above them."""
    steps = {1, limit}
    power = 2
    while power < limit:
        steps |= {power, power + 1}
        power *= 2
    return sorted(step for step in steps if step <= limit)


def _explore(ask: Callable[[int], frozenset[Key]], points: Sequence[int]) -> frozenset[Key]:
    """Everything that is asked for at `points` and, where neighbours differ, between them."""
    answers = [(point, ask(point)) for point in points]
    found = frozenset().union(*(answer for _, answer in answers))
    between = list(zip(answers, answers[1:], strict=False))
    while between:
        (low, at_low), (high, at_high) = between.pop()
        if high - low > 1 and at_low != at_high:
            middle = ((low + high) // 2, ask((low + high) // 2))
            found |= middle[1]
            between += [((low, at_low), middle), (middle, (high, at_high))]
    return found


def _embedding_launches(model: nn.Module, limits: DeviceLimits) -> dict[Key, Launch]:
    """What the model's fast embeddings launch, whatever the batch: ids come in either of two types."""
    with _triton.recording(limits) as launches, torch.inference_mode():
        for module in model.modules():
            adapter = EMBEDDINGS.get(qualified_name(getattr(module, "original_class", type(module))))
            if adapter is None:
                continue
            norm, ids = module.LayerNorm, torch.empty(16, dtype=torch.int64, device="meta")
            tables = [_meta_like(module.word_embeddings.weight), _meta_like(module.position_embeddings.weight)]
            types = _meta_like(module.token_type_embeddings.weight) if adapter.has_types else None
            for dtype in (torch.int32, torch.int64):
                embed_norm(
                    ids.to(dtype),
                    tables[0],
                    _meta_like(norm.weight),
                    None if norm.bias is None else _meta_like(norm.bias),
                    norm.eps,
                    position_ids=ids,
                    position_table=tables[1],
                    type_ids=None if types is None else ids,
                    type_table=types,
                )
    return {key_of(launch): launch for launch in launches}


def _meta_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


class _Layers:
    """The different layers of a model, with weights that have no storage."""

    def __init__(self, model: nn.Module) -> None:
        found: dict[Hashable, Binding] = {}
        for row, layer in survey(model, fingerprints.find_all(model), [], DEFAULT):
            if row.status in ("eligible", "fast") and row.level == "layer":
                found.setdefault(_form(layer), _without_storage(layer))
        if not found:
            raise ValueError(f"{type(model).__name__} has no layer that can be fast")
        _check_foreseeable(list(found.values()))
        self._parts: list[tuple[Binding, Projections]] = []
        for binding in found.values():
            with _dispatch.implementation("cuda"):  # the weights are laid out for the device that they run on
                self._parts.append((binding, Projections(binding)))

    def ask(self, limits: DeviceLimits, shape: Shape) -> dict[Key, Launch]:
        """What one batch of this shape launches."""
        with _triton.recording(limits) as launches, torch.inference_mode(), _Device(shape.lengths):
            for binding, projections in self._parts:
                _run_packed(binding, projections, shape)
                _run_padded(binding, projections, shape)
                if shape.tokens <= graphs.MAX_TOKENS:
                    _run_in_a_graph(binding, projections, shape)
        return {key_of(launch): launch for launch in launches}

    def ask_about_masks(self, limits: DeviceLimits, shape: Shape) -> dict[Key, Launch]:
        """What reading the masks of such a batch launches, in every form in which they may come."""
        with _triton.recording(limits) as launches, torch.inference_mode(), _Device(shape.lengths):
            for binding, projections in self._parts:
                for seqlen in _widths(shape):
                    for mask in _masks(shape.sequences, seqlen, projections.dtype):
                        PackedBatch.geometry(_hidden(binding, projections, shape, seqlen), mask, _marks(binding))
        return {key_of(launch): launch for launch in launches}


def _check_foreseeable(bindings: list[Binding]) -> None:
    """Raises ValueError where the launches of a layer depend on more than the shape of the batch."""
    for binding in bindings:
        adapter = binding.adapter
        opaque = binding.spec is not None and binding.spec.opaque
        if adapter.attention != "plain" or adapter.offsets or adapter.grid or opaque:
            what = "it holds parts that are called as they are" if opaque else "its attention takes more than the shape says"
            raise ValueError(
                f"what a layer of {adapter.family} launches cannot be foreseen: {what}. Its kernels compile when they are "
                "first called; fastencoder.warmup does that ahead of traffic"
            )


class _Device(TorchFunctionMode):
    """What a device would answer about tensors that have no storage here.

    Args:
        lengths: what a forward reads back from the device: how many tokens each sequence has.
    """

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self._lengths = lengths

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.tolist and args[0].is_meta:
            return list(self._lengths)
        if func is nn.functional.linear:  # the vendor's product, which torch takes a millisecond for without storage
            x, weight = args[:2]
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        return func(*args, **(kwargs or {}))


def _form(layer: nn.Module) -> Hashable:
    """Layers of one form launch the same kernels."""
    parameters = [(name, parameter.shape, parameter.dtype) for name, parameter in layer.named_parameters()]
    return type(layer), tuple(parameters), repr(layer)


def _without_storage(layer: nn.Module) -> Binding:
    """The parts of a copy of the layer, whose parameters are on the meta device. The layer itself stays as it is."""
    tensors = (*layer.parameters(), *layer.buffers())
    with torch.inference_mode(False):
        twin = copy.deepcopy(layer, memo={id(tensor): tensor for tensor in tensors})
        if isinstance(layer, FastLayer):
            binding = Binding(twin, layer.original_class, layer._fastencoder.adapter)
        else:
            known = fingerprints.find(type(layer))
            assert known is not None  # it is a layer that the survey found
            binding = Binding(twin, type(layer), known.adapter)
        twin.to("meta")
    return binding


def _run_packed(binding: Binding, projections: Projections, shape: Shape) -> None:
    """A batch that arrives packed; without padding the layers run the same."""
    values = torch.empty(shape.tokens, binding.spec.hidden_size, dtype=projections.dtype, device="meta")
    offsets = torch.empty(shape.sequences + 1, dtype=torch.int32, device="meta")
    batch = PackedBatch(values, offsets, shape.longest, None, shape.sequences, 0)
    run_layer(binding, projections, batch, values)


def _run_padded(binding: Binding, projections: Projections, shape: Shape) -> None:
    """A batch whose padding is dropped before the layers and put back behind them."""
    for seqlen in _widths(shape):
        hidden = _hidden(binding, projections, shape, seqlen)
        mask = torch.empty(shape.sequences, seqlen, dtype=torch.bool, device="meta")
        batch = PackedBatch.geometry(hidden, mask, _marks(binding))
        values = batch.take(hidden)
        batch.to_padded(values)
    run_layer(binding, projections, batch, values)


def _run_in_a_graph(binding: Binding, projections: Projections, shape: Shape) -> None:
    """The bucket of CUDA graphs that holds such a batch: rounded up, and always with attention's list of work."""
    spec, bucket = binding.spec, graphs.bucket_of(shape.lengths)
    values = torch.empty(bucket.tokens, spec.hidden_size, dtype=projections.dtype, device="meta")
    queries = query_block(spec.head_dim, values.dtype, bucket.longest, values.device)
    tiles, offsets = graphs.plan_parts(graphs.make_plan(bucket, queries, ()), bucket)
    batch = PackedBatch(values, offsets, bucket.longest, None, 0, 0, _tiles={queries: tiles})
    run_layer(binding, projections, batch, values)


def _widths(shape: Shape) -> tuple[int, int]:
    """Padded lengths: one column more than there is to hold, and as many as make rows that are read in vectors."""
    return shape.longest + 1, 16 * cdiv(shape.longest + 1, 16)


def _hidden(binding: Binding, projections: Projections, shape: Shape, seqlen: int) -> torch.Tensor:
    """Padded hidden states `[B, S, D]`, with the strides in which they reach the layer."""
    width = binding.spec.hidden_size
    if binding.spec.adapter.time_major:
        hidden = torch.empty(seqlen, shape.sequences, width, dtype=projections.dtype, device="meta")
        return hidden.transpose(0, 1)
    return torch.empty(shape.sequences, seqlen, width, dtype=projections.dtype, device="meta")


def _marks(binding: Binding) -> str:
    return binding.spec.adapter.mask_marks


def _masks(batch: int, seqlen: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The forms in which transformers hands a mask to its layers: its user's own, boolean, additive; one row for all queries,
    the same row expanded, or one for each query."""
    for marks in (torch.int64, torch.bool):
        yield torch.empty(batch, seqlen, dtype=marks, device="meta")
    for values in (torch.bool, dtype):
        yield torch.empty(batch, 1, 1, seqlen, dtype=values, device="meta")
        yield torch.empty(batch, 1, seqlen, seqlen, dtype=values, device="meta")


def key_of(launch: Launch) -> Key:
    """Equal for launches that one compiled kernel serves. It may tell more apart than Triton does, never less."""
    values = {**launch.arguments, **launch.constants}
    constants = launch.constants.keys()
    unspecialized = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    return (
        launch.kernel,
        tuple(launch.options.items()),
        tuple((name, value if name in constants else _kind(value, name in unspecialized)) for name, value in values.items()),
    )


def _kind(value: Any, unspecialized: bool) -> Hashable:
    """What Triton may specialise a kernel on, of one argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, tuple(value.block_shape), value.padding
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(2**31) <= value < 2**31
        return wide if unspecialized else (wide, value == 1, value % 16 == 0)
    return type(value) if isinstance(value, float | bool) else value
