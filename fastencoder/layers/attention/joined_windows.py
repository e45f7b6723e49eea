"""Windows of one image that lie one after the other in the batch, and layers that attend inside the whole image."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind


class JoinedWindows(AttentionKind):
    """`Adapter.options["windows"]` says, given a layer, how many neighbours in the batch it takes for one sequence."""

    def attend(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        windows = call.spec.adapter.options["windows"](call.layer)  # type: ignore[operator]
        if windows == 1:
            return super().attend(call, x)
        try:
            joined = call.batch.remembered(("joined", windows), call.batch.offsets, lambda: call.batch.joined(windows))
        except ValueError as error:
            raise Delegated(str(error)) from None
        return super().attend(replace(call, batch=joined), x)
