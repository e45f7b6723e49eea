"""Random weights under which a mistake shows, for a model that has no real ones."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def draw(model: nn.Module, seed: int = 0) -> None:
    """Draws every trainable parameter of a model anew, in place.

    As models are initialised, weights of standard deviation 0.02 make attention uniform, biases are zero and norms are the
    identity: a dropped term would hardly change an answer. Here a matrix keeps the size of what it multiplies
    (standard deviation 1 / sqrt(inputs)), biases have 0.3, and the weights of norms lie around 1. Tables that are not
    trained, such as sinusoids, and factors of a weight norm stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        if "parametrizations" in path:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter.dim() == 0:
                continue
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if isinstance(module, nn.Embedding) or (parameter.dim() > 1 and parameter.shape[0] == 1):
                pass  # tables, and tokens and positions that are added
            elif parameter.dim() > 1:
                drawn /= parameter[0].numel() ** 0.5
            else:
                drawn = 0.3 * drawn if name.endswith("bias") else 1 + 0.3 * drawn
            parameter.copy_(drawn)
