"""Fast embeddings: the same hidden states as the model's own, for every class in the table, checked on the CPU."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig

from fastencoder import reverse, to_fast
from fastencoder.families.embeddings import EMBEDDINGS
from fastencoder.kernels import native
from fastencoder.layers import EmbeddingState, FastEmbeddings, fast_class, fast_embeddings

from . import tiny


@pytest.fixture(autouse=True, params=["as on CUDA", "extension"])
def where(request, monkeypatch):
    if request.param == "as on CUDA":
        monkeypatch.setattr(fast_embeddings, "on_gpu", lambda device: True)
    elif native.current == 0:
        pytest.skip("no C++ extension here")


def _config(name: str):
    small = dict(vocab_size=99, hidden_size=32, max_position_embeddings=40, type_vocab_size=2, pad_token_id=1)
    if "distilbert" in name:
        return DistilBertConfig(vocab_size=99, dim=32, max_position_embeddings=40, pad_token_id=1)
    for key, config_class in (("albert", AlbertConfig), ("electra", ElectraConfig), (".bert.", BertConfig)):
        if key in name:
            return config_class(embedding_size=32, **small) if key != ".bert." else config_class(**small)
    return RobertaConfig(**small)


def _embeddings(name: str, seed: int = 0) -> nn.Module:
    module_name, _, class_name = name.rpartition(".")
    torch.manual_seed(seed)
    embeddings = getattr(importlib.import_module(module_name), class_name)(_config(name)).eval()
    for parameter in embeddings.parameters():
        nn.init.normal_(parameter)
    return embeddings


def _fast(embeddings: nn.Module) -> nn.Module:
    fast = copy.deepcopy(embeddings)
    fast._fastencoder_embeddings = EmbeddingState(EMBEDDINGS[f"{type(fast).__module__}.{type(fast).__name__}"])
    fast.__class__ = fast_class(type(fast))
    return fast


def _ids(batch: int = 3, seqlen: int = 11) -> torch.Tensor:
    ids = torch.randint(2, 99, (batch, seqlen), generator=torch.Generator().manual_seed(1))
    ids[0, 7:] = 1
    ids[1, :2] = 1
    return ids


BERT = "transformers.models.bert.modeling_bert.BertEmbeddings"


@pytest.mark.parametrize("name", EMBEDDINGS)
@torch.inference_mode()
def test_every_class(name):
    with torch.inference_mode(False):
        stock = _embeddings(name)
        fast, ids = _fast(stock), _ids()
    positions = torch.randint(0, 40, (1, 11))
    types = torch.randint(0, 2, ids.shape)
    cases = [dict(), dict(position_ids=positions), dict(position_ids=positions.expand(3, -1).contiguous())]
    if EMBEDDINGS[name].has_types:
        cases += [dict(token_type_ids=types), dict(token_type_ids=types, position_ids=positions)]
    for shape in (ids, ids[:1, :5], ids[:, :8]):
        for case in cases:
            given = {key: value[:, : shape.shape[1]][: max(1, shape.shape[0])] for key, value in case.items()}
            expected, output = stock(shape, **given), fast(shape, **given)
            assert torch.allclose(output, expected, atol=1e-5), (case.keys(), (output - expected).abs().max())
    assert fast._fastencoder_embeddings.fast_calls == 3 * len(cases)


@torch.no_grad()
def test_embeddings_of_embeddings_and_hooks_and_training_run_the_original():
    stock = _embeddings(BERT)
    fast, ids = _fast(stock), _ids()
    given = torch.randn(3, 11, 32)
    assert torch.equal(fast(inputs_embeds=given), stock(inputs_embeds=given))
    assert torch.equal(fast(ids, past_key_values_length=4), stock(ids, past_key_values_length=4))
    with torch.enable_grad():
        fast(ids).sum().backward()
    assert fast.word_embeddings.weight.grad is not None
    for module in (fast.word_embeddings, fast.LayerNorm, fast.dropout):
        handle = module.register_forward_hook(lambda module, args, output: output * torch.linspace(0.5, 2, 32))
        assert not torch.allclose(fast(ids), stock(ids), atol=0.1)
        handle.remove()
    fast.train(), stock.train()
    torch.manual_seed(0)
    dropped = fast(ids)
    torch.manual_seed(0)
    assert torch.equal(dropped, stock(ids))
    assert not fast._fastencoder_embeddings.fast_calls


class _Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


@torch.no_grad()
def test_replaced_parts_and_changed_buffers_are_seen():
    stock = _embeddings(BERT)
    fast, ids = _fast(stock), _ids()
    assert torch.allclose(fast(ids), stock(ids), atol=1e-5)
    for each in (stock, fast):
        each.token_type_ids.fill_(1)
        each.position_ids = (each.position_ids + 3) % 40
    assert torch.allclose(fast(ids), stock(ids), atol=1e-5)
    assert fast._fastencoder_embeddings.fast_calls == 2
    for each in (stock, fast):
        shifted = _Shifted(99, 32)
        shifted.weight = each.word_embeddings.weight
        each.word_embeddings = shifted
    assert torch.equal(fast(ids), stock(ids))
    assert fast._fastencoder_embeddings.fast_calls == 2


def test_in_a_model_and_back():
    model, batch = tiny.bert(), tiny.ragged()
    cls, keys = type(model.embeddings), list(model.state_dict())
    mask = batch["attention_mask"].bool()
    with torch.inference_mode():
        expected = model(**batch).last_hidden_state[mask]
        to_fast(model)
        assert isinstance(model.embeddings, FastEmbeddings) and isinstance(model.embeddings, cls)
        assert torch.allclose(model(**batch).last_hidden_state[mask], expected, atol=1e-5)
        assert model.embeddings._fastencoder_embeddings.fast_calls == 1
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.allclose(twin(**batch).last_hidden_state[mask], expected, atol=1e-5)
            assert twin.embeddings._fastencoder_embeddings.fast_calls == 1
        assert list(model.state_dict()) == keys
        reverse(model)
        assert type(model.embeddings) is cls and not hasattr(model.embeddings, "_fastencoder_embeddings")
        assert torch.equal(model(**batch).last_hidden_state[mask], expected)


def test_on_a_cpu_without_the_extension_the_original_runs(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(native, "current", 0)
    stock = _embeddings(BERT)
    fast = _fast(stock)
    with torch.inference_mode():
        assert torch.equal(fast(_ids()), stock(_ids()))
    assert not fast._fastencoder_embeddings.fast_calls
