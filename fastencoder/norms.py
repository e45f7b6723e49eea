"""What a norm module computes, found by asking it: LayerNorm or RMSNorm, and what is added to its weight.

Every model of transformers has a norm class of its own, most of them equal but for the name. Rather than trusting names, the
first norm of a class is tried out on random numbers. One that computes neither formula is called as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

_EPS_NAMES = ("eps", "variance_epsilon", "norm_eps", "layer_norm_eps")


@dataclass(frozen=True)
class NormKind:
    """The formula of a class of norms over the last dimension.

    Args:
        rms: RMSNorm (https://arxiv.org/abs/1910.07467), otherwise LayerNorm (https://arxiv.org/abs/1607.06450).
        offset: what is added to the weight (1 for Gemma's norms, otherwise 0).
        eps_name: the attribute that holds eps.
    """

    rms: bool
    offset: float
    eps_name: str


class Norm(NamedTuple):
    """The numbers of one norm: `weight` and `bias` `[D]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool


_LAYER_NORM = NormKind(rms=False, offset=0.0, eps_name="eps")
_kinds: dict[tuple[type, bool], NormKind | None] = {}


def norm_kind(module: nn.Module) -> NormKind | None:
    """The formula of a norm module, or None if it is neither of the two, has no weight, or more than one dimension."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    if type(module) is nn.LayerNorm:
        return _LAYER_NORM
    key = (type(module), getattr(module, "bias", None) is not None)
    if key not in _kinds:
        _kinds[key] = _try_out(module)
    return _kinds[key]


def read_norm(module: nn.Module, kind: NormKind) -> Norm:
    """The module's numbers, as they are now."""
    weight = module.weight + kind.offset if kind.offset else module.weight
    return Norm(weight, getattr(module, "bias", None), read_eps(module, kind), kind.rms)


def read_eps(module: nn.Module, kind: NormKind) -> float:
    """The module's eps, as it is now."""
    eps = getattr(module, kind.eps_name)
    return torch.finfo(module.weight.dtype).eps if eps is None else eps  # None: torch.nn.RMSNorm's default


@torch.inference_mode(False)
@torch.no_grad()
def _try_out(module: nn.Module) -> NormKind | None:
    eps_name = next((name for name in _EPS_NAMES if hasattr(module, name)), None)
    if eps_name is None:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    probe._forward_hooks.clear()
    probe._forward_pre_hooks.clear()
    if set(probe.state_dict()) - {"weight", "bias"}:
        return None
    for parameter in probe.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    setattr(probe, eps_name, 0.5)  # large enough to show
    x = torch.randn(1, 5, probe.weight.shape[0], generator=generator) + 0.3
    try:
        answer = probe(x)
    except Exception:  # whatever it is, it is not a norm of these two kinds
        return None
    for rms in (False, True):
        for offset in (0.0, 1.0):
            weight = probe.weight + offset
            if rms:
                expected = F.rms_norm(x, weight.shape, weight, 0.5)
                bias = getattr(probe, "bias", None)
                expected = expected if bias is None else expected + bias
            else:
                expected = F.layer_norm(x, weight.shape, weight, getattr(probe, "bias", None), 0.5)
            if isinstance(answer, torch.Tensor) and answer.shape == x.shape and torch.allclose(answer, expected, 1e-5, 1e-5):
                return NormKind(rms, offset, eps_name)
    return None
