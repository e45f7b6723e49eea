"""`warmup`: everything that happens once, ahead of traffic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from .conversion import NotFastError, fast_layers, is_fast
from .layers import Delegated, FastLayer, Stack
from .layers.guards import refuse_mode
from .layers.program import run_layer
from .layers.stack import StackCall
from .layers.whole import run_whole
from .packing import PackedBatch


def warmup(model: nn.Module, shapes: Iterable[tuple[int, int] | list[int]]) -> None:
    """Runs the fast layers of `model` once on each shape: kernels are compiled and loaded, weights are brought into the form
    in which they are multiplied and, after `to_fast(model, cuda_graphs=True)`, the shape's CUDA graph is captured.

    Args:
        model: a model with fast layers, in evaluation mode, on the device that it will serve from.
        shapes: each one either `(sequences, tokens)`, a full batch, or a list of sequence lengths in tokens.

    Raises:
        NotFastError: the model has no fast layer.
        ValueError: a shape is not one, or a layer cannot run fast as the model is now; the message says why.
        TypeError: `model` is not a module.
    """
    runs = list(_runs(model))
    with torch.inference_mode():
        for lengths in [_lengths(shape) for shape in shapes]:
            for stack, layers in runs:
                _run_once(stack, layers, lengths)


def _lengths(shape: tuple[int, int] | Sequence[int]) -> list[int]:
    numbers = list(shape)
    lengths = [numbers[1]] * numbers[0] if isinstance(shape, tuple) and len(numbers) == 2 else numbers
    if isinstance(shape, tuple) and len(numbers) != 2 or not lengths or min(lengths) < 0 or not max(lengths):
        raise ValueError(f"a shape is (sequences, tokens) or a list of lengths, with at least one token; got {shape!r}")
    return lengths


def _runs(model: nn.Module) -> Iterator[tuple[Stack | None, list[FastLayer]]]:
    """The fast layers in the order in which they run: by stack, and one by one where they are in none."""
    layers = fast_layers(model)
    if not is_fast(model):
        raise NotFastError(f"{type(model).__name__} is not fast: call to_fast(model) before warmup(model, ...).")
    for module in model.modules():
        for stack in Stack.installed(module):
            yield stack, [layer for layer in stack.layers_of(module) if isinstance(layer, FastLayer)]
    for layer in layers:
        if layer._fastencoder.stack is None:
            yield None, [layer]


def _run_once(stack: Stack | None, layers: list[FastLayer], lengths: list[int]) -> None:
    like = next(layers[0].parameters())
    try:
        refuse_mode(layers[0], like)
        parts = [layer._fastencoder.ready(layer) for layer in layers]
    except Delegated as reason:
        raise ValueError(f"a {layers[0].original_class.__name__} does not run fast: {reason}") from None
    hidden = like.new_zeros(len(lengths), max(lengths), parts[0][0].spec.hidden_size)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = PackedBatch.geometry(hidden, mask.to(hidden.device))
    values = batch.take(hidden)
    for binding, projections in parts:
        values = run_layer(binding, projections, batch, values)
    batch.to_padded(values)
    if stack is not None and stack.graphs is not None:
        run_whole(stack.graphs, StackCall(list(layers), batch=batch), batch, hidden, capture_now=True)
