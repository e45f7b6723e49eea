"""transformers' `clear_import_cache`, which drops every module of transformers: models of before it live on beside new ones.

In processes of their own: the tests around these know one transformers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREPARE = """
import copy, sys, torch
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model, MobileBertConfig, MobileBertModel
from transformers.utils.import_utils import clear_import_cache
from fastencoder import NotEligibleError, is_fast, reverse, to_fast
from tests import tiny

SMALL = dict(vocab_size=99, max_position_embeddings=64, **tiny.SIZES)
POSITIONS = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8)
inputs = tiny.ragged()
mask = inputs["attention_mask"]

def make(cls, config, **more):
    model = cls(config(**SMALL, **more)).eval()
    tiny.sharpen(model)
    return model

def check(stock, fast):
    for _ in range(2):  # where the source is not believed, the first call compares
        for asked in ({}, {"output_hidden_states": True}):
            with torch.inference_mode():
                expected, got = stock(**inputs, **asked), fast(**inputs, **asked)
            for ours, theirs in zip((got[0], *got.get("hidden_states", ())), (expected[0], *expected.get("hidden_states", ()))):
                assert tiny.relative_error(ours, theirs, mask) < 1e-5
    assert tiny.calls(fast)[0] >= 9 and tiny.calls(fast)[1] <= 3, (tiny.calls(fast), tiny.reasons(fast))

def check_attentions(stock, fast):
    for model in (stock, fast):
        model.config._attn_implementation_internal = "eager"
    with torch.inference_mode():
        theirs, ours = (model(**inputs, output_attentions=True).attentions for model in (stock, fast))
    assert len(ours) == len(theirs) == 3 and all(torch.equal(*pair) for pair in zip(ours, theirs))
    fast.config.output_hidden_states = stock.config.output_hidden_states = True  # asked for where no layer can see it
    with torch.inference_mode():
        theirs, ours = (model(**inputs).hidden_states for model in (stock, fast))
    assert all(tiny.relative_error(one, other, mask) < 1e-5 for one, other in zip(ours, theirs, strict=True))
"""
BEFORE = """
stock, deberta = make(BertModel, BertConfig), make(DebertaV2Model, DebertaV2Config, **POSITIONS)
unknown = make(MobileBertModel, MobileBertConfig, embedding_size=48, intra_bottleneck_size=48, true_hidden_size=48)
converted = to_fast(copy.deepcopy(stock))
with torch.inference_mode():
    converted(**inputs)
clear_import_cache()
assert "transformers.models.bert.modeling_bert" not in sys.modules
"""
AGAIN = """
from transformers import BertModel as NewModel, DebertaV2Model
assert NewModel is not type(stock)
"""
CHECK = """
check(stock, converted)
for model in (stock, deberta):
    check(model, to_fast(copy.deepcopy(model)))
fast = to_fast(copy.deepcopy(stock))
check_attentions(copy.deepcopy(stock), fast)
reverse(fast)
assert type(fast.encoder.layer[0]) is type(stock.encoder.layer[0])
try:
    to_fast(unknown)
except NotEligibleError:
    assert not is_fast(unknown)
else:
    raise AssertionError("its attention would be looked up in another transformers than its own")
"""
NEW = """
clear_import_cache()
from transformers import BertConfig, BertModel
stock = make(BertModel, BertConfig)
fast = to_fast(copy.deepcopy(stock))
check(stock, fast)
assert tiny.calls(fast) == (12, 0)  # its source was believed at once
check_attentions(stock, fast)
"""
PROGRAMS = {
    "models of before": BEFORE + CHECK,
    "models of before beside new ones": BEFORE + AGAIN + CHECK,
    "models of after": NEW,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_conversion_after_a_reload(name: str) -> None:
    program = subprocess.run(
        [sys.executable, "-c", PREPARE + PROGRAMS[name]], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert program.returncode == 0, program.stderr[-3000:]
