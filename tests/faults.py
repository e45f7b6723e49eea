"""What the tests of faults share: an answer, and what a model has to be like behind a fault."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from fastencoder import reverse
from fastencoder.layers.stack import _local as windows

from . import tiny

EPS = 1e-5


def answer(model: nn.Module, **more: object) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.ragged(), **more).last_hidden_state


def assert_as_new(model: nn.Module) -> None:
    """Nothing is open, the answers are stock's, layers can be called by themselves, and `reverse` gives the model back."""
    stock, mask = tiny.bert(), tiny.ragged()["attention_mask"]
    assert not any(windows.calls.values()) or _only_ended()
    expected = answer(stock)
    for _ in range(2):
        assert tiny.relative_error(answer(model), expected, mask) < EPS
    for index, layer in enumerate(model.encoder.layer):
        hidden = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(index))
        with torch.inference_mode():
            assert tiny.relative_error(layer(hidden), stock.encoder.layer[index](hidden)) < EPS
    assert not any(windows.calls.values())
    reverse(model)
    assert torch.equal(answer(model), expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]


def _only_ended() -> bool:
    """KeyboardInterrupt passes by the hooks that close a window: the next call in the thread finds that it has ended."""
    return all(call.has_ended for calls in windows.calls.values() for call in calls)


@contextlib.contextmanager
def said_once(*words: str) -> Iterator[None]:
    """Exactly one warning of this package inside of the block, with these words in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(each.message) for each in caught if "fastencoder" in str(each.message)]
    assert len(said) == 1, said
    assert all(word in said[0] for word in words), said
