"""`fastencoder scaffold`: what it proposes computes what the class computes, and what does not is not proposed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.vit import modeling_vit
from typer.testing import CliRunner

from fastencoder import registry, scaffold
from fastencoder.cli import app

BERT = "transformers.models.bert.modeling_bert.BertLayer"


class OwnNames(nn.Module):
    """A pre-LN layer with names that no model has."""

    def __init__(self, config=None) -> None:
        super().__init__()
        self.n_heads = 3
        self.wq, self.wk, self.wv, self.mix = (nn.Linear(24, 24) for _ in range(4))
        self.first_norm, self.second_norm = nn.LayerNorm(24), nn.LayerNorm(24)
        self.wide, self.act, self.narrow = nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)

    def forward(self, x, pad_mask=None):
        normed = self.first_norm(x)
        q, k, v = (w(normed).unflatten(-1, (3, 8)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pad_mask)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(self.act(self.wide(self.second_norm(x))))


class TwiceAdded(OwnNames):
    """Like it, but for one factor."""

    def forward(self, x, pad_mask=None):
        return x + 2 * (super().forward(x, pad_mask) - x)


@pytest.fixture
def unregistered(monkeypatch):
    entries = dict(registry._entries)
    del entries[BERT]
    monkeypatch.setattr(registry, "_entries", entries)


def test_a_class_like_a_registered_one(unregistered) -> None:
    layer = scaffold.build_layer(modeling_bert.BertLayer)
    best = scaffold.proposals(layer)[0]
    assert best.agrees and best.error < 1e-5
    assert best.adapter.norm_placement == "post"
    assert registry.by_class(best.like.partition(",")[0]) is not None


def test_names_do_not_decide(unregistered) -> None:
    """Pre-LN adapters of the same names fit BertLayer too, and do not agree with it."""
    layer = scaffold.build_layer(modeling_bert.BertLayer)
    wrong = [p for p in scaffold.proposals(layer) if p.adapter.norm_placement == "pre"]
    assert wrong
    assert not any(p.agrees for p in wrong)


def _drawn(layer: nn.Module) -> nn.Module:
    scaffold._draw(layer)
    return layer.eval()


def test_names_of_its_own_are_guessed() -> None:
    best = scaffold.proposals(_drawn(OwnNames()))[0]
    assert best.agrees and best.like == ""
    assert best.adapter.mask == "pad_mask"
    names = best.adapter.names[0]
    assert (names.query, names.out, names.up, names.down) == ("wq", "mix", "wide", "narrow")


def test_a_layer_that_computes_something_else_is_not_proposed() -> None:
    assert not any(p.agrees for p in scaffold.proposals(_drawn(TwiceAdded())))


def test_the_layer_is_left_as_it_was() -> None:
    layer = scaffold.build_layer(modeling_vit.ViTLayer)
    before, cls = copy.deepcopy(layer.state_dict()), type(layer)
    scaffold.proposals(layer)
    assert type(layer) is cls and not hasattr(layer, "_fastencoder")
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_the_command() -> None:
    run = CliRunner().invoke
    known = run(app, ["scaffold", BERT])
    assert known.exit_code == 0 and "registered already" in known.output
    own = run(app, ["scaffold", f"{__name__}.OwnNames"])
    assert own.exit_code == 2 and "cannot be built" in own.output  # there is no config beside it
    missing = run(app, ["scaffold", "nowhere.Layer"])
    assert missing.exit_code == 2 and "there is no class nowhere.Layer" in missing.output
    decoder = run(app, ["scaffold", "transformers.models.mbart.modeling_mbart.MBartDecoderLayer"])
    assert decoder.exit_code == 1 and "No known adapter" in decoder.output
    assert max(map(len, decoder.output.splitlines())) <= 128


def test_what_it_prints_can_be_run(unregistered) -> None:
    result = CliRunner().invoke(app, ["scaffold", BERT])
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    call = next(line for line in lines if line.startswith("register("))
    imports = [line for line in lines if line.startswith("from ")]
    try:
        exec("\n".join([*imports, call]))
        assert registry.by_class(BERT) is not None
    finally:
        registry._entries.pop(BERT, None)
