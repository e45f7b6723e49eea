"""What the examination of the kernels finds wrong, and leaves as it is: each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol


class _Examined(Protocol):
    name: str
    capability: str
    triton: str


@dataclass(frozen=True)
class Accepted:
    """A problem that is known and left as it is. Patterns are those of a shell."""

    name: str
    capability: str
    triton: str
    problem: str
    reason: str

    def concerns(self, finding: _Examined) -> bool:
        """Whether this is about that kernel."""
        return (
            fnmatchcase(finding.name, self.name)
            and fnmatchcase(finding.capability, self.capability)
            and fnmatchcase(finding.triton, self.triton)
        )

    def covers(self, finding: _Examined, problem: str) -> bool:
        """Whether this is about that problem of that kernel."""
        return self.concerns(finding) and fnmatchcase(problem, self.problem)


_NEVER_READ = "the stores write a zero that nothing reads; the later release leaves them out"
# Some of these belong to families that are registered (a rotation, disentangled and decomposed positions).
_A_FEW = "a handful of instructions, left until a GPU shows whether a smaller block is faster"

# (kernel, capability, release of Triton, number of spills, reason)
_SPILLS = (
    ("linear-*-descriptors-*", "12.0", "3.6.*", "* stores, 0 loads", _NEVER_READ),
    ("varlen_attention-bf16-d64-s64-interleaved", "10.0", "3.9.*", "1 stores, 3 loads", _A_FEW),
    ("varlen_attention-bf16-d64-s64-p2c", "10.0", "3.9.*", "4 stores, 5 loads", _A_FEW),
    ("varlen_attention-bf16-d80-s256-decomposed", "8.0", "3.6.*", "7 stores, 7 loads", _A_FEW),
    ("varlen_attention-bf16-d64-s64-rope", "12.0", "3.9.*", "1 stores, 1 loads", _A_FEW),
    ("varlen_attention-tf32-d256-s512", "8.[69]", "3.9.*", "3 stores, 3 loads", _A_FEW),
    ("varlen_attention-bf16-d128-s256-softcap-window-rope", "8.[69]", "3.9.*", "7 stores, 7 loads", _A_FEW),
    ("varlen_attention-bf16-d256-s512-relative", "8.[69]", "3.9.*", "3 stores, 3 loads", _A_FEW),
    ("varlen_attention-bf16-d256-s512-softcap-window-rope", "9.0", "3.6.*", "5 stores, 3 loads", _A_FEW),
    ("varlen_attention-tf32-d64-s128", "10.0", "3.6.*", "15 stores, 15 loads", _A_FEW),
    ("varlen_attention-fp32-d128-s512", "1[02].0", "3.6.*", "[12] stores, 1 loads", _A_FEW),
    ("varlen_attention-fp32-d256-s512", "10.0", "3.6.*", "2 stores, 2 loads", _A_FEW),
    ("varlen_attention-bf16-d80-s256-decomposed", "12.0", "3.9.*", "3 stores, 4 loads", _A_FEW),
    ("varlen_attention-bf16-d80-s4096-decomposed", "10.0", "3.6.*", "5 stores, 5 loads", _A_FEW),
    ("varlen_attention-bf16-d64-s256-decomposed", "12.0", "3.6.*", "2 stores, 2 loads", _A_FEW),
    ("varlen_attention-tf32-d64-s512-softcap-window-rope", "10.0", "3.6.*", "1 stores, 1 loads", _A_FEW),
)

ACCEPTED = tuple(
    Accepted(name, capability, triton, f"spills registers ({count})", reason)
    for name, capability, triton, count, reason in _SPILLS
)
