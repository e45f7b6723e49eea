"""All layers of a stack at once: from a CUDA graph, or on the CPU for few tokens.

The first layer of a call runs them all; those behind it only hand the result on. Of a graph, whether every layer is still
what was captured is checked while the device is busy, and the result is dropped if one is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.varlen_attention import query_block
from ..packing import PackedBatch
from ..runtime.graphs import GraphRunner
from . import trial
from .guards import Delegated, refuse_layers_mode, refuse_mode
from .native_layer import run_layers
from .program import run_layer
from .snapshot import Part, Snapshot
from .stack import Stack, StackCall

FEW_TOKENS = 64  # on the CPU, up to which what lies between the layers is a good part of the time


def run_few(stack: Stack, call: StackCall, batch: PackedBatch, hidden: torch.Tensor, first: Part) -> torch.Tensor | None:
    """The output of all layers of `call` for few tokens on the CPU, `[B, S, D]`, given the input of the first, which is ready;
    None if the layers have to run one by one."""
    parts = call.snapshot.parts if call.snapshot is not None else _ready_parts(call, hidden, first)
    if not parts or not _fit_the_extension(parts[:1] if call.snapshot is not None else parts, hidden, sum(batch.lengths)):
        return None
    if call.snapshot is not None:
        fields = call.snapshot.fields
    else:
        fields = b"".join([projections.native_layer.fields(binding) for binding, projections in parts])
        if stack.snapshot is None or stack.snapshot.parts != parts:
            stack.snapshot = Snapshot(call.schedule, parts)
    projections = parts[0][1]
    tokens = hidden if batch.indices is None else batch.take(hidden)
    values = run_layers(projections.native_layer.isa, fields, batch, projections.entering(tokens))
    values = values if values.dtype == hidden.dtype else values.to(hidden.dtype)
    return values if batch.indices is None else batch.to_padded(values)


def _ready_parts(call: StackCall, hidden: torch.Tensor, first: Part) -> list[Part]:
    """What runs each layer; empty if one cannot run fast."""
    if any(layer._fastencoder.to_prove for layer in call.schedule):
        return []
    ready = {call.schedule[0]: first}
    try:
        for layer in call.schedule:
            if layer not in ready:  # ALBERT's layers run several times
                ready[layer] = layer._fastencoder.ready(layer)
                refuse_layers_mode(layer, hidden)
    except Delegated:
        return []
    return [ready[layer] for layer in call.schedule]


def _fit_the_extension(parts: Sequence[Part], hidden: torch.Tensor, tokens: int) -> bool:
    return all(
        projections.native_layer is not None
        and (projections.dtype, projections.device) == (hidden.dtype, hidden.device)
        and projections.native_layer.runs(hidden, projections.working_dtype(tokens))
        for _, projections in parts
    )


def run_whole(
    graphs: GraphRunner, call: StackCall, batch: PackedBatch, hidden: torch.Tensor, capture_now: bool = False
) -> torch.Tensor | None:
    """The output of all layers of `call`, `[B, S, D]` with zeros at padding.

    Args:
        hidden: `[B, S, D]`, the input of the first layer.
        capture_now: do not wait until such a batch comes a second time.

    Returns:
        None if the layers have to run one by one.
    """
    masked = any(mask is not None for mask, known in call.read if known is batch)
    kind = trial.MASKED if masked else trial.UNMASKED
    if any(kind in layer._fastencoder.to_prove for layer in call.schedule):
        return None
    parts = _parts(call)
    if batch.lengths is None or not _fits_a_graph(parts, hidden):
        return None

    def queries_of(longest: int) -> int:
        return query_block(parts[0][0].spec.head_dim, parts[0][1].compute_dtype, longest, hidden.device)

    def forward(values: torch.Tensor, offsets: torch.Tensor, max_seqlen: int, tiles: torch.Tensor) -> torch.Tensor:
        padded_up = PackedBatch(values, offsets, max_seqlen, None, 0, 0, _tiles={queries_of(max_seqlen): tiles})
        values = parts[0][1].entering(values)
        for binding, projections in parts:
            values = run_layer(binding, projections, padded_up, values)
        return values.to(hidden.dtype)

    def finish(values: torch.Tensor) -> torch.Tensor:
        return values.view(hidden.shape).clone() if batch.indices is None else batch.to_padded(values)

    output = graphs.run(
        batch.lengths,
        hidden,
        batch.take,
        weights=(*parts, *_addresses(call.schedule)),
        queries_of=queries_of,
        forward=forward,
        finish=finish,
        capture_now=capture_now,
    )
    if output is None or not _unchanged(call, parts, hidden):
        return None
    return output


def _parts(call: StackCall) -> list[tuple]:
    """The layers' bindings and projections, not checked again if they are there; empty if a layer cannot run fast."""
    states = [layer._fastencoder for layer in call.schedule]
    try:
        return [
            (state.binding, state.projections) if state.projections is not None else state.ready(layer)
            for state, layer in zip(states, call.schedule, strict=True)
        ]
    except Delegated:
        return []


def _fits_a_graph(parts: Sequence[tuple], hidden: torch.Tensor) -> bool:
    return bool(parts) and all(
        projections.dtype == hidden.dtype
        and projections.device == hidden.device
        and projections.compute_dtype == parts[0][1].compute_dtype
        and binding.spec.head_dim == parts[0][0].spec.head_dim
        # Other kinds of attention read arguments of the call, and an opaque part may do anything.
        and binding.spec.adapter.attention == "plain"
        and not (binding.spec.opaque or binding.spec.adapter.offsets or binding.spec.has_choice)
        # This guard against overflow looks at all tokens, also at those that only fill a bucket.
        and not (binding.spec.adapter.clamp == "non-finite" and projections.compute_dtype == torch.float16)
        for binding, projections in parts
    )


def _addresses(layers: Sequence[torch.nn.Module]) -> list[int]:
    """Where the parameters are: a graph must not read memory that was given back."""
    return [parameter.data_ptr() for layer in layers for parameter in layer.parameters()]


def _unchanged(call: StackCall, parts: Sequence[tuple], hidden: torch.Tensor) -> bool:
    try:
        for layer, part in zip(call.schedule, parts, strict=True):
            refuse_mode(layer, hidden)
            if layer._fastencoder.ready(layer) != part:
                return False
    except Delegated:
        return False
    return True


def input_of(call: StackCall, batch: PackedBatch) -> torch.Tensor:
    """What the layer whose turn it is would have been given, packed `[T, D]`, when all layers have run at once already."""
    values = batch.take(call.whole_input)
    for layer in call.schedule[: call.position]:
        values = run_layer(*layer._fastencoder.ready(layer), batch, values)
    return values
