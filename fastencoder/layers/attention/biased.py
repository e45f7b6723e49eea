"""A mask that is added to the scores as it is: one that says more than which keys are padding."""

from __future__ import annotations

from typing import Any

import torch

from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind


class Biased(AttentionKind):
    """`attention_mask` is additive, `[B or 1, H or 1, S, S]`. Every position is kept, padding too."""

    reads = frozenset({"attention_mask"})

    def features(self, call: LayerCall) -> dict[str, Any]:
        mask, batch = call.arguments.get("attention_mask"), call.batch
        if mask is None:
            raise Delegated("this attention is causal where no mask is given")
        shape = tuple(mask.shape) if type(mask) is torch.Tensor and mask.is_floating_point() else ()
        fits = len(shape) == 4 and shape[0] in (1, batch.batch) and shape[1] in (1, call.spec.num_heads)
        if not fits or batch.indices is not None or shape[2:] != (batch.seqlen, batch.seqlen):
            raise Delegated("the mask is not an additive one over queries and keys")
        return {"bias": mask}
