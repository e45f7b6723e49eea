"""What one conformance row is, and how the tiny model it names is built."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import batches, external, hosts, weights
from .absent import Absent

FAST = "fast"  # to_fast converts the stack, and an ordinary call runs fast
DELEGATES = "delegates"  # to_fast converts the stack, but calls of this model (a causal mask) run the stock forward
REFUSED = "refused"  # to_fast(strict=True) refuses the model, with a reason
LEFT_ALONE = "left alone"  # to_fast converts other layers of the model; these are not an encoder's
UNREGISTERED = "unregistered"  # not in the registry: to_fast finds nothing that it knows in the model


@dataclass(frozen=True)
class Case:
    """One layer class inside one tiny model.

    ``layer`` and ``model`` are names inside ``transformers.models.<package>.<module>``, or ``model`` is "hosts.X", a class of
    ``hosts.py``; ``stack`` is the dotted path of
    the module list(s) that hold the layers ("a|b" for more than one, "a/b" where releases differ); ``inputs`` names a
    builder of ``batches.py``.
    """

    package: str
    layer: str
    model: str
    stack: str
    inputs: str
    placement: str  # "post" or "pre"
    config: dict[str, Any] = field(default_factory=dict)
    config_class: str = ""  # default: the model class's own config_class
    module: str = ""  # default: modeling_<package>
    home: str = ""  # full name of the module of a layer class that is not in transformers
    where: str = ""  # the file of this folder that holds the model, where it is one of our own
    outputs: tuple[str, str, str] = ("last_hidden_state", "hidden_states", "attentions")
    options: dict[str, Any] = field(default_factory=dict)  # for the builder of the inputs
    patterns: tuple[str, ...] = ()  # default: all those that the inputs know
    expect: str = FAST
    why: str = ""  # the reason, where expect is not FAST or a pattern is left out
    tag: str = ""  # tells two rows of one layer class apart
    by_source: bool = False  # not registered either, but known by its source
    eager_only: bool = False  # the model has no sdpa path
    padding_delegates: bool = False  # later parts of the model read padded positions: only unpadded calls run fast
    more_after: bool = False  # the model computes on after the stack: its output is not zero at padding
    no_double: str = ""  # why the stock model cannot run in fp64; the stock fp32 model is the reference then

    @property
    def id(self) -> str:
        return ".".join(part for part in (self.package, self.layer, self.tag) if part)

    @property
    def module_name(self) -> str:
        return self.home or f"transformers.models.{self.package}.{self.module or 'modeling_' + self.package}"

    @property
    def layer_class_name(self) -> str:
        return f"{self.module_name}.{self.layer}"

    @property
    def zero_padding(self) -> bool:
        """Whether the fast model's last hidden state is the last layer's own output, hence zero at padding."""
        return self.placement == "post" and self.expect == FAST and not (self.more_after or self.padding_delegates)

    def runs_fast(self, batch: batches.Batch) -> bool:
        """Whether the fast model is to run this batch through the fused layers."""
        padded = batch.real is not None and not batch.real.all()
        return self.expect == FAST and not (self.padding_delegates and padded)

    def layer_class(self) -> type[nn.Module]:
        return _lookup(self.module_name, self.layer)

    def model_class(self) -> type[nn.Module]:
        if self.model.startswith("hosts."):
            return getattr(hosts, self.model.removeprefix("hosts."))
        return _lookup(f"{__package__}.{self.where}" if self.where else self.module_name, self.model)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the stack(s), in order."""
        found: list[nn.Module] = []
        for path in self.stack.split("|"):
            found += list(_submodule(model, path.split("/")))
        return found


def _submodule(model: nn.Module, paths: list[str]) -> nn.Module:
    for path in paths[:-1]:
        try:
            return model.get_submodule(path)
        except AttributeError:
            pass
    return model.get_submodule(paths[-1])


def merge(*configs: dict[str, Any]) -> dict[str, Any]:
    """Later configs win; a value of None takes the key away."""
    merged: dict[str, Any] = {}
    for config in configs:
        merged.update(config)
    return {key: value for key, value in merged.items() if value is not None}


def _lookup(module_name: str, name: str) -> Any:
    if module_name.startswith("timm."):
        external.import_timm()
    elif module_name.startswith("transformers.models.pe_"):  # their towers are timm's by default, which wants torchvision
        with contextlib.suppress(Absent):
            external.import_timm()
    try:
        module: ModuleType = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or module_name.startswith(error.name):
            raise Absent(f"{module_name} is not in the installed transformers, or needs what is not installed") from None
        raise
    if not hasattr(module, name):
        raise Absent(f"{module_name} has no {name} in the installed transformers")
    return getattr(module, name)


def build_config(case: Case) -> Any:
    """The tiny config of a row."""
    model_class = case.model_class()
    if case.where:
        return SimpleNamespace(**case.config)
    if case.config_class:
        config_class = _lookup(case.module_name.replace(".modeling_", ".configuration_"), case.config_class)
    else:
        config_class = model_class.config_class
    try:
        return config_class(**case.config)
    except ModuleNotFoundError as error:  # a part of the model needs a package
        raise Absent(str(error)) from None


def build(case: Case, seed: int = 0, attn: str | None = None, sharp: bool = True) -> nn.Module:
    """A tiny fp32 model in eval mode; ``sharp`` re-initialises it so that every term of the layers shows in the output.

    Raises ``Absent`` where the installed transformers has no such class.
    """
    case.layer_class()
    config = build_config(case)
    if attn is not None:
        config._attn_implementation = attn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = case.model_class()(config)
            model.float().eval()
            for name, value in case.options.get("buffers", {}).items():
                model.get_buffer(name).fill_(value)
            if sharp:
                weights.sharpen(model, seed=seed)
                for path in case.options.get("quiet", ()):  # its output would drown what the layers add
                    weights.scale(model.get_submodule(path), 0.1)
                batch = batches.build(
                    case, model, batches.ONES if batches.ONES in batches.patterns(case) else batches.NONE
                )
                weights.calibrate(case.layers(model), lambda: model(**batch.inputs))
    return model
