"""`to_fast` and `reverse`: check everything, then swap everything.

A layer becomes fast by a change of its class to a subclass. Parameters, buffers, submodules, hooks, state_dict keys and the
object's identity do not change, so saving is right even while a model is fast, and `reverse` is exact by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import nn

from . import fingerprints, registry, sentence_packing, versions
from .attention_level import AttentionSite, VarlenAttention, Window, find_sites
from .families.embeddings import EMBEDDINGS
from .instance_forward import change_class, is_patched
from .layers import (
    OWNERS,
    EmbeddingState,
    FastEmbeddings,
    FastLayer,
    FastOwner,
    InvariantLinear,
    LayerState,
    Stack,
    fast_class,
)
from .layers.invariance import linears_outside
from .layers.settings import Memory, Settings
from .layers.stack import watch_recording
from .layers.traffic import BusyError, Lock, Traffic, others_run
from .padding_readers import something_reads_padding
from .report import Report, check_is_module, layer_around, survey
from .runtime.graphs import GraphRunner
from .spec import Adapter

Model = TypeVar("Model", bound=nn.Module)

# Where a module keeps what it knows beside its parameters.
_STATE = {LayerState: "_fastencoder", EmbeddingState: "_fastencoder_embeddings"}
_STATES = (*_STATE.values(), "_fastencoder_attention")
# What may mix neighbouring positions, padding among them.
_MIX_POSITIONS = (nn.modules.conv._ConvNd, nn.RNNBase)
# What holds the layers that a module calls one after the other.
_LISTS = (nn.ModuleList, nn.Sequential)

_conversions = Lock()  # one at a time in a process


class NotEligibleError(ValueError):
    """The model, or something in it, cannot be made fast; `report` says what and why. The model is untouched."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class AlreadyFastError(ValueError):
    """The model is fast already."""


class NotFastError(ValueError):
    """Nothing in the model is fast."""


def to_fast(
    model: Model,
    strict: bool = True,
    cuda_graphs: bool = False,
    *,
    compute_dtype: torch.dtype | None = None,
    memory: Memory = "default",
    batch_invariant: bool = False,
) -> Model:
    """Makes a model's encoder layers fast, in place.

    Answers do not change: what the fused layers cannot compute exactly (a custom attention mask, `output_attentions`,
    training, a needed gradient, ...) runs through the original layers. Hidden states at padding become zeros.

    Layers of a class that is not known keep their own code. If their attention goes through transformers' attention
    interface, it leaves padding out (`explain` says "attention" for these, and "layer" for the others).

    Args:
        model: a model of transformers, or any module that contains its encoder layers.
        strict: refuse the whole model if one encoder layer of a known class cannot be fast. With False, what is eligible is
            converted; `explain(model)` lists the rest.
        cuda_graphs: on a CUDA device, run batches of up to 4,096 packed tokens as CUDA graphs, captured when a bucket of
            shapes comes for the second time (`warmup` captures ahead of traffic). It takes memory for the largest bucket's
            activations, and helps where launching kernels takes longer than running them. No effect on a CPU.
        compute_dtype: `torch.bfloat16`, `torch.float16` or `torch.float32`: the fast layers compute in it, from a copy of their
            linear weights. The parameters keep their dtype and values, and so do `state_dict` and the hidden states that leave
            the layers. None, or the dtype that a layer has already, changes nothing. Nor does a 16-bit dtype on a processor
            that is no faster in it (x86 with neither AMX nor VNNI): there the layers compute in the dtype of their parameters.
            Calls that run the original layers compute in the dtype of the parameters, always. `explain` says what a layer
            computes in.
        memory: "default" keeps the linear weights once more on the CPU, in the layout that is multiplied fastest. "lean"
            keeps no copy: the parameters are multiplied as they are (those of queries, keys and values move into one storage,
            and out of it in `reverse`). `explain` says how many bytes each takes. No effect on CUDA, which never needs it.
        batch_invariant: the bits of a sequence's output depend on that sequence alone, neither on those that share its batch
            nor on padding, as long as its tokens have the same position ids. Linears outside of the layers (a pooler, a head)
            are multiplied as inside of them. A call that would run the original layers raises `BatchVariantError` (a
            RuntimeError). It takes the C++ extension on the CPU, and Triton on CUDA.

    Returns:
        The same object.

    Raises:
        NotEligibleError: nothing is eligible or, with `strict`, something is refused; the model is as it was. A layer that
            cannot compute in `compute_dtype` is refused: one whose attention alone would be fast, one with an opaque part (a
            LoRA adapter, say), and any that would need a copy of its weights with `memory="lean"`. With `batch_invariant`
            everything in the model that cannot be made so is refused, `strict` or not.
        AlreadyFastError: the model is fast already, whatever it was converted with (by another thread at this moment, say).
        BusyError: another thread calls the model, or a part of it. Any other error as well leaves the model as it was.
        ValueError: `compute_dtype` or `memory` is none of the values above, or `batch_invariant` is asked for together with
            `memory="lean"` or `cuda_graphs`.
        TypeError: `model` is not a module.
    """
    settings = Settings(compute_dtype, memory, batch_invariant)
    if batch_invariant and cuda_graphs:
        raise ValueError("batch_invariant=True fixes the kernels of a call, cuda_graphs=True records them: leave one out")
    versions.warn_once()
    with _conversions:
        _convert(model, strict, cuda_graphs, settings)
    return model


def _convert(model: nn.Module, strict: bool, cuda_graphs: bool, settings: Settings) -> None:
    if is_fast(model):
        raise AlreadyFastError(
            f"{type(model).__name__} is fast already; call reverse(model) first to convert it anew, also with other settings."
        )
    known = fingerprints.find_all(model)
    sites = find_sites(model, known)
    found = survey(model, known, sites, settings)
    report = Report(type(model).__name__, [row for row, _ in found])
    chosen = [(row.name, layer) for row, layer in found if row.status == "eligible" and row.level == "layer"]
    refused = {row.name for row, _ in found if row.status == "refused"}
    sites = [site for site in sites if layer_around(site, model) not in refused]
    if (strict or settings.batch_invariant) and any(row.status == "refused" for row in report):
        instead = "to_fast(model, strict=False) converts the layers that are eligible"
        instead = "convert it without batch_invariant" if settings.batch_invariant else instead
        raise NotEligibleError(
            f"{type(model).__name__} cannot be made fast:\n{report.reasons('refused')}\nNothing was changed; {instead}.", report
        )
    if not chosen and not sites:
        reasons = report.reasons("refused", "left alone") or "  it has no encoder layer of a registered class"
        raise NotEligibleError(
            f"{type(model).__name__} has no layer that can be made fast:\n{reasons}\n"
            "Nothing was changed. `fastencoder models` lists what is supported.",
            report,
        )
    if others_run(model):
        raise BusyError(
            f"another thread calls {type(model).__name__} now: nothing was changed. Convert a model before it is served."
        )
    outside = linears_outside(model, tuple(name for name, _ in chosen)) if settings.batch_invariant else []
    traffic = Traffic()
    try:
        _swap(model, chosen, known, cuda_graphs, settings, traffic)
        _swap_attention(model, sites, traffic)
        for linear in outside:
            change_class(linear, InvariantLinear)
        sentence_packing.install(model)
    except BaseException:  # KeyboardInterrupt too: everything or nothing
        _restore(model)
        raise


def _swap(
    model: nn.Module,
    chosen: list[tuple[str, nn.Module]],
    known_layers: dict[str, fingerprints.Known],
    cuda_graphs: bool,
    settings: Settings,
    traffic: Traffic,
) -> None:
    """Everything that is looked up comes before the first change."""
    modules = dict(model.named_modules())
    stacks: dict[tuple[str, str], tuple[nn.Module, Stack]] = {}
    plan: list[tuple[nn.Module, type, LayerState | EmbeddingState | None]] = []
    for name, layer in chosen:
        known = known_layers[name]
        adapter = known.adapter.of(layer)
        place = _find_stack(modules, name, adapter)
        if place is not None and place not in stacks:
            graphs = GraphRunner() if cuda_graphs else None
            owner = modules[place[0]]
            reader = place[0].rpartition(".")[0]
            may_read = bool(place[0]) and _is_reader(modules[reader], type(layer), adapter)
            stack = _make_stack(owner, place[1], type(layer), known, graphs, reader if may_read else None, traffic)
            stacks[place] = (owner, stack)
        own_stack = stacks[place][1] if place is not None else None
        padding_is_read = something_reads_padding(name, modules, adapter)
        if known.like is not None and not (adapter.padding_is_read or adapter.padding_readers or padding_is_read):
            # Nobody has looked at the code around these layers.
            padding_is_read = any(isinstance(module, _MIX_POSITIONS) for module in modules.values())
        layer_state = LayerState(adapter, own_stack, padding_is_read, known.unproven, settings, traffic)
        plan.append((layer, fast_class(type(layer)), layer_state))
    embeddings = [(module, EMBEDDINGS.get(registry.qualified_name(type(module)))) for module in modules.values()]
    plan += [
        (module, fast_class(type(module)), EmbeddingState(adapter, traffic))
        for module, adapter in embeddings
        if adapter is not None
    ]
    owners = [owner for owner, _ in stacks.values() if registry.qualified_name(type(owner)) in OWNERS]
    plan += [(owner, fast_class(type(owner)), None) for owner in owners]
    for cls in {type(layer) for _, layer in chosen}:
        watch_recording(cls)
    for module, cls, state in plan:
        if state is not None:
            object.__setattr__(module, _STATE[type(state)], state)
        change_class(module, cls)
    for owner, stack in stacks.values():
        stack.install(owner, model)


def _swap_attention(model: nn.Module, sites: list[AttentionSite], traffic: Traffic) -> None:
    for site in sites:
        site.convert(traffic)
    for owner in dict.fromkeys(site.owner for site in sites):
        Window.install(model.get_submodule(owner), traffic)


def _find_stack(modules: dict[str, nn.Module], name: str, adapter: Adapter) -> tuple[str, str] | None:
    """(path of the owner, path of the container inside it) of the layer at `name`, or None if it is in no list."""
    parts = name.split(".")
    if adapter.schedule == "albert":
        # ...albert_layer_groups.0.albert_layers.0: the loop is two levels up
        owner, container = ".".join(parts[:-4]), parts[-4:-3]
        if container == ["albert_layer_groups"] and hasattr(modules.get(owner), "config"):
            return owner, container[0]
        return None
    if not isinstance(modules.get(".".join(parts[:-1])), _LISTS):
        return None
    depth = len(parts) - 1
    while depth > 0 and isinstance(modules[".".join(parts[:depth])], _LISTS):
        depth -= 1
    return ".".join(parts[:depth]), ".".join(parts[depth:-1])


def _make_stack(
    owner: nn.Module,
    path: str,
    layer_class: type,
    known: fingerprints.Known,
    graphs: GraphRunner | None,
    reader: str | None,
    traffic: Traffic,
) -> Stack:
    # Packed tokens may pass through a loop only where its code is known: transformers' own, from the layer's own file.
    own_loop = type(owner).__module__ == layer_class.__module__ and not is_patched(owner)
    adapter = known.adapter
    works_between = bool(adapter.works_between) and getattr(owner, adapter.works_between, None) is not None
    own_loop &= not ((adapter.keeps_hidden_states and reader is None) or works_between)
    may_carry = own_loop and fingerprints.has_known_loop(type(owner), known)
    return Stack(registry.qualified_name(type(owner)), path, adapter.schedule, may_carry, graphs, reader, traffic)


def _is_reader(module: nn.Module, layer_class: type, adapter: Adapter) -> bool:
    """Whether a module, the parent of layers' owner, is the one reader of what the owner's loop keeps."""
    cls = type(module)
    return (cls.__module__, cls.__name__) == (layer_class.__module__, adapter.kept_for) and not is_patched(module)


def reverse(model: Model) -> Model:
    """Gives every fast layer its own class back, in place: the same objects, tensors, hooks and flags as before.

    Returns:
        The same object.

    Raises:
        NotFastError: nothing in the model is fast.
        BusyError: a forward of the model runs, in this thread or another; the model is as fast as before.
        TypeError: `model` is not a module.
    """
    with _conversions, ExitStack() as stopped:
        if not is_fast(model):
            raise NotFastError(f"{type(model).__name__} is not fast: there is nothing to reverse.")
        for traffic in _traffic_of(model):
            stopped.enter_context(traffic.stopped())
        for layer in fast_layers(model):  # where there is no memory for it, the model stays fast
            layer._fastencoder.release(layer)
        try:
            _restore(model)
        except BaseException:  # KeyboardInterrupt: all the way or not at all
            _restore(model)
            raise
    return model


def _traffic_of(model: nn.Module) -> list[Traffic]:
    """Of every conversion that a part of the model went through."""
    states = [vars(module).get(name) for module in model.modules() for name in _STATES]
    return list(dict.fromkeys(state.traffic for state in states if state is not None))


def _restore(model: nn.Module) -> None:
    """Takes a conversion back, also one that was not finished. Changes no tensor."""
    sentence_packing.remove(model)
    for module in model.modules():
        Stack.remove(module)
        Window.remove(module)
        if isinstance(module, FastLayer | FastEmbeddings | FastOwner | VarlenAttention):
            change_class(module, module.original_class)
        elif type(module) is InvariantLinear:
            change_class(module, nn.Linear)
        for name in _STATES:
            vars(module).pop(name, None)


def is_fast(model: nn.Module) -> bool:
    """Whether any layer of the model is fast, or its attention alone. Raises TypeError if `model` is not a module."""
    return bool(fast_layers(model)) or any(isinstance(module, VarlenAttention) for module in model.modules())


def fast_layers(model: nn.Module) -> list[FastLayer]:
    """The fast layers of a model. Raises TypeError if `model` is not a module."""
    check_is_module(model)
    return [module for module in model.modules() if isinstance(module, FastLayer)]


@contextmanager
def fast(
    model: Model,
    strict: bool = True,
    cuda_graphs: bool = False,
    *,
    compute_dtype: torch.dtype | None = None,
    memory: Memory = "default",
    batch_invariant: bool = False,
) -> Iterator[Model]:
    """Fast inside the block only: `with fast(model): ...`. Takes and raises what `to_fast` does."""
    to_fast(
        model, strict, cuda_graphs, compute_dtype=compute_dtype, memory=memory, batch_invariant=batch_invariant
    )
    try:
        yield model
    finally:
        if is_fast(model):
            reverse(model)
