"""All conformance rows, and the layer classes that have none, with the reason."""

from __future__ import annotations

from . import (
    cases_bias,
    cases_detr,
    cases_external,
    cases_post_ln,
    cases_pre_ln,
    cases_pre_ln_vision,
    cases_qformer,
    cases_rope,
    cases_vision,
    cases_windows,
)
from .case import Case

_FILES = (
    cases_bias,
    cases_detr,
    cases_external,
    cases_post_ln,
    cases_pre_ln,
    cases_pre_ln_vision,
    cases_qformer,
    cases_rope,
    cases_vision,
    cases_windows,
)
CASES: list[Case] = [case for file in _FILES for case in file.CASES]
BY_ID: dict[str, Case] = {case.id: case for case in CASES}
assert len(BY_ID) == len(CASES), "two rows share one id: give one a tag"

# Registered layer classes without a row of their own: qualified name -> why.
WITHOUT_ROW: dict[str, str] = {
    "transformers.models.neucodec.modeling_neucodec.NeuCodecDecoderLayer": "part of a codec: test_codecs.py",
    "transformers.models.xcodec2.modeling_xcodec2.Xcodec2DecoderLayer": "part of a codec: test_codecs.py",
}
