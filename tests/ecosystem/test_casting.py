"""A real model in other dtypes, cast before and while it is fast, under autocast, and loaded with dtype="auto"."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import BartConfig, BartModel, MBartConfig, MBartModel

from fastencoder import reverse, to_fast

from .. import tiny
from ..conformance.weights import sharpen
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
        out = shapes(real.batch()["input_ids"].to("meta"))[
            0
        ]  # the stock model reads its mask, which has no values there
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


@pytest.mark.parametrize("build", [(BartModel, BartConfig), (MBartModel, MBartConfig)], ids=["bart", "mbart"])
def test_fp16_overflow_is_clamped_as_in_the_original(build) -> None:
    """BART clamps once a value is not finite, mBART always. Without the clamp infinities come out."""
    cls, config = build
    sizes = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2)
    model = cls(config(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, **sizes)).get_encoder().eval()
    sharpen(model)
    with torch.no_grad():
        # The last thing before the clamp: a norm in BART, the feed-forward block in mBART.
        last = model.layers[0].final_layer_norm if cls is BartModel else model.layers[0].fc2
        last.weight.mul_(5e4)
    model.half()
    inputs = tiny.ragged()
    mask = inputs["attention_mask"].bool()
    seen = []
    model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out[mask]))
    with torch.inference_mode():
        model(**inputs)
        to_fast(model)(**inputs)
    stock, fast = seen
    bound = torch.finfo(torch.float16).max - 1000
    assert (stock.abs() == bound).any() and torch.isfinite(stock).all()
    assert torch.isfinite(fast).all() and fast.abs().max() == bound
    assert tiny.relative_error(fast, stock) < 5e-3
    assert tiny.calls(model) == (1, 0)
