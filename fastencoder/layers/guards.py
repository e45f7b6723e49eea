"""What ends a fast call before it begins: conditions of this call that only the original forward answers exactly."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .stack import collected_outputs

# Arguments of a layer's forward that change nothing for an encoder layer without positional terms in its attention.
WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",  # of the loss: transformers' Trainer gives it to models, and they hand on what they do not know
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)
# What transformers records at a layer's boundary; everything else it records inside.
RECORDED_OUTSIDE = frozenset({"hidden_states", "_hidden_states_layers"})


class Delegated(Exception):
    """This call runs the original forward; the message says why."""


def refuse_hidden(hidden: Any, dimensions: tuple[int, ...] = (3,)) -> None:
    """Tensor subclasses (fake, distributed, ...) have a meaning of their own; a jagged nested tensor is understood."""
    if not isinstance(hidden, torch.Tensor):
        raise Delegated("the hidden states are not a tensor")
    if hidden.is_meta:
        raise Delegated("the hidden states are on the meta device, without values")
    if not hidden.is_nested and (type(hidden) not in (torch.Tensor, nn.Parameter) or hidden.dim() not in dimensions):
        raise Delegated(f"the hidden states are a {type(hidden).__name__} of {hidden.dim()} dimensions, not [B, S, D]")


def refuse_mode(layer: nn.Module, hidden: torch.Tensor) -> None:
    """Raises Delegated in every mode in which a layer does more than compute."""
    refuse_layers_mode(layer, hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        raise Delegated("autocast is on")
    if torch._C._are_functorch_transforms_active():
        raise Delegated("a functorch transform is active")
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise Delegated("global module hooks are installed")
    recorded = collected_outputs()
    if recorded and not recorded <= RECORDED_OUTSIDE:
        names = ", ".join(sorted(recorded - RECORDED_OUTSIDE))
        raise Delegated(f"{names} are recorded inside the layer")


def refuse_layers_mode(layer: nn.Module, hidden: torch.Tensor) -> None:
    """Of `refuse_mode` what may differ between layers of one call."""
    if layer.training:
        raise Delegated("the layer is in training mode")
    if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in layer.parameters())):
        _warn_gradients()
        raise Delegated("a gradient may be needed")


def refuse_arguments(others: dict[str, Any], understood: frozenset[str]) -> None:
    """Raises Delegated if an argument besides hidden states and mask asks for anything that is not `understood`."""
    for name, value in others.items():
        if value is None or value is False or name in WITHOUT_EFFECT or name in understood:
            continue
        raise Delegated(f"the argument {name} is given")


_warned_gradients = False


def _warn_gradients() -> None:
    global _warned_gradients
    if not _warned_gradients:
        _warned_gradients = True
        warnings.warn(
            "fastencoder: gradients are enabled, so the original layers run and nothing is faster. Wrap the call in "
            "torch.inference_mode() (or torch.no_grad()) if you do not train.",
            stacklevel=4,
        )
