"""The registry, asked both ways and extended from outside."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastencoder import explain, register, registry, to_fast
from fastencoder.families.post_ln import BERT
from fastencoder.layers import fast_class

from . import tiny


def test_both_ways() -> None:
    (entry,) = registry.by_model_type("bert")
    assert entry.layer_class == "transformers.models.bert.modeling_bert.BertLayer"
    assert fast_class(entry.load()).__name__ == "FastBertLayer"
    model = tiny.bert()
    assert registry.by_class(type(model.encoder.layer[0])) is entry
    assert registry.by_class(entry.layer_class) is entry
    assert isinstance(to_fast(model).encoder.layer[0], fast_class(entry.load()))
    assert {e.layer_class.rpartition(".")[2] for e in registry.by_model_type("wav2vec2")} == {
        "Wav2Vec2EncoderLayer",
        "Wav2Vec2EncoderLayerStableLayerNorm",
    }
    assert registry.by_model_type("no-such-model") == []
    assert registry.by_class(nn.Linear) is None


def test_an_entry_whose_class_is_not_installed() -> None:
    for name in ("transformers.models.bert.modeling_bert.NoSuchLayer", "no_such_package.Layer"):
        with pytest.raises(ImportError):
            registry.Entry(name, BERT).load()


def test_layer_classes_are_unique_and_typed() -> None:
    names = [entry.layer_class for entry in registry.entries()]
    assert len(names) == len(set(names)) > 60
    assert all(entry.model_types or not entry.layer_class.startswith("transformers.") for entry in registry.entries())


def test_nothing_is_imported_to_ask_it() -> None:
    code = (
        "import sys, fastencoder.registry as r; assert r.by_model_type('bert') and r.entries();"
        "bad = [m for m in sys.modules if m.startswith('transformers.models.')]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "adapter", "error", "says"),
    [
        ("MyLayer", BERT, TypeError, "qualified name"),
        (tiny.bert, BERT, TypeError, "qualified name"),
        ("a.b.C", {"query": "q"}, TypeError, "Adapter"),
        ("transformers.models.bert.modeling_bert.BertLayer", replace(BERT, clamp="always"), ValueError, "already"),
    ],
)
def test_bad_registrations(name, adapter, error, says) -> None:
    with pytest.raises(error, match=says):
        register(name, adapter)
    assert registry.by_class("transformers.models.bert.modeling_bert.BertLayer").adapter is BERT


def third_party() -> types.ModuleType:
    """A module with a layer of its own: BERT's parts, written by somebody else."""
    source = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(48, 48) for _ in range(4))
        self.heads = 3
    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (3, 16)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class MyLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.n1, self.n2 = Attention(), nn.LayerNorm(48), nn.LayerNorm(48)
        self.up, self.act, self.down = nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 48)
    def forward(self, x):
        x = self.n1(x + self.mix(x))
        return self.n2(x + self.down(self.act(self.up(x))))

class MyEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([MyLayer(), MyLayer()])
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""
    module = types.ModuleType("third_party_encoder")
    sys.modules[module.__name__] = module
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


def test_a_third_party_adds_a_layer_class() -> None:
    from fastencoder.spec import Adapter, NameMap

    module = third_party()
    names = NameMap(
        query="mix.query", key="mix.key", value="mix.value", out="mix.proj", heads="mix.heads",
        norm1="n1", up="up", activation="act", down="down", norm2="n2",
    )  # fmt: skip
    stock = module.MyEncoder().eval()
    try:
        with pytest.raises(ValueError, match="not registered"):
            to_fast(stock)
        register("third_party_encoder.MyLayer", Adapter("post", (names,)), model_types=("mine",))
        assert [row.status for row in explain(stock)] == ["eligible", "eligible"]
        fast = to_fast(copy.deepcopy(stock))
        x = torch.randn(2, 7, 48)
        with torch.inference_mode():
            assert tiny.relative_error(fast(x), stock(x)) < 1e-6
        assert tiny.calls(fast) == (2, 0)
        assert registry.by_model_type("mine")[0].layer_class == "third_party_encoder.MyLayer"
        registry.unregister("third_party_encoder.MyLayer")  # fast layers keep what they were made with
        twin = copy.deepcopy(fast)
        with torch.inference_mode():
            assert torch.equal(twin(x), fast(x))
        assert [row.status for row in explain(twin)] == ["fast", "fast"]
    finally:
        registry._entries.pop("third_party_encoder.MyLayer", None)
        del sys.modules["third_party_encoder"]
