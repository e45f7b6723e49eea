"""Scores bent to stay below a limit, as in Gemma 2 (https://arxiv.org/abs/2408.00118)."""

from __future__ import annotations

from typing import Any

from ...eligibility import attention_implementation
from ..guards import Delegated
from .call import LayerCall
from .kind import AttentionKind


class Softcap(AttentionKind):
    """The limit is the attention's attribute `attn_logit_softcapping`; None for no limit."""

    def features(self, call: LayerCall) -> dict[str, Any]:
        limit = getattr(call.binding.attention, "attn_logit_softcapping", None)
        if limit is None:
            return {}
        if attention_implementation(call.layer, call.spec.names) not in ("eager", None):
            raise Delegated("only eager attention is known to bend its scores")  # others leave it out, or raise
        return {"softcap": float(limit)}
