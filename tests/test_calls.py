"""What a converted model does with every kind of call: run it packed, pad in and out, or hand it to the original layers."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.vit.modeling_vit import ViTLayer

from fastencoder import explain, to_fast
from fastencoder.layers import FastLayer
from fastencoder.layers.stack import StackCall, current_call

from . import tiny


@pytest.fixture
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    stock = tiny.bert()
    return stock, to_fast(copy.deepcopy(stock))


def test_no_mask_and_a_full_mask(models) -> None:
    stock, fast = models
    ids = tiny.ragged()["input_ids"]
    with torch.inference_mode():
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
            assert tiny.relative_error(got, expected) < 1e-6
    assert tiny.calls(fast) == (6, 0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_both_attention_implementations(implementation: str) -> None:
    stock, inputs = tiny.bert(attn_implementation=implementation), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-6
    assert tiny.calls(fast) == (3, 0)


def test_masks_that_are_not_padding_run_the_original_layers(models) -> None:
    stock, fast = models
    ids = tiny.ragged()["input_ids"]
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(5, 1, 12, 12)
    bias = torch.randn(5, 1, 12, 12)
    with torch.inference_mode():
        for mask in (causal, bias, torch.full((5, 1, 1, 12), -1.0)):
            expected = stock(input_ids=ids, attention_mask=mask).last_hidden_state
            got = fast(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # the embeddings are fast
    assert tiny.calls(fast) == (0, 9)


def test_a_four_dimensional_padding_mask_is_fused(models) -> None:
    stock, fast = models
    inputs = tiny.ragged()
    mask = inputs["attention_mask"]
    wide = mask.bool()[:, None, None, :].expand(5, 1, 12, 12).clone()
    with torch.inference_mode():
        expected = stock(input_ids=inputs["input_ids"], attention_mask=wide).last_hidden_state
        got = fast(input_ids=inputs["input_ids"], attention_mask=wide).last_hidden_state
    assert tiny.relative_error(got, expected, mask) < 1e-6
    assert tiny.calls(fast) == (3, 0)


def test_hidden_states_are_padded_and_right(models) -> None:
    stock, fast = models
    inputs = tiny.ragged()
    with torch.inference_mode():
        fast(**inputs)
        for _ in range(2):
            expected = stock(**inputs, output_hidden_states=True).hidden_states
            got = fast(**inputs, output_hidden_states=True).hidden_states
            assert len(got) == len(expected) == 4
            for a, b in zip(got, expected, strict=True):
                assert tiny.relative_error(a, b, inputs["attention_mask"]) < 1e-6
        fast(**inputs)
    assert tiny.calls(fast) == (12, 0)


def test_attentions_are_the_originals() -> None:
    stock, inputs = tiny.bert(attn_implementation="eager"), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        expected, got = (m(**inputs, output_attentions=True).attentions for m in (stock, fast))
        assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        fast(**inputs)
    assert tiny.calls(fast) == (3, 3)


def test_training_and_gradients_run_the_original_layers(models) -> None:
    stock, fast = models
    inputs = tiny.ragged()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (stock, fast):
            model.zero_grad()
            model(**inputs).last_hidden_state.square().sum().backward()
    name = "encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(stock.get_parameter(name).grad, fast.get_parameter(name).grad)
    assert tiny.reasons(fast) == {"a gradient may be needed"}
    fast.train()
    with torch.no_grad():
        torch.manual_seed(3)
        got = fast(**inputs).last_hidden_state
        stock.train()
        torch.manual_seed(3)
        assert torch.equal(got, stock(**inputs).last_hidden_state)
    assert tiny.calls(fast)[0] == 0
    fast.eval()
    with torch.no_grad():
        fast(**inputs)
    assert tiny.calls(fast)[0] == 3


def test_a_dropout_in_training_mode_runs_the_original_layer(models) -> None:
    _, fast = models
    fast.encoder.layer[1].output.dropout.train()
    with torch.inference_mode():
        fast(**tiny.ragged())
    assert tiny.calls(fast) == (2, 1)
    assert tiny.reasons(fast) == {"a part of the layer is in training mode"}


def test_explain_says_why_calls_were_not_fast(models) -> None:
    _, fast = models
    with torch.inference_mode():
        fast(**tiny.ragged())
        assert all(row.reasons == () for row in explain(fast))
        fast.encoder.layer[1].train()
        fast(**tiny.ragged())
    says = {row.name: row.reasons for row in explain(fast)}
    assert says["encoder.layer.0"] == ()
    assert says["encoder.layer.1"][0].startswith("1 of 2 calls ran the original layer")
    assert "training" in says["encoder.layer.1"][0]


def test_gradients_warn_once() -> None:
    from fastencoder.layers import guards

    guards._warned_gradients = False
    fast = to_fast(tiny.bert())
    with pytest.warns(UserWarning, match="inference_mode") as caught:
        fast(**tiny.ragged())
        fast(**tiny.ragged())
    assert len([w for w in caught if "inference_mode" in str(w.message)]) == 1


def test_autocast_runs_the_original_layers(models) -> None:
    stock, fast = models
    inputs = tiny.ragged()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert tiny.reasons(fast) == {"autocast is on"}


def test_functional_calls_and_vmap(models) -> None:
    stock, fast = models
    inputs = tiny.ragged()
    other = {name: value.detach() * 1.1 for name, value in stock.named_parameters()}
    with torch.inference_mode():
        expected, got = (torch.func.functional_call(m, other, kwargs=inputs).last_hidden_state for m in (stock, fast))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # the embeddings are fast
    hidden = torch.randn(2, 3, 12, 48)
    with torch.no_grad():
        expected, got = (torch.func.vmap(m.encoder.layer[0])(hidden) for m in (stock, fast))
    assert torch.equal(got, expected)


def test_fake_tensors_run_the_original_layers(models) -> None:
    """Shape inference without computation, as profilers and exporters do it."""
    from torch._subclasses import FakeTensorMode

    _, fast = models
    hidden = torch.randn(2, 3, 48)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        out = fast.encoder.layer[0](mode.from_tensor(hidden))
    assert out.shape == (2, 3, 48) and tiny.calls(fast) == (0, 1)


def test_compiled_and_traced_models_give_the_same_answers(models) -> None:
    stock, fast = models
    inputs = tiny.ragged()
    with torch.inference_mode():
        expected = stock(**inputs).last_hidden_state
        compiled = torch.compile(fast, backend="eager")
        assert tiny.relative_error(compiled(**inputs).last_hidden_state, expected, inputs["attention_mask"]) < 1e-5


def test_hooks_on_a_layer_see_padded_hidden_states(models) -> None:
    _, fast = models
    inputs, seen = tiny.ragged(), []
    handle = fast.encoder.layer[1].register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    with torch.inference_mode():
        fast(**inputs)
    handle.remove()
    assert seen == [((5, 12, 48), (5, 12, 48))]
    assert tiny.calls(fast) == (3, 0)


def test_hooks_inside_a_layer_run(models) -> None:
    stock, fast = models
    inputs = tiny.ragged()
    with torch.inference_mode():
        fast(**inputs)  # the layers are bound before the hook comes
        for model in (stock, fast):
            model.encoder.layer[1].intermediate.dense.register_forward_hook(lambda _, __, out: out * 0.5)
        expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-5
    assert tiny.calls(fast) == (5, 1)


def test_a_single_layer_called_directly(models) -> None:
    stock, fast = models
    hidden, mask = torch.randn(5, 12, 48), tiny.ragged()["attention_mask"]
    wide = mask.bool()[:, None, None, :].expand(5, 1, 12, 12)
    with torch.inference_mode():
        for index in (0, 2):
            expected = stock.encoder.layer[index](hidden, wide)
            got = fast.encoder.layer[index](hidden, wide)
            assert tiny.relative_error(got, expected, mask) < 1e-6
    assert tiny.calls(fast) == (2, 0)


def test_a_loop_that_is_not_transformers_own() -> None:
    """Somebody's encoder adds something between BERT layers: it must see padded hidden states."""

    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = tiny.bert().encoder.layer

        def forward(self, hidden, mask):
            for layer in self.layers:
                hidden = layer(hidden, mask) + torch.arange(hidden.shape[1]).view(1, -1, 1) / 100
            return hidden

    stock = Loop().eval()
    fast = to_fast(copy.deepcopy(stock))
    hidden, mask = torch.randn(5, 12, 48), tiny.ragged()["attention_mask"]
    wide = mask.bool()[:, None, None, :].expand(5, 1, 12, 12)
    with torch.inference_mode():
        assert tiny.relative_error(fast(hidden, wide), stock(hidden, wide), mask) < 1e-6
    assert tiny.calls(fast) == (3, 0)


def test_a_loop_that_stops_early_is_an_error_not_a_wrong_shape() -> None:
    fast = to_fast(tiny.bert())
    layers = fast.encoder.layer
    stack = layers[0]._fastencoder.stack
    original = type(stack).layers_of
    type(stack).layers_of = lambda self, owner: [*original(self, owner), layers[0]]
    try:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="stopped after 3 of 4 layers"):
            fast(**tiny.ragged())
    finally:
        type(stack).layers_of = original
    with torch.inference_mode():
        assert fast(**tiny.ragged()).last_hidden_state.shape == (5, 12, 48)


def test_shortening_the_list_of_layers_after_the_conversion() -> None:
    stock = tiny.bert()
    fast = to_fast(copy.deepcopy(stock))
    inputs = tiny.ragged()
    with torch.inference_mode():
        for model in (stock, fast):
            model.encoder.layer = model.encoder.layer[:2]
        expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-6


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_exception_between_layers_leaves_nothing_behind(layer: int) -> None:
    stock, inputs = tiny.bert(), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        for error in (ValueError, KeyboardInterrupt):

            def explode(*_, error=error):
                raise error

            handle = fast.encoder.layer[layer].register_forward_hook(explode)
            with pytest.raises(error):
                fast(**inputs)
            handle.remove()
            wide = inputs["attention_mask"].bool()[:, None, None, :]
            hidden = torch.randn(5, 12, 48)
            for index in range(3):
                assert fast.encoder.layer[index](hidden, wide).shape == hidden.shape
            expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
            assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-6


def test_an_interrupt_inside_an_original_layer_leaves_nothing_behind(models) -> None:
    _, fast = models
    inputs = tiny.ragged()

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    handle = fast.encoder.layer[1].output.register_forward_hook(interrupt)
    with torch.inference_mode():
        with pytest.raises(KeyboardInterrupt):
            fast(**inputs)
        handle.remove()
        stack = fast.encoder.layer[0]._fastencoder.stack
        assert current_call(stack) is None
        assert fast(**inputs).last_hidden_state.shape == (5, 12, 48)


def test_threads_do_not_disturb_one_another(models) -> None:
    _, fast = models
    batches = [tiny.ragged(batch=4 + i % 3, seqlen=12 + i, seed=i) for i in range(8)]
    results: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        expected = [fast(**batch).last_hidden_state for batch in batches]

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                results[index] = fast(**batches[index], output_hidden_states=index % 2 == 0).last_hidden_state
                assert torch.equal(results[index], expected[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))
    assert all(torch.equal(results[i], expected[i]) for i in range(8))


def test_nested_tensors_in_nested_tensors_out(models) -> None:
    stock, fast = models
    rows = [torch.randn(n, 48) for n in (3, 7, 1, 5)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with torch.inference_mode():
        got = fast.encoder(nested).last_hidden_state
        assert got.is_nested and got.layout is torch.jagged and got.shape[0] == 4
        for row, result in zip(rows, got.unbind(), strict=True):
            assert tiny.relative_error(result, stock.encoder(row[None]).last_hidden_state[0]) < 1e-6
        padded = got.to_padded_tensor(0.0)
    assert padded.shape == (4, 7, 48)
    assert tiny.calls(fast) == (3, 0)


def test_tokens_that_are_packed_already(models) -> None:
    """`[1, T]` with cumulative lengths, as flattening collators pass them to flash attention."""
    stock, fast = models
    inputs = tiny.ragged()
    keep = inputs["attention_mask"].bool()
    keep[3, 0] = True
    lengths = keep.sum(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    with torch.inference_mode():
        got = fast(
            input_ids=inputs["input_ids"][keep][None],
            position_ids=positions[None],
            cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets,
            max_length_q=int(lengths.max()),
            max_length_k=int(lengths.max()),
        ).last_hidden_state
        assert got.shape == (1, int(keep.sum()), 48)
        for row in range(5):
            alone = stock(input_ids=inputs["input_ids"][row][keep[row]][None]).last_hidden_state[0]
            assert tiny.relative_error(got[0, offsets[row] : offsets[row + 1]], alone) < 1e-6
    assert tiny.calls(fast) == (3, 0)


def test_offsets_that_do_not_fit_are_an_error(models) -> None:
    _, fast = models
    offsets = torch.tensor([0, 3, 99], dtype=torch.int32)
    with torch.inference_mode(), pytest.raises(ValueError, match="rise from 0 to the number of tokens, 12"):
        fast(input_ids=tiny.ragged()["input_ids"][:1], cu_seq_lens_q=offsets)


def test_a_causal_tower_of_an_encoder_class_runs_the_original_layers() -> None:
    """CLIP's text tower has the vision tower's layer class and passes is_causal, with or without a mask."""
    config = CLIPTextConfig(vocab_size=99, max_position_embeddings=32, **tiny.SIZES)
    stock = CLIPTextModel(config).eval()
    fast = to_fast(copy.deepcopy(stock))
    inputs = tiny.ragged()
    with torch.inference_mode():
        for kwargs in (inputs, {"input_ids": inputs["input_ids"]}):
            assert torch.equal(fast(**kwargs).last_hidden_state, stock(**kwargs).last_hidden_state)
    assert tiny.calls(fast)[0] == 0


def test_images(models) -> None:
    stock = tiny.vit()
    fast = to_fast(copy.deepcopy(stock))
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert tiny.relative_error(fast(pixels).last_hidden_state, stock(pixels).last_hidden_state) < 1e-6
    assert all(isinstance(layer, FastLayer) for layer in fast.layers)


def test_a_batch_of_nothing_but_padding(models) -> None:
    _, fast = models
    inputs = tiny.ragged()
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    with torch.inference_mode():
        got = fast(**inputs).last_hidden_state
    assert got.shape == (5, 12, 48) and (got == 0).all()


def test_an_empty_batch_is_what_it_was(models) -> None:
    _, fast = models
    with torch.inference_mode():
        assert fast(input_ids=torch.zeros(0, 4, dtype=torch.long)).last_hidden_state.shape == (0, 4, 48)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sequence_does_not_reach_its_neighbours(models, bad: float) -> None:
    _, fast = models
    inputs = tiny.ragged()
    with torch.inference_mode():
        embeds = fast.embeddings.word_embeddings(inputs["input_ids"])
        clean = fast(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
        embeds = embeds.clone()
        embeds[0, 2] = bad
        got = fast(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert not torch.isfinite(got[0, :7]).all()
    assert tiny.relative_error(got[1:], clean[1:]) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_content_never_reaches_a_token(models, bad: float) -> None:
    _, fast = models
    inputs = tiny.ragged()
    with torch.inference_mode():
        embeds = fast.embeddings.word_embeddings(inputs["input_ids"])
        clean = fast(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
        embeds = embeds.masked_fill(inputs["attention_mask"][..., None] == 0, bad)
        got = fast(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(got, clean)


def test_a_call_repeats_only_with_the_very_same_arguments() -> None:
    """Behind the first of the layers that ran at once, only what was checked already is not checked again."""
    mask, other, stand_in = torch.zeros(1), torch.zeros(1), torch.empty(0)
    call = StackCall([])
    call.carried = stand_in
    assert not call.repeats(BertLayer, (stand_in, mask), {})
    call.accepted = BertLayer, (torch.empty(0), mask), {"flag": False}
    assert call.repeats(BertLayer, (stand_in, mask), {"flag": False})
    assert not call.repeats(ViTLayer, (stand_in, mask), {"flag": False})
    assert not call.repeats(BertLayer, (stand_in, other), {"flag": False})
    assert not call.repeats(BertLayer, (other, mask), {"flag": False})
    assert not call.repeats(BertLayer, (stand_in,), {"flag": False})
    assert not call.repeats(BertLayer, (stand_in, mask, None), {"flag": False})
    assert not call.repeats(BertLayer, (stand_in, mask), {"flag": True})
    assert not call.repeats(BertLayer, (stand_in, mask), {})
    assert not call.repeats(BertLayer, (stand_in, mask), {"flag": False, "more": None})
    assert not call.repeats(BertLayer, (), {"flag": False})
