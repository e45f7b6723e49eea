"""Whether one layer may be fast: every condition is looked up on the live layer, and every refusal has a reason.

The exact class decides the program; the checks here make sure that the layer's actual modules are the ones that the
program describes. Anything that was wrapped, patched, hooked, quantised or added is found, and named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from . import registry
from .activations import activation_name
from .spec import LAYER_SCALE_SLOTS, LINEAR_SLOTS, NORM_SLOTS, Adapter, LayerSpec, NameMap

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256
CAPTURE_MODULE = "transformers.utils.output_capturing"

# Modules that compute nothing in evaluation, wherever they come from.
_INERT = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Finding:
    """What the checks say about one layer: a spec, or why there is none.

    `left_alone` marks a part that is not an encoder layer of a known family (a decoder layer, say): it does not refuse the
    model. `reasons` is empty exactly when `spec` is given.
    """

    spec: LayerSpec | None
    reasons: tuple[str, ...] = ()
    left_alone: bool = False


def inspect_layer(
    layer: nn.Module, layer_class: type[nn.Module], adapter: Adapter, allow_meta: bool = False
) -> Finding:
    """Checks one layer against the adapter of its class.

    Args:
        layer: a live layer.
        layer_class: the layer's own class (`type(layer)` may be the fast subclass already).
        adapter: the adapter that the class is registered with.
        allow_meta: accept weights on the meta device, to answer "would it be eligible?".
    """
    reason = _not_this_family(layer, adapter)
    if reason:
        return Finding(None, (reason,), left_alone=True)
    names = next((names for names in adapter.names if not _missing(layer, names)), None)
    if names is None:
        missing = ", ".join(_missing(layer, adapter.names[0]))
        return Finding(None, (f"it does not have the parts that its class had when it was registered: no {missing}",))
    reasons = tuple(_checks(layer, layer_class, names, allow_meta))
    if reasons:
        return Finding(None, reasons)
    return Finding(_read_spec(layer, adapter, names))


def _not_this_family(layer: nn.Module, adapter: Adapter) -> str | None:
    if adapter.decoder:
        return adapter.decoder
    if getattr(layer, "is_decoder", False):
        return "it is a decoder layer (is_decoder=True): causal attention and a cache are not an encoder's"
    if hasattr(layer, "crossattention"):
        return "it has cross-attention"
    for path, expected in adapter.requires.items():
        if lookup(layer, path) != expected:
            return f"{path} is {lookup(layer, path)!r}, and only {expected!r} is this family"
    attention = lookup(layer, adapter.names[0].attention)
    if getattr(attention, "is_causal", False) or getattr(attention, "is_decoder", False):
        return "its attention is causal: it is a decoder layer"
    return None


def _missing(layer: nn.Module, names: NameMap) -> list[str]:
    paths = [getattr(names, slot) for slot in (*LINEAR_SLOTS, *NORM_SLOTS, "activation", "heads")]
    paths += [getattr(names, slot) for slot in LAYER_SCALE_SLOTS if getattr(names, slot)]
    return [path for path in paths if lookup(layer, path) is None]


def lookup(layer: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    found: Any = layer
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _checks(layer: nn.Module, layer_class: type[nn.Module], names: NameMap, allow_meta: bool) -> Iterator[str]:
    yield from _check_own_code(layer, layer_class)
    yield from _check_linears(layer, names)
    yield from _check_norms(layer, names)
    yield from _check_nothing_added(layer, names)
    yield from _check_tensors(layer, allow_meta)
    yield from _check_heads(layer, names)
    yield from _check_attention_function(layer, names)
    if activation_name(lookup(layer, names.activation)) is None:
        activation = lookup(layer, names.activation)
        yield (
            f"its activation {names.activation} is {_describe(activation)}, which is not a known element-wise activation "
            "of torch or transformers"
        )


def _check_own_code(layer: nn.Module, layer_class: type[nn.Module]) -> Iterator[str]:
    """Every inner module must run the code of the layer's own file, of torch, or of transformers' activations."""
    trusted = {layer_class.__module__, "transformers.activations", *_sources(layer_class.__module__)}
    for name, module in layer.named_modules():
        what = name or "the layer itself"
        if "forward" in vars(module):
            owner = "accelerate" if hasattr(module, "_hf_hook") else "somebody"
            yield f"{owner} has replaced the forward of {what} on the instance; remove that first"
        if not name:
            if getattr(layer_class.forward, "__module__", None) != layer_class.__module__:
                yield f"{layer_class.__name__}.forward has been replaced by other code"
            continue
        if has_foreign_hooks(module):
            yield f"{what} has forward hooks, which a fused layer would not run; remove them or hook the whole layer"
        cls = type(module)
        if cls.__module__.startswith("torch.nn.modules."):
            continue
        if cls.__module__ not in trusted:
            yield f"{what} is a {registry.qualified_name(cls)}, not the part that {layer_class.__name__} is made of"
        elif cls.forward is not nn.Module.forward and getattr(cls.forward, "__module__", None) not in trusted:
            yield f"{cls.__name__}.forward (in {what}) has been replaced by other code"


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether somebody's forward hooks look at a module.

    transformers' own recorders of hidden states and attentions do not count: they stay on a model for good once outputs were
    recorded, and only a call that records them matters (`layers.stack.collected_outputs`).
    """
    if module._forward_pre_hooks:
        return True
    return any(getattr(hook, "__module__", None) != CAPTURE_MODULE for hook in module._forward_hooks.values())


def touched(module: nn.Module) -> bool:
    """Whether somebody's forward hooks look at a module, or its forward was patched."""
    state = module.__dict__
    if "forward" in state:
        return True
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"]) and has_foreign_hooks(module)


@cache
def _sources(module_name: str) -> frozenset[str]:
    """Modelling files that the layer's own file takes parts from: generated files may import a sibling's modules."""
    own = sys.modules.get(module_name)
    classes = [value for value in vars(own).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    return frozenset(cls.__module__ for cls in classes if cls.__module__.startswith("transformers.models."))


def _check_linears(layer: nn.Module, names: NameMap) -> Iterator[str]:
    for slot in LINEAR_SLOTS:
        path = getattr(names, slot)
        module = lookup(layer, path)
        if type(module) is not nn.Linear:
            yield (
                f"{path} is a {registry.qualified_name(type(module))}, not a plain nn.Linear (an adapter, a quantised or a "
                "parametrised layer); merge or remove it"
            )


def _check_norms(layer: nn.Module, names: NameMap) -> Iterator[str]:
    for slot in NORM_SLOTS:
        path = getattr(names, slot)
        module = lookup(layer, path)
        if type(module) is not nn.LayerNorm:
            yield f"{path} is a {registry.qualified_name(type(module))}, not nn.LayerNorm"
        elif module.weight is None or len(module.normalized_shape) != 1:
            yield f"{path} has no weight, or normalises over more than the hidden size"


def _check_nothing_added(layer: nn.Module, names: NameMap) -> Iterator[str]:
    """Every parameter must belong to a slot: one that does not is maths that the program would leave out."""
    modules = [getattr(names, slot) for slot in (*LINEAR_SLOTS, *NORM_SLOTS)]
    scales = [getattr(names, slot) for slot in LAYER_SCALE_SLOTS]
    for name, _ in (*layer.named_parameters(), *layer.named_buffers()):
        if name not in scales and name.rpartition(".")[0] not in modules:
            yield f"{name} is not part of this family: the layer computes something more"


def _check_tensors(layer: nn.Module, allow_meta: bool) -> Iterator[str]:
    tensors = dict(layer.named_parameters())
    dtypes = {tensor.dtype for tensor in tensors.values()}
    devices = {tensor.device for tensor in tensors.values()}
    if len(dtypes) > 1:
        yield f"its weights have mixed dtypes: {', '.join(sorted(map(str, dtypes)))}"
    elif not dtypes <= set(DTYPES):
        yield f"its weights are {dtypes.pop()}; supported are {', '.join(map(str, DTYPES))}"
    if len(devices) > 1:
        yield f"its weights are on several devices: {', '.join(sorted(map(str, devices)))}"
    if not allow_meta and any(device.type == "meta" for device in devices):
        yield "its weights are on the meta device (not loaded, or offloaded)"
    for name, tensor in tensors.items():
        if type(tensor) is not nn.Parameter and not torch.compiler.is_compiling():  # in an export fakes stand for parameters
            yield f"{name} is a {registry.qualified_name(type(tensor))}, not a plain parameter"


def _check_heads(layer: nn.Module, names: NameMap) -> Iterator[str]:
    query, key, value, out, up, down = (lookup(layer, getattr(names, slot)) for slot in LINEAR_SLOTS)
    if not all(isinstance(module, nn.Linear) for module in (query, key, value, out, up, down)):
        return  # said already
    heads = lookup(layer, names.heads)
    if not isinstance(heads, int) or query.out_features % heads:
        yield f"{heads!r} heads do not divide the query width {query.out_features}"
        return
    widths = {
        query.in_features,
        key.in_features,
        value.in_features,
        out.out_features,
        up.in_features,
        down.out_features,
    }
    inner = {query.out_features, key.out_features, value.out_features, out.in_features}
    if len(widths) > 1 or len(inner) > 1 or up.out_features != down.in_features:
        yield "its projections have unequal widths (pruned heads, or attention to something else)"
    if query.out_features // heads > MAX_HEAD_DIM:
        yield f"its head size {query.out_features // heads} is above {MAX_HEAD_DIM}"


def attention_implementation(layer: nn.Module, names: NameMap) -> str | None:
    """The name of transformers' attention function that the layer would call ("sdpa", say); None if it calls none."""
    config = getattr(lookup(layer, names.attention), "config", None)
    return getattr(config, "_attn_implementation", None)


def _check_attention_function(layer: nn.Module, names: NameMap) -> Iterator[str]:
    """A function that somebody registered may compute anything, and it would not be called."""
    name = attention_implementation(layer, names)
    interface = sys.modules.get("transformers.modeling_utils")
    if name is None or name == "eager" or "flash" in name or interface is None:
        return
    function = interface.ALL_ATTENTION_FUNCTIONS.get(name)
    if not getattr(function, "__module__", "").startswith("transformers."):
        yield (
            f"its attention implementation {name!r} is not transformers' own; choose another with "
            "model.set_attn_implementation('sdpa')"
        )


def _read_spec(layer: nn.Module, adapter: Adapter, names: NameMap) -> LayerSpec:
    linears = {slot: lookup(layer, getattr(names, slot)) for slot in LINEAR_SLOTS}
    heads = lookup(layer, names.heads)
    head_dim = linears["query"].out_features // heads
    scale = lookup(layer, names.scaling) if names.scaling else None
    return LayerSpec(
        adapter=adapter,
        names=names,
        hidden_size=linears["query"].in_features,
        num_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else float(scale),
        activation=activation_name(lookup(layer, names.activation)) or "module",
        intermediate_size=linears["up"].out_features,
        linear_bytes=sum(linear.weight.nbytes for linear in linears.values()),
    )


def _describe(thing: object) -> str:
    return registry.qualified_name(type(thing)) if isinstance(thing, nn.Module) else repr(thing)
