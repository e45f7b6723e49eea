"""Random calls of the CPU's kernels, of the extension and without it, against the references in float64.

Memory that a kernel is to fill is NaN before, and so are the tokens of some sequences: neither may show anywhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils._device
from hypothesis import strategies as st

from fastencoder import kernels
from fastencoder.kernels import native
from fastencoder.kernels.linear import cpu_native

# Of the norm of a result: a few hundred roundings in a row, most of which cancel.
BARS = {"float32": 5e-6, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Attention:
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    isa: str
    features: tuple[str, ...]
    window: int
    poisoned: int  # this sequence is NaN, where there is one
    seed: int


@dataclass(frozen=True)
class Linear:
    tokens: int
    inputs: int
    outputs: int
    activation: str
    bias: bool
    residual: bool
    scale: bool
    gated: bool
    packed: bool
    dtype: str
    isa: str
    poisoned: int
    seed: int


@dataclass(frozen=True)
class AddNorm:
    tokens: int
    dim: int
    residual: bool
    scale: bool
    bias: bool
    rms: bool
    eps: float
    dtype: str
    isa: str
    poisoned: int
    seed: int


_ISAS = st.sampled_from(native.ISAS[: native.best + 1])
_DTYPES = st.sampled_from(tuple(BARS))
_SEEDS = st.integers(0, 2**16)
_FEATURES = ("window", "rope", "relative_bias", "bias")


@st.composite
def _attention(draw: st.DrawFn) -> Attention:
    kv_heads = draw(st.integers(1, 3))
    return Attention(
        lengths=tuple(draw(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 300)), min_size=1, max_size=6))),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        dim=draw(st.sampled_from((16, 24, 32, 64, 80))),
        dtype=draw(_DTYPES),
        isa=draw(_ISAS),
        features=tuple(sorted(draw(st.sets(st.sampled_from(_FEATURES))))),
        window=draw(st.integers(0, 40)),
        poisoned=draw(st.integers(0, 5)),
        seed=draw(_SEEDS),
    )


_linear = st.builds(
    Linear,
    tokens=st.one_of(st.integers(0, 9), st.integers(0, 120)),
    inputs=st.one_of(st.integers(1, 70), st.sampled_from((384, 385, 800))),
    outputs=st.integers(1, 150),
    activation=st.sampled_from(sorted(kernels.ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.booleans(),
    scale=st.booleans(),
    gated=st.booleans(),
    packed=st.booleans(),
    dtype=_DTYPES,
    isa=_ISAS,
    poisoned=st.integers(0, 120),
    seed=_SEEDS,
)
_add_norm = st.builds(
    AddNorm,
    tokens=st.integers(0, 40),
    dim=st.integers(8, 300),
    residual=st.booleans(),
    scale=st.booleans(),
    bias=st.booleans(),
    rms=st.booleans(),
    eps=st.sampled_from((1e-12, 1e-5, 0.5)),
    dtype=_DTYPES,
    isa=_ISAS,
    poisoned=st.integers(0, 40),
    seed=_SEEDS,
)
calls = st.one_of(_attention(), _linear, _add_norm)


def check(call: Attention | Linear | AddNorm) -> int:
    """Raises AssertionError at a difference; returns 1, the number of comparisons."""
    arguments = {Attention: _attention_call, Linear: _linear_call, AddNorm: _add_norm_call}[type(call)](call)
    run, exact, sound = arguments
    with native.isa(call.isa), kernels.implementation("cpu"), poisoned_memory():
        ours = run()
    reference = exact()
    assert ours.shape == reference.shape
    broken = ~sound
    if broken.any():
        assert not torch.isfinite(ours[broken].double().nan_to_num(nan=float("inf"))).all(), "NaN was lost"
    # Against 0.1 an element at least: a few sums that fall into the tail of GELU are nearly zero, and their rounding is not.
    least = 0.1 * max(int(sound.sum()), 1) ** 0.5
    error = (ours[sound].double() - reference[sound]).norm() / reference[sound].norm().clamp(min=least)
    assert not sound.any() or float(error) <= BARS[call.dtype], f"relative error {float(error):.2e}"
    return 1


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its relatives return NaN: an element that a kernel leaves unwritten cannot pass for right."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    torch.utils._device._device_constructors()  # remembers which functions make tensors: those that torch has
    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def _random(generator: torch.Generator, dtype: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def _attention_call(call: Attention) -> tuple[Any, Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(call.seed)
    tokens, longest = sum(call.lengths), max(call.lengths)
    offsets = torch.tensor([0, *torch.tensor(call.lengths).cumsum(0).tolist()], dtype=torch.int32)
    q = _random(generator, call.dtype, tokens, call.heads, call.dim)
    k, v = (_random(generator, call.dtype, tokens, call.kv_heads, call.dim) for _ in range(2))
    features: dict[str, Any] = {}
    if "window" in call.features:
        features["window"] = (call.window, call.window // 2)
    if "rope" in call.features:
        angles = torch.randn(tokens, call.dim // 4, generator=generator)
        features["rope"] = (angles.cos(), angles.sin(), call.seed % 2 == 0)
    if "relative_bias" in call.features:
        features["relative_bias"] = torch.randn(call.heads, 2 * call.window + 1, generator=generator)
    if "bias" in call.features:
        features["bias"] = torch.randn(len(call.lengths), 1, longest, longest, generator=generator)
    sound = torch.ones(tokens, dtype=torch.bool)
    if call.poisoned < len(call.lengths):
        first, end = offsets[call.poisoned].item(), offsets[call.poisoned + 1].item()
        sound[first:end] = False
        for x in (q, k, v):
            x[first:end] = float("nan")
    scale = call.dim**-0.5

    def run() -> torch.Tensor:
        return kernels.varlen_attention(q, k, v, offsets, longest, scale, **features)

    def exact() -> torch.Tensor:
        with kernels.implementation("reference"):
            wide = {name: _doubled(value) for name, value in features.items()}
            return kernels.varlen_attention(q.double(), k.double(), v.double(), offsets, longest, scale, **wide)

    return run, exact, sound


def _doubled(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_doubled, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def _linear_call(call: Linear) -> tuple[Any, Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(call.seed)
    rows = 2 * call.outputs if call.gated else call.outputs
    x = _random(generator, call.dtype, call.tokens, call.inputs)
    weight = _random(generator, call.dtype, rows, call.inputs)
    bias = _random(generator, call.dtype, rows) if call.bias else None
    residual = _random(generator, call.dtype, call.tokens, call.outputs) if call.residual else None
    scale = _random(generator, call.dtype, call.outputs) if call.scale else None
    sound = _sound(call.tokens, call.poisoned, x)
    more = (bias, call.activation, residual)

    def run() -> torch.Tensor:
        if call.packed and not call.gated and native.current:
            return cpu_native.linear(x, cpu_native.pack(weight), *more, scale=scale)
        return kernels.linear(x, weight, *more, gated=call.gated, scale=scale)

    def exact() -> torch.Tensor:
        with kernels.implementation("reference"):
            values = [None if t is None else t.double() for t in (bias, residual, scale)]
            return kernels.linear(
                x.double(), weight.double(), values[0], call.activation, values[1], gated=call.gated, scale=values[2]
            )

    return run, exact, sound


def _add_norm_call(call: AddNorm) -> tuple[Any, Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(call.seed)
    x = _random(generator, call.dtype, call.tokens, call.dim)
    residual = _random(generator, call.dtype, call.tokens, call.dim) if call.residual else None
    weight = _random(generator, call.dtype, call.dim)
    bias = _random(generator, call.dtype, call.dim) if call.bias else None
    scale = _random(generator, call.dtype, call.dim) if call.scale else None
    sound = _sound(call.tokens, call.poisoned, x)

    def run() -> torch.Tensor:
        return torch.cat(kernels.add_norm(x, residual, weight, bias, call.eps, scale, rms=call.rms), dim=1)

    def exact() -> torch.Tensor:
        with kernels.implementation("reference"):
            wide = [None if t is None else t.double() for t in (x, residual, weight, bias, scale)]
            return torch.cat(kernels.add_norm(*wide[:4], call.eps, wide[4], rms=call.rms), dim=1)

    return run, exact, sound


def _sound(tokens: int, poisoned: int, x: torch.Tensor) -> torch.Tensor:
    """Makes one row of `x` NaN, if it has so many; returns which rows are not."""
    sound = torch.ones(tokens, dtype=torch.bool)
    if poisoned < tokens:
        x[poisoned] = float("nan")
        sound[poisoned] = False
    return sound
