"""The linear slots of a live layer: plain ones, whose weights are free to be fused, and opaque ones, called as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .spec import LINEAR_SLOTS, NameMap

# The second is what nn.MultiheadAttention has for its output: a Linear that torch's dynamic quantisation passes over.
_PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear)


class ParameterPair:
    """A weight `[N, K]` and a bias `[N]` that a module keeps as parameters of its own, as `nn.MultiheadAttention` does."""

    def __init__(self, owner: nn.Module, weight_name: str) -> None:
        self.owner = owner
        self.weight_name = weight_name
        self.bias_name = weight_name.removesuffix("weight") + "bias"

    @property
    def weight(self) -> torch.Tensor:
        return getattr(self.owner, self.weight_name)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.owner, self.bias_name, None)


def lookup(layer: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    found: Any = layer
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def linear_at(layer: nn.Module, path: str) -> Any:
    """What is in a linear slot: a module, or a pair of parameters."""
    owner, _, name = path.rpartition(".")
    if name.endswith("weight"):
        return ParameterPair(lookup(layer, owner) if owner else layer, name)
    return lookup(layer, path)


def is_plain(part: Any) -> bool:
    """Whether a slot holds nothing but a weight and a bias."""
    if isinstance(part, ParameterPair):
        return True
    # A subclass of Parameter (torchao's) has a matrix product of its own.
    return type(part) in _PLAIN and type(part.weight) in (nn.Parameter, *_tracing_types())


def _tracing_types() -> tuple[type, ...]:
    if not torch.compiler.is_compiling():
        return ()
    from torch._subclasses.fake_tensor import FakeTensor

    return (torch.Tensor, FakeTensor)  # in an export they stand for parameters


def examine_linears(layer: nn.Module, names: NameMap) -> tuple[frozenset[str], list[str]]:
    """The opaque slots of a layer, and what is wrong with its linear slots."""
    opaque, reasons = set(), []
    for slot, path in names.given(LINEAR_SLOTS).items():
        part = linear_at(layer, path)
        if is_plain(part):
            continue
        cls = type(part)
        what = f"{path} is a {cls.__module__}.{cls.__qualname__}"
        if not isinstance(part, nn.Module):
            reasons.append(f"{what}, not a module")
        elif not (_is_known_adapter(part) or _token_wise(part)):
            reasons.append(
                f"{what}, which does not treat each token by itself (it was tried out); merge or remove it, or put an "
                "nn.Linear there"
            )
        else:
            opaque.add(slot)
    return frozenset(opaque), reasons


def _is_known_adapter(part: nn.Module) -> bool:
    """PEFT adds to each token by itself, so what it adapts decides. Other packages' linears are not known: the scale of an
    8-bit activation may be that of the whole batch."""
    return is_plain(part) or type(part).__module__.startswith("peft.") and is_plain(getattr(part, "base_layer", None))


@torch.inference_mode(False)
@torch.no_grad()
def _token_wise(module: nn.Module) -> bool:
    """Whether somebody's module gives each token the same answer, whatever its neighbours are and however they are shaped."""
    tensor = next(
        (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.empty(0, device="cpu")
    )
    width = next((m.in_features for m in module.modules() if isinstance(getattr(m, "in_features", None), int)), None)
    if not isinstance(width, int) or tensor.device.type == "meta" or module.training:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, width, generator=generator)
    x[:, 0] *= 20.0  # a neighbour that sets the scale of the batch, where there is one
    x = x.to(device=tensor.device, dtype=tensor.dtype)
    try:
        together = module(x)
        packed = module(x.reshape(1, 6, width).flip(1)).flip(1)
        alone = module(x[1:, 2:])
    except Exception:  # whatever it is, it cannot be called like a linear
        return False
    if together.shape[:2] != (2, 3) or packed.shape[:2] != (1, 6):
        return False
    return _same(packed[0], together.flatten(0, 1)) and _same(alone, together[1:, 2:])


def _same(value: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether every token is the same, but for the order of its sums."""
    tolerance = max(1e-4, 2 * torch.finfo(reference.dtype).eps)
    value, reference = value.double(), reference.double()
    return bool(((value - reference).norm(dim=-1) <= tolerance * reference.norm(dim=-1) + 1e-30).all())
