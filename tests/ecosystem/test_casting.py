"""A real model in other dtypes, cast before and while it is fast, under autocast, and loaded with dtype="auto"."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from fastencoder import reverse, to_fast

from .. import tiny
from . import real

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half()": lambda model: model.half(),
    "bfloat16()": lambda model: model.bfloat16(),
    "double()": lambda model: model.double(),
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "to(dtype=)": lambda model: model.to(device="cpu", dtype=torch.float16),
}


def hidden(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**real.batch())[0]


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return hidden(real.model().double())


@pytest.mark.parametrize("cast", CASTS)
def test_casts_while_fast(cast: str, exact: torch.Tensor) -> None:
    """At most twice as far from the exact answer as the stock model in this dtype; in fp32 again, what that gives."""
    mask = real.batch()["attention_mask"]
    stock, model = CASTS[cast](real.model()), to_fast(real.model())
    hidden(model)
    assert CASTS[cast](model) is model
    expected, got = hidden(stock), hidden(model)
    assert got.dtype == expected.dtype and {p.dtype for p in model.parameters()} == {got.dtype}
    error = tiny.relative_error(got, exact, mask)
    assert error <= max(2 * tiny.relative_error(expected, exact, mask), 1e-12)
    assert (error > 1e-4) == (got.dtype != torch.float64)
    stock.float(), model.float()
    assert tiny.relative_error(hidden(model), hidden(stock), mask) < 1e-5
    assert tiny.calls(model) == (18, 0)
    reverse(model)
    assert torch.equal(hidden(model), hidden(stock))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    stock, model = real.model(), to_fast(real.model())
    expected = hidden(stock)
    with torch.autocast("cpu", dtype):
        low = hidden(stock)
        assert torch.equal(hidden(model), low)
    assert tiny.relative_error(low, expected) > 1e-4
    assert tiny.reasons(model) == {"autocast is on"} and tiny.calls(model) == (0, 6)
    with torch.autocast("cpu", enabled=False):
        assert tiny.relative_error(hidden(model), expected, real.batch()["attention_mask"]) < 1e-5
    assert tiny.calls(model) == (6, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loaded_with_the_dtype_of_its_file(dtype: torch.dtype, tmp_path: Path, exact: torch.Tensor) -> None:
    real.model().to(dtype).save_pretrained(tmp_path)
    stock = transformers.AutoModel.from_pretrained(tmp_path, dtype="auto").eval()
    assert stock.dtype == dtype
    model, mask = to_fast(copy.deepcopy(stock)), real.batch()["attention_mask"]
    got, expected = hidden(model), hidden(stock)
    assert got.dtype == dtype and tiny.calls(model) == (6, 0)
    assert tiny.relative_error(got, exact, mask) <= max(2 * tiny.relative_error(expected, exact, mask), 2e-6)


def test_devices() -> None:
    """To the one device that every machine has, and to the one without data."""
    model = to_fast(real.model())
    expected = hidden(model)
    assert torch.equal(hidden(model.to("cpu").cpu()), expected)
    shapes = copy.deepcopy(model).to("meta")
    with torch.inference_mode():
        out = shapes(real.batch()["input_ids"].to("meta"))[0]  # the stock model reads its mask, which has no values there
    assert out.shape == expected.shape and out.device.type == "meta"
    empty = shapes.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():
        empty.get_buffer(name).copy_(buffer)
    assert torch.equal(hidden(empty), expected)


def test_deep_copies_go_their_own_way() -> None:
    model = to_fast(real.model())
    expected = hidden(model)
    twin = copy.deepcopy(model).bfloat16()
    assert hidden(twin).dtype == torch.bfloat16 and torch.equal(hidden(model), expected)
    reverse(twin)
    assert torch.equal(hidden(model), expected) and tiny.calls(model) == (18, 0)
