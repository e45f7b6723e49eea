"""Proposes the adapter of a layer class that is not registered: `fastencoder scaffold package.module.MyLayer`.

The class is built, its parts are looked for under every name map that is known, and each adapter that fits is run against
the layer's own forward on random weights. What agrees is proposed; what only fits in name is said to.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from . import registry
from .eligibility import fitting_names, inspect_layer
from .layers import Delegated, LayerState, fast_class
from .spec import Adapter, NameMap

_BATCH, _SEQLEN = 3, 7
_LENGTHS = (5, 1, 6)  # no full row
AGREES = 1e-4  # relative error in float32

# What parts are usually called.
_USUAL = {
    "query": ("query", "q_proj", "q_lin", "to_q", "wq"),
    "key": ("key", "k_proj", "k_lin", "to_k", "wk"),
    "value": ("value", "v_proj", "v_lin", "to_v", "wv"),
    "qkv": ("qkv", "in_proj", "wqkv", "query_key_value"),
}
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "num_attention_head")
_SCALES = ("scaling", "scale", "softmax_scale")
_ACTIVATIONS = ("activation_fn", "intermediate_act_fn", "act_fn", "activation", "act")


class CannotBuild(ValueError):
    """No instance of the class can be made here; the message says why and what to do."""


@dataclass(frozen=True)
class Proposal:
    """An adapter that might be the class's.

    Args:
        adapter: with exactly one name map.
        like: a registered class that has it, and whether its norm placement was changed; "" if its names were guessed.
        error: relative error of the fast layer against the layer's own forward, on real tokens of a padded batch; None if it
            could not be run.
        why: why it could not be run, or what the checks say.
    """

    adapter: Adapter
    like: str
    error: float | None
    why: str = ""

    @property
    def agrees(self) -> bool:
        return self.error is not None and self.error < AGREES


def load_class(name: str) -> type[nn.Module]:
    """The class of a qualified name. Raises CannotBuild."""
    module_name, _, class_name = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CannotBuild(f"there is no class {name}: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CannotBuild(f"{name} is not a torch.nn.Module")
    return cls


def build_layer(cls: type[nn.Module]) -> nn.Module:
    """A layer of this class with random weights, from a default config of its own package.

    Raises:
        CannotBuild: its constructor wants something else than a config and an index.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    wanted = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    problems = []
    for config in _configs(cls):
        arguments = {p.name: config if "config" in p.name else 0 for p in wanted}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = cls(**arguments)
        except Exception as error:
            problems.append(f"{type(config).__name__}: {error}")
            continue
        _draw(layer)
        return layer.eval()
    said = f" ({'; '.join(problems)[:300]})" if problems else ""
    raise CannotBuild(
        f"{cls.__name__} cannot be built from a default config of its module{said}; describe it by hand "
        "(docs/adding-a-model.md)"
    )


def _configs(cls: type[nn.Module]) -> Iterator[Any]:
    """Default configs that the class may be made from: its module's own, the annotated one first."""
    from transformers import PretrainedConfig

    module = importlib.import_module(cls.__module__)
    found = [
        value for value in vars(module).values() if isinstance(value, type) and issubclass(value, PretrainedConfig)
    ]
    annotated = str(next((p.annotation for p in inspect.signature(cls.__init__).parameters.values() if p.name == "config"), ""))
    found.sort(key=lambda config_class: config_class.__name__ not in annotated)
    for config_class in found:
        try:
            config = config_class()
        except Exception:  # some composites have no default
            continue
        config._attn_implementation = "eager"
        yield config


@torch.no_grad()
def _draw(layer: nn.Module) -> None:
    """Random weights that make every term show."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(noise * (2.0 / parameter.shape[-1]) ** 0.5)
        else:
            parameter.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)


def proposals(layer: nn.Module) -> list[Proposal]:
    """Every adapter whose names and checks fit the layer, those that agree with its own forward first."""
    fast = copy.deepcopy(layer)
    found = [_try_out(layer, fast, adapter, like) for adapter, like in (*_candidates(), *_guesses(layer))]
    fitting = [proposal for proposal in found if proposal is not None]
    return sorted(fitting, key=lambda p: (p.error is None, p.error or 0.0))


def _candidates() -> Iterator[tuple[Adapter, str]]:
    """Each registered adapter with one of its name maps, once; then with its norms in the other place."""
    seen: list[Adapter] = []
    for moved in (False, True):
        for entry in registry.entries():
            for names in entry.adapter.names:
                adapter = replace(entry.adapter, names=(names,), decoder=None)
                like = entry.layer_class
                if moved:
                    other = "pre" if adapter.norm_placement == "post" else "post"
                    adapter, like = replace(adapter, norm_placement=other), f"{like}, with {other}-LN"
                if adapter not in seen:
                    seen.append(adapter)
                    yield adapter, like


def _guesses(layer: nn.Module) -> Iterator[tuple[Adapter, str]]:
    """Plain attention under the names that the parts seem to have, with the norms in either place."""
    guessed = guess_names(layer)
    if "?" in guessed.values() or not guessed.get("heads"):
        return
    parameters = inspect.signature(type(layer).forward).parameters
    mask = next((name for name in parameters if "mask" in name), "attention_mask")
    for placement in ("pre", "post"):
        for extra_outputs in (None, 0, 1):
            yield Adapter(placement, (NameMap(**guessed),), mask=mask, extra_outputs=extra_outputs), ""  # type: ignore[arg-type]


def _try_out(layer: nn.Module, fast: nn.Module, adapter: Adapter, like: str) -> Proposal | None:
    """None where the names do not fit. `fast` is a copy of the layer that may be changed."""
    if fitting_names(layer, adapter) is None:
        return None
    finding = inspect_layer(layer, type(layer), adapter)
    if finding.spec is None:
        return None if finding.left_alone else Proposal(adapter, like, None, "; ".join(finding.reasons))
    object.__setattr__(fast, "_fastencoder", LayerState(adapter, None))
    fast.__class__ = fast_class(type(layer))
    try:
        return Proposal(adapter, like, _error(layer, fast, adapter))
    except Delegated as reason:
        return Proposal(adapter, like, None, f"its call cannot run fast: {reason}")
    except Exception as error:
        return Proposal(adapter, like, None, f"its forward could not be called: {error}")


@torch.no_grad()
def _error(layer: nn.Module, fast: nn.Module, adapter: Adapter) -> float:
    """Relative error of a fast layer on the real tokens of a padded batch."""
    width = inspect_layer(layer, type(layer), adapter).spec.hidden_size  # type: ignore[union-attr]
    hidden = torch.randn(_BATCH, _SEQLEN, width, generator=torch.Generator().manual_seed(1))
    real = torch.arange(_SEQLEN) < torch.tensor(_LENGTHS)[:, None]
    parameters = inspect.signature(type(layer).forward).parameters
    arguments: dict[str, Any] = {}
    if adapter.mask in parameters:
        additive = torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min)
        arguments[adapter.mask] = ~real if adapter.mask_marks == "padding" else additive[:, None, None]
    else:
        real = torch.ones_like(real)
    if adapter.time_major:
        hidden = hidden.transpose(0, 1)
    outputs = [module(hidden, **arguments) for module in (layer, fast)]
    if fast._fastencoder.delegated_calls:
        raise Delegated(fast._fastencoder.last_reason)
    expected, got = (output[0] if isinstance(output, tuple) else output for output in outputs)
    if type(outputs[0]) is not type(outputs[1]):
        raise ValueError(f"it returns a {type(outputs[0]).__name__}, and the adapter a {type(outputs[1]).__name__}")
    if adapter.time_major:
        expected, got = expected.transpose(0, 1), got.transpose(0, 1)
    return float((expected - got)[real].double().norm() / expected[real].double().norm())


def guess_names(layer: nn.Module) -> dict[str, str]:
    """Slots of a `NameMap` by the usual names, for a class that no known map fits; "?" where nothing was found."""
    modules = {name: module for name, module in layer.named_modules() if name}
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    norms = [name for name, module in modules.items() if "norm" in type(module).__name__.lower()]
    guessed = {slot: _named(linears, ends) for slot, ends in _USUAL.items()}
    rest = [name for name in linears if name not in guessed.values()]
    for slot in ("out", "up", "down"):
        guessed[slot] = rest.pop(0) if len(rest) == {"out": 3, "up": 2, "down": 1}[slot] else "?"
    guessed["norm1"], guessed["norm2"] = [*norms, "?", "?"][:2]
    attention = (guessed["query"] or guessed["qkv"]).rpartition(".")[0]
    guessed["activation"] = next(iter(_attributes(layer, modules, _ACTIVATIONS)), "?")
    guessed["heads"] = next((path for path in _attributes(layer, modules, _HEADS) if path.startswith(attention)), "?")
    guessed["scaling"] = next((path for path in _attributes(layer, modules, _SCALES) if path.startswith(attention)), "")
    return {field.name: guessed[field.name] for field in fields(NameMap) if guessed.get(field.name)}


def _attributes(layer: nn.Module, modules: dict[str, nn.Module], names: tuple[str, ...]) -> Iterator[str]:
    """Paths of the attributes of these names on the layer's modules."""
    for path, module in {"": layer, **modules}.items():
        for name in names:
            if getattr(module, name, None) is not None:
                yield f"{path}.{name}".lstrip(".")


def _named(linears: list[str], ends: tuple[str, ...]) -> str:
    return next((name for name in linears if name.rpartition(".")[2].lower() in ends), "")


def describe(name: str, layer: nn.Module, found: list[Proposal]) -> str:
    """What to write down for the class, as text."""
    agreeing = next((proposal for proposal in found if proposal.agrees), None)
    if agreeing is not None:
        how = _like_another(name, agreeing) if agreeing.like else _by_guess(name, agreeing)
        measured = f"Relative error {agreeing.error:.1e} against its own forward, in float32"
        return f"{how}\n({measured}, with padding if it takes a mask.)"
    lines = [f"No known adapter computes what {name} computes."]
    for proposal in found[:3]:
        said = f"its answers differ by {proposal.error:.1e}" if proposal.error is not None else proposal.why
        lines.append(f"  {_short(proposal.like) or 'by the names of its parts'}: {said}")
    lines += [
        "Its parts, as far as their names tell (? where they do not):",
        _adapter("pre", guess_names(layer), None, "attention_mask"),
        "docs/adding-a-model.md says what each slot means.",
    ]
    return "\n".join(lines)


def _like_another(name: str, proposal: Proposal) -> str:
    like, _, moved = proposal.like.partition(", with ")
    expression = f'registry.by_class("{like}").adapter'
    if moved:
        expression = f'replace({expression}, norm_placement="{proposal.adapter.norm_placement}")'
    lines = [
        f"{name} computes what {_short(like)} computes{f', but with {moved}' if moved else ''}. In your own code:",
        *(["    from dataclasses import replace"] if moved else []),
        "    from fastencoder import register, registry",
        f'    register("{name}", {expression})',
    ]
    if name.startswith("transformers.models."):
        path = name.removeprefix("transformers.models.")
        lines += [f"In fastencoder, beside {_short(like)}:", f'    "{path}": "<model types>",']
    return "\n".join(lines)


def _by_guess(name: str, proposal: Proposal) -> str:
    adapter = proposal.adapter
    given = {field.name: getattr(adapter.names[0], field.name) for field in fields(NameMap)}
    return "\n".join(
        [
            f"{name} is a {adapter.norm_placement}-LN layer with names of its own. In your own code:",
            "    from fastencoder import register",
            "    from fastencoder.spec import Adapter, NameMap",
            _adapter(adapter.norm_placement, given, adapter.extra_outputs, adapter.mask),
            f'    register("{name}", MINE)',
        ]
    )


def _adapter(placement: str, names: dict[str, Any], extra_outputs: int | None, mask: str) -> str:
    inside = "".join(f'            {slot}="{path}",\n' for slot, path in names.items() if path)
    more = f", extra_outputs={extra_outputs}" if extra_outputs is not None else ""
    more += f', mask="{mask}"' if mask != "attention_mask" else ""
    return f'    MINE = Adapter(\n        "{placement}",\n        (NameMap(\n{inside}        ),){more},\n    )'


def _short(name: str) -> str:
    return name.rpartition(".")[2]
