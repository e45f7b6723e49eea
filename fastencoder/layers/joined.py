"""Parameters that share one storage, so that several projections are one product without a copy of their weights.

The parameters stay what they are: the same objects, the same shapes and values, views of the shared storage now. Writing to
them, in whatever way, writes to the shared storage; replacing or moving them ends the sharing, and `joined` starts it anew.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import nn

_lock = threading.Lock()


def joined(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """`[N1, ...]`, `[N2, ...]`, ... -> `[N1 + N2 + ..., ...]` over the parameters' own memory. They are moved into one
    storage if they do not lie there, one behind the other, already."""
    with _lock, torch.inference_mode(False), torch.no_grad():
        if not _lie_together(parameters):
            together = torch.cat([parameter.detach() for parameter in parameters])
            parts = together.split([parameter.shape[0] for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part
        first = parameters[0].detach()
        rows = sum(parameter.shape[0] for parameter in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride())


def separate(parameters: Sequence[nn.Parameter]) -> None:
    """Gives each parameter a storage of its own again, if it lies in a larger one."""
    with _lock, torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            if parameter.untyped_storage().nbytes() > parameter.nbytes:
                parameter.data = parameter.data.clone()


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """A detached tensor over the same memory, whose storage is no larger than itself.

    Whoever saves a state_dict takes tensors of one storage for one tied weight: accelerate leaves out all but the first,
    safetensors' `save_model` refuses them.
    """
    return torch.from_dlpack(tensor.detach())


def _lie_together(parameters: Sequence[nn.Parameter]) -> bool:
    first = parameters[0]
    expected = first.data_ptr()
    for parameter in parameters:
        if (
            parameter.data_ptr() != expected
            or not parameter.is_contiguous()
            or parameter.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or parameter.shape[1:] != first.shape[1:]
        ):
            return False
        expected += parameter.nbytes
    return True
