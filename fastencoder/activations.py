"""From an activation module or function of a model to the name that the kernels know it by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Element-wise modules of torch without state: the fast layer calls the layer's own, on packed tokens.
_ELEMENTWISE = (
    nn.ELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
)
_FUNCTIONS = {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.silu: "silu"}
# The classes of transformers.activations, by name: they are all element-wise. Those named here have a fused form.
_FUSED = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "LinearActivation": "identity",
}
# Those of timm.layers.activations.
_TIMM = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def activation_name(activation: object) -> str | None:
    """A name of `fastencoder.kernels.ACTIVATIONS`; "module" for an element-wise module to be called as it is; None for
    anything that is not known to be element-wise.
    """
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation)  # a function, from a config whose hidden_act is callable
    cls = type(activation)
    if cls is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if cls is nn.ReLU:
        return "relu"
    if cls is nn.SiLU:
        return "silu"
    if cls.__module__ == "transformers.activations":
        return _FUSED.get(cls.__name__, "module")
    if cls.__module__ == "timm.layers.activations":
        return _TIMM.get(cls.__name__)
    return "module" if cls in _ELEMENTWISE else None
