"""All conformance rows, and the layer classes that have none, with the reason."""

from __future__ import annotations

from . import cases_bias, cases_post_ln, cases_pre_ln
from .case import Case

CASES: list[Case] = [*cases_bias.CASES, *cases_post_ln.CASES, *cases_pre_ln.CASES]
BY_ID: dict[str, Case] = {case.id: case for case in CASES}
assert len(BY_ID) == len(CASES), "two rows share one id: give one a tag"

# Registered layer classes without a row of their own: qualified name -> why.
WITHOUT_ROW: dict[str, str] = {}
