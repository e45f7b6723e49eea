"""Weights under which every term of a layer shows in the output.

A freshly initialised transformer hides mistakes: weights of standard deviation 0.02 make attention uniform, biases are
zero, norms are the identity and their eps is far below the variance. Here attention is far from uniform, every bias and
norm weight is random and large, and every norm of a layer has its own eps, comparable with the variance it is added to.
``test_sensitivity.py`` holds this file to it: dropping any one term changes the output by more than 10 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

BIAS_STD = 0.7
NORM_WEIGHT_STD = 0.4  # of their mean
NORM_BIAS_STD = 0.5
EPS_RATIO = (2.5, 3.5, 3.0)  # eps over the variance that it is added to, by position of the norm inside its layer
LAYER_SCALES = ("lambda", "layer_scale", "gamma", "gate_attn", "gate_ffn")
SPREAD = {"query": 1.0, "key": 1.5, "value": 1.5, "other": 1.0}  # of a linear's output, from token to token of a row
BIAS_TABLE_STD = 2.0  # of what is added to scores, by distance
BIAS_TABLES = ("relative_attention_bias", "rel_attn_embed")
QK_NORM_WEIGHT = 1.35  # norms of queries and keys undo what was done to their projections
_QK_NORMS = ("q_norm", "k_norm")
_ROLES = {
    "query": ("query", "q_proj", "q_lin", "q", "query_proj"),
    "key": ("key", "k_proj", "k_lin", "k", "key_proj"),
    "value": ("value", "v_proj", "v_lin", "v", "value_proj"),
}


def is_norm(module: nn.Module) -> bool:
    """A norm over the last dimension: LayerNorm, a subclass of it, or an RMS norm of transformers."""
    if isinstance(module, nn.LayerNorm):
        return True
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and hasattr(module, "weight")


def norms(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in layer.named_modules() if is_norm(module)]


def set_eps(norm: nn.Module, eps: float) -> None:
    """Set a norm's eps, whatever the module calls it."""
    for attribute in ("eps", "variance_epsilon"):
        if hasattr(norm, attribute):
            setattr(norm, attribute, eps)
            return
    raise AttributeError(f"{type(norm).__name__} has no eps")


@torch.no_grad()
def sharpen(model: nn.Module, seed: int = 0) -> None:
    """Re-initialise every parameter of ``model`` in place."""
    generator = torch.Generator().manual_seed(1000 + seed)
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if "Sinusoidal" in type(module).__name__ or "parametrizations" in module_name:
            continue  # a fixed table; the two factors of a weight norm are not independent
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad or parameter.dim() == 0:
                continue
            seen.add(id(parameter))
            parameter.copy_(_draw(module_name.rsplit(".", 1)[-1], module, name, parameter, generator))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)


@torch.no_grad()
def scale(module: nn.Module, factor: float) -> None:
    """Multiply the parameters of ``module`` in place."""
    for parameter in module.parameters():
        parameter.mul_(factor)


@torch.no_grad()
def calibrate(layers: Iterable[nn.Module], forward: Callable[[], object]) -> None:
    """Fit the norms and linears of ``layers`` to what they meet in ``forward()``.

    Every norm gets an eps of its own, in proportion to the variance that it is added to, and a weight that makes up for
    the larger denominator. Deep in a random stack all tokens look alike, and attention would hardly depend on the
    queries; so every linear is scaled to differ from token to token by a set amount, and its bias takes away what its
    output has in common. One forward does it all: each module is set when it is used, and what follows sees its final
    output.
    """
    done: set[int] = set()  # a layer may be called more than once

    def fit_norm(ratio: float, sharper: float) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if id(norm) not in done:
                done.add(id(norm))
                set_eps(norm, float(f"{ratio * float(args[0].var(-1, unbiased=False).mean()):.2g}"))
                if norm.weight is not None:
                    norm.weight.mul_(sharper * math.sqrt(1.0 + ratio))
                if getattr(norm, "bias", None) is not None:
                    norm.bias.mul_(sharper)

        return hook

    def fit_linear(spread: float) -> Callable[..., torch.Tensor]:
        def hook(linear: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if id(linear) not in done:
                done.add(id(linear))
                linear.weight.mul_(spread / float(output.std(-2).mean()))
                if linear.bias is not None:
                    common = (args[0] @ linear.weight.T).reshape(-1, output.shape[-1]).mean(0)
                    linear.bias.sub_(common)
            return nn.functional.linear(args[0], linear.weight, linear.bias)

        return hook

    handles = []
    for layer in layers:
        for index, (name, norm) in enumerate(norms(layer)):
            parent, _, leaf = name.rpartition(".")
            sharper = _sharpness(layer.get_submodule(parent)) if leaf in _QK_NORMS else 1.0
            handles.append(norm.register_forward_pre_hook(fit_norm(EPS_RATIO[index % len(EPS_RATIO)], sharper)))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(fit_linear(SPREAD[_role(name.rsplit(".", 1)[-1])])))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder layers call no hooks
    try:
        forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


def _sharpness(attention: nn.Module) -> float:
    """What the norms of queries and keys are multiplied by, so that scores are as far apart whatever their factor is."""
    usual = getattr(attention, "head_dim", 1) ** -0.5
    return QK_NORM_WEIGHT * math.sqrt(usual / getattr(attention, "scaling", usual))


def _role(name: str) -> str:
    return next((role for role, names in _ROLES.items() if name in names), "other")


def _draw(
    module_name: str, module: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    if is_norm(module) or isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
        return NORM_BIAS_STD * normal if name == "bias" else 1.0 + NORM_WEIGHT_STD * normal
    if name == "relative_position_bias_table":
        return 1.5 * normal
    if name == "logit_scale":  # a factor on cosines, as a logarithm: for the last heads more than 100, where it is cut off
        return torch.linspace(2.0, 5.0, parameter.numel()).view(parameter.shape)
    if "gate" in name:  # its hyperbolic tangent is the scale
        return -0.5 - 0.5 * torch.rand(parameter.shape, generator=generator)
    if any(part in name for part in LAYER_SCALES):
        return 0.3 + 1.4 * torch.rand(parameter.shape, generator=generator)
    if module_name in BIAS_TABLES:
        return BIAS_TABLE_STD * normal
    if isinstance(module, nn.Embedding) or parameter.dim() == 3 and parameter.shape[0] == 1:
        return normal  # tables, class tokens and positions
    if name.endswith("bias") or parameter.dim() == 1:
        return BIAS_STD * normal
    if parameter.dim() == 3 and name != "weight":  # of experts, [experts, out, in]: no later step makes their outputs large
        return 3.0 * normal / math.sqrt(parameter.shape[-1])
    return normal / math.sqrt(parameter[0].numel())
