"""Whether one layer may be fast: every condition is looked up on the live layer, and every refusal has a reason.

The exact class decides the program; the checks here make sure that the layer's actual modules are the ones that the
program describes. Anything that was wrapped, patched, hooked, quantised or added is found, and named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from . import registry
from .activations import activation_name
from .instance_forward import is_offloaded, is_patched, runs_own_forward
from .namespaces import namespace_of
from .norms import norm_kind
from .parts import ParameterPair, examine_linears, linear_at, lookup
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
    reason = _not_this_family(layer, adapter) or _not_here(layer)
    if reason:
        return Finding(None, (reason,), left_alone=True)
    names = fitting_names(layer, adapter)
    if names is None:
        missing = ", ".join(_missing(layer, adapter.names[0]))
        return Finding(None, (f"it does not have the parts that its class had when it was registered: no {missing}",))
    reasons = tuple(_checks(layer, layer_class, adapter, names, allow_meta))
    if reasons:
        return Finding(None, reasons)
    return Finding(_read_spec(layer, adapter, names))


def fitting_names(layer: nn.Module, adapter: Adapter) -> NameMap | None:
    """The first name map of an adapter whose parts the layer has."""
    return next((names for names in adapter.names if not _missing(layer, names)), None)


def _not_this_family(layer: nn.Module, adapter: Adapter) -> str | None:
    if adapter.decoder:
        return adapter.decoder
    if getattr(layer, "is_decoder", False):
        return "it is a decoder layer (is_decoder=True): causal attention and a cache are not an encoder's"
    if hasattr(layer, "crossattention") and "crossattention" not in adapter.extra_parameters:
        return "it has cross-attention"
    for path, expected in adapter.requires.items():
        if lookup(layer, path) != expected:
            return f"{path} is {lookup(layer, path)!r}, and only {expected!r} is this family"
    refused = adapter.refuses(layer) if adapter.refuses is not None else None
    if refused:
        return refused
    attention = lookup(layer, adapter.names[0].attention)
    if getattr(attention, "is_causal", False) or getattr(attention, "is_decoder", False):
        return "its attention is causal: it is a decoder layer"
    return None


def _not_here(layer: nn.Module) -> str | None:
    if any(is_offloaded(module) for module in layer.modules()):
        return "accelerate offloads its weights and brings them for each call of its parts: the original layer runs"
    return None


def _missing(layer: nn.Module, names: NameMap) -> list[str]:
    paths = [*names.given((*LINEAR_SLOTS, *NORM_SLOTS, *LAYER_SCALE_SLOTS, "activation", "feed_forward")).values()]
    paths += names.given(("heads", "kv_heads", "head_dim")).values()
    return [path for path in paths if lookup(layer, path) is None]


def _checks(
    layer: nn.Module, layer_class: type[nn.Module], adapter: Adapter, names: NameMap, allow_meta: bool
) -> Iterator[str]:
    opaque, reasons = examine_linears(layer, names)
    opaque_paths = tuple(getattr(names, slot) for slot in opaque)
    yield from _check_own_code(layer, layer_class, adapter, opaque_paths)
    yield from reasons
    yield from _check_norms(layer, names)
    yield from _check_nothing_added(layer, adapter, names)
    yield from _check_tensors(layer, opaque_paths, allow_meta, names.down if adapter.may_stay_wide else "")
    yield from _check_heads(layer, adapter, names)
    yield from _check_attention_function(layer, names)
    if names.activation and activation_name(lookup(layer, names.activation)) is None:
        activation = lookup(layer, names.activation)
        yield (
            f"its activation {names.activation} is {_describe(activation)}, which is not a known element-wise activation "
            "of torch or transformers"
        )


def _inside(name: str, paths: tuple[str, ...]) -> bool:
    """Whether a dotted name lies below one of these paths, or is one."""
    return any(name == path or name.startswith(path + ".") for path in paths)


def _check_own_code(
    layer: nn.Module, layer_class: type[nn.Module], adapter: Adapter, opaque: tuple[str, ...]
) -> Iterator[str]:
    """Every inner module must run the code of the layer's own file, of torch, or of transformers' activations; opaque ones run
    whatever they like."""
    trusted = {layer_class.__module__, "transformers.activations", *_sources(layer_class), *adapter.sources}
    for name, module in layer.named_modules():
        what = name or "the layer itself"
        if not runs_own_forward(module):
            yield f"somebody has replaced the forward of {what} on the instance; remove that first"
        elif name and is_patched(module):
            yield f"accelerate has put a hook around {what}, which a fused layer would not run; hook the whole layer"
        if not name:
            if getattr(layer_class.forward, "__module__", None) != layer_class.__module__:
                yield f"{layer_class.__name__}.forward has been replaced by other code"
            continue
        if has_foreign_hooks(module):
            yield f"{what} has forward hooks, which a fused layer would not run; remove them or hook the whole layer"
        cls = type(module)
        if cls.__module__.startswith("torch.nn.modules.") or _inside(name, opaque):
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
    if "forward" in state and is_patched(module):
        return True
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"]) and has_foreign_hooks(module)


def _sources(layer_class: type[nn.Module]) -> frozenset[str]:
    """Modelling files that the layer's own file takes parts from: generated files may import a sibling's modules."""
    own = namespace_of(layer_class)
    classes = [value for value in own.values() if isinstance(value, type) and issubclass(value, nn.Module)]
    return frozenset(cls.__module__ for cls in classes if cls.__module__.startswith("transformers.models."))


def _check_norms(layer: nn.Module, names: NameMap) -> Iterator[str]:
    for path in names.given(NORM_SLOTS).values():
        module = lookup(layer, path)
        cls = type(module)
        if type(module) is nn.LayerNorm and norm_kind(module) is None:
            yield f"{path} has no weight, or normalises over more than the hidden size"
        elif cls is not nn.Identity and norm_kind(module) is None and not cls.__module__.startswith("transformers."):
            yield f"{path} is a {registry.qualified_name(cls)}, which is neither LayerNorm nor RMSNorm"


def _check_nothing_added(layer: nn.Module, adapter: Adapter, names: NameMap) -> Iterator[str]:
    """Every parameter must belong to a slot: one that does not is maths that the program would leave out."""
    parts = [*names.given((*LINEAR_SLOTS, *NORM_SLOTS, *LAYER_SCALE_SLOTS, "feed_forward")).values()]
    parts += adapter.extra_parameters
    parts += [path.removesuffix("weight") + "bias" for path in parts if path.endswith("weight")]
    for name, _ in (*layer.named_parameters(), *layer.named_buffers()):
        if not _inside(name, tuple(parts)):
            yield f"{name} is not part of this family: the layer computes something more"


def _check_tensors(layer: nn.Module, opaque: tuple[str, ...], allow_meta: bool, may_stay_wide: str) -> Iterator[str]:
    tensors = {name: tensor for name, tensor in layer.named_parameters() if not _inside(name, opaque)}
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32 and _inside(name, (may_stay_wide,))}
    dtypes = {tensor.dtype for name, tensor in tensors.items() if name not in wide} or {torch.float32}
    devices = {tensor.device for tensor in layer.parameters()}
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


def _width(part: Any, side: Literal["in", "out"]) -> int | None:
    """Inputs or outputs of what is in a linear slot; None if an opaque one does not say."""
    if isinstance(part, ParameterPair):
        return part.weight.shape[1 if side == "in" else 0]
    return getattr(part, f"{side}_features", None)


def read_heads(layer: nn.Module, names: NameMap) -> tuple[int, int, int] | None:
    """H, Hk and d of a layer's attention; None if they cannot be found out."""
    heads, kv_heads, dim = (
        lookup(layer, path) if path else None for path in (names.heads, names.kv_heads, names.head_dim)
    )
    parts = {slot: linear_at(layer, path) for slot, path in names.given(LINEAR_SLOTS).items()}
    width = _width(parts["out"], "in")
    if names.qkv and isinstance(heads, int):
        fused, all_heads = _width(parts["qkv"], "out"), heads + 2 * (kv_heads or heads)
        if fused is not None and fused % all_heads == 0:
            width = fused // all_heads * heads
    elif not names.qkv:
        width = _width(parts["query"], "out") or width
    if isinstance(width, int) and isinstance(heads, int) and heads and width % heads == 0:
        dim = dim or width // heads
    elif isinstance(width, int) and isinstance(dim, int) and heads is None:
        heads = width // dim
    if kv_heads is None and not names.qkv and isinstance(dim, int):
        kv_heads = (_width(parts["key"], "out") or width or 0) // dim
    kv_heads = kv_heads or heads
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(dim, int)):
        return None
    return heads, kv_heads, dim


def _check_heads(layer: nn.Module, adapter: Adapter, names: NameMap) -> Iterator[str]:
    parts = {slot: linear_at(layer, path) for slot, path in names.given(LINEAR_SLOTS).items()}
    found = read_heads(layer, names)
    if found is None:
        width = _width(parts.get("query", parts.get("qkv")), "out")
        yield f"{lookup(layer, names.heads)!r} heads do not divide the query width {width}"
        return
    heads, kv_heads, dim = found
    outputs = {slot: _width(part, "out") for slot, part in parts.items()}
    inputs = {slot: _width(part, "in") for slot, part in parts.items()}
    inner = outputs.get("up")
    if inner is not None and adapter.gated_up:
        inner //= 2
    expected = {
        "query": heads * dim,
        "key": kv_heads * dim,
        "value": kv_heads * dim,
        "qkv": (heads + 2 * kv_heads) * dim,
        "gate": inner,
    }
    outer = {inputs.get(slot) for slot in ("query", "key", "value", "qkv", "gate", "up")}
    outer |= {outputs.get(slot) for slot in ("out", "down")}
    fits = (
        all(outputs.get(slot) in (width, None) for slot, width in expected.items())
        and inputs["out"] in (heads * dim, None)
        and len(outer - {None}) == 1
        and (inner is None or inputs.get("down") in (inner, None))
        and heads % kv_heads == 0
    )
    if not fits:
        yield "its projections have unequal widths (pruned heads, or attention to something else)"
    if dim > MAX_HEAD_DIM:
        yield f"its head size {dim} is above {MAX_HEAD_DIM}"


def attention_implementation(layer: nn.Module, names: NameMap) -> str | None:
    """The name of transformers' attention function that the layer would call ("sdpa", say); None if it calls none."""
    config = getattr(lookup(layer, names.attention), "config", None)
    return getattr(config, "_attn_implementation", None)


def _check_attention_function(layer: nn.Module, names: NameMap) -> Iterator[str]:
    """A function that somebody registered may compute anything, and it would not be called."""
    name = attention_implementation(layer, names)
    interface = _attention_functions(type(lookup(layer, names.attention)))
    if name is None or name == "eager" or "flash" in name or interface is None:
        return
    function = interface.get(name)
    if not getattr(function, "__module__", "").startswith("transformers."):
        yield (
            f"its attention implementation {name!r} is not transformers' own; choose another with "
            "model.set_attn_implementation('sdpa')"
        )


def _attention_functions(attention: type) -> Any:
    """transformers' functions by name, as an attention class's own file sees them; None without transformers."""
    current = sys.modules.get("transformers.modeling_utils")
    return namespace_of(attention).get("ALL_ATTENTION_FUNCTIONS", getattr(current, "ALL_ATTENTION_FUNCTIONS", None))


def _read_spec(layer: nn.Module, adapter: Adapter, names: NameMap) -> LayerSpec:
    opaque, _ = examine_linears(layer, names)
    linears = {slot: linear_at(layer, path) for slot, path in names.given(LINEAR_SLOTS).items()}
    found = read_heads(layer, names)
    assert found is not None  # or the checks would have said so
    heads, kv_heads, head_dim = found
    scale = lookup(layer, names.scaling) if names.scaling else adapter.scale
    hidden_size = _width(linears["out"], "out") or lookup(layer, names.norm1).weight.shape[0]
    return LayerSpec(
        adapter=adapter,
        names=names,
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else float(scale),
        activation=(activation_name(lookup(layer, names.activation)) or "module") if names.activation else adapter.activation,
        intermediate_size=(_width(linears["down"], "in") or 0) if names.down else 0,
        linear_bytes=sum(linear.weight.nbytes for slot, linear in linears.items() if slot not in opaque),
        opaque=opaque,
        wide=adapter.may_stay_wide and _is_wide(linears["down"], lookup(layer, names.norm2).weight.dtype),
    )


def _is_wide(part: Any, dtype: torch.dtype) -> bool:
    weight = getattr(part, "weight", None)
    return weight is not None and weight.dtype == torch.float32 and dtype != torch.float32


def _describe(thing: object) -> str:
    return registry.qualified_name(type(thing)) if isinstance(thing, nn.Module) else repr(thing)
