"""CUDA graphs without CUDA: everything around the capture, with a recorder that runs the captured function again.

The stand-in keeps what makes graphs delicate: fixed buffers, one output that the next replay overwrites, host values that are
frozen at the capture. What a driver does is checked on a GPU, by `make gpu`.
"""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from fastencoder import NotFastError, fast, reverse, to_fast, warmup
from fastencoder.kernels import _triton, implementation
from fastencoder.layers.stack import Stack, StackCall
from fastencoder.runtime import graphs
from fastencoder.runtime.graphs import MAX_TOKENS, GraphRunner, bucket_of

from . import tiny
from .test_weights import CHANGES


class _Replayed:
    def __init__(self, function):
        self.function = function
        self.output = self.run().clone()

    def run(self):
        with implementation("reference"):  # the CPU's attention wants every token to be in a sequence
            return self.function()

    def replay(self):
        self.output.copy_(self.run())


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """Captures on the CPU; counts them, and fails on demand."""
    seen = {"captures": 0, "error": None}

    def capture(function, device, pool):
        if seen["error"] is not None:
            raise seen["error"]
        seen["captures"] += 1
        graph = _Replayed(function)
        return graph, graph.output

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "new_pool", lambda device: object())
    monkeypatch.setattr(graphs, "has_graphs", lambda device: True)
    return seen


def _runner(model) -> GraphRunner:
    runners = [stack.graphs for module in model.modules() for stack in Stack.installed(module)]
    assert len(runners) == 1
    return runners[0]


def _run(model, batch):
    with torch.inference_mode():
        return model(**batch).last_hidden_state


def _assert_equal(model, stock, batch):
    mask = batch["attention_mask"].bool()
    expected, output = _run(stock, batch)[mask], _run(model, batch)
    assert not output[~mask].any()
    assert tiny.relative_error(output[mask], expected) < 1e-5


def test_a_bucket_is_captured_when_it_comes_again(recorder):
    model, stock, batch = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert(), tiny.ragged()
    for captures, replays in ((0, 0), (1, 1), (1, 2)):
        _assert_equal(model, stock, batch)
        assert (recorder["captures"], _runner(model).replays) == (captures, replays)
    assert tiny.calls(model) == (9, 0)


def test_other_shapes_in_the_same_bucket_and_in_others(recorder):
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    for batch, seqlen in ((5, 12), (5, 12), (5, 13), (4, 12), (7, 12), (4, 20), (4, 20), (5, 12), (16, 30), (16, 30), (5, 13)):
        for seed in range(2):
            _assert_equal(model, stock, tiny.ragged(batch, seqlen, seed))
    assert _runner(model).captures == recorder["captures"] >= 3
    assert _runner(model).replays > 12


def test_what_an_earlier_batch_left_behind_does_not_show(recorder):
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    long, short = tiny.ragged(5, 12), tiny.ragged(5, 12)
    short["attention_mask"][0, 6:] = 0
    assert bucket_of(long["attention_mask"].sum(1).tolist()) == bucket_of(short["attention_mask"].sum(1).tolist())
    for batch in (long, long, short, long, short):
        _assert_equal(model, stock, batch)
    bad = tiny.ragged(5, 12)
    with torch.no_grad():
        embeddings = stock.embeddings(bad["input_ids"]).fill_(float("nan"))
        model(inputs_embeds=embeddings, attention_mask=bad["attention_mask"])
    _assert_equal(model, stock, short)


def test_without_padding(recorder):
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    batch = tiny.ragged(4, 16)
    batch["attention_mask"].fill_(1)
    outputs = [_run(model, batch) for _ in range(3)]
    assert _runner(model).replays == 2
    kept = outputs[1].clone()
    other = {**batch, "input_ids": batch["input_ids"].flip(0)}
    _assert_equal(model, stock, other)
    assert torch.equal(outputs[1], kept)  # a result is the caller's: later replays do not overwrite it


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changed_weights_take_effect(change):
    batch, model, stock = tiny.ragged(), to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    for _ in range(3):
        before = _run(model, batch)
    change(model)
    change(stock)
    for _ in range(3):
        _assert_equal(model, stock, batch)
    mask = batch["attention_mask"].bool()
    assert not torch.allclose(_run(model, batch)[mask], before[mask], atol=1e-3)


def test_a_layer_that_changed_runs_as_it_is_now():
    batch, model, stock = tiny.ragged(), to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    for _ in range(2):
        _run(model, batch)
    for each in (model, stock):
        each.encoder.layer[1].output.register_forward_hook(lambda module, args, output: output * 1.5)
    for _ in range(2):
        _assert_equal(model, stock, batch)
    assert tiny.calls(model)[1] == 2
    reverse(model)
    assert torch.equal(_run(model, batch), _run(stock, batch))


def test_hidden_states_attentions_and_gradients_go_around_the_graph():
    batch, model, stock = tiny.ragged(), to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    mask = batch["attention_mask"].bool()
    for _ in range(2):
        _run(model, batch)
    replays = _runner(model).replays
    with torch.inference_mode():
        ours, theirs = (each(**batch, output_hidden_states=True).hidden_states for each in (model, stock))
    assert len(ours) == len(theirs)
    for value, expected in zip(ours, theirs, strict=True):
        assert tiny.relative_error(value[mask], expected[mask]) < 1e-5
    model(**batch).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None
    assert _runner(model).replays == replays


def test_a_later_layer_that_delegates_gets_its_own_input(monkeypatch):
    """The first layer has run all of them; the second is then asked for something that only its original forward does."""
    batch, model, stock = tiny.ragged(), to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    for _ in range(2):
        _run(model, batch)
    from fastencoder.layers import fast_layer, guards

    calls = []

    def refuse(others, understood):
        calls.append(others)
        if len(calls) == 2:
            raise guards.Delegated("asked for in a test")

    monkeypatch.setattr(fast_layer, "refuse_arguments", refuse)
    monkeypatch.setattr(StackCall, "repeats", lambda *_: False)  # as with another argument
    _assert_equal(model, stock, batch)
    assert tiny.calls(model) == (8, 1)


def test_in_several_threads(recorder):
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    batches = [tiny.ragged(batch, seqlen, seed) for seed, (batch, seqlen) in enumerate([(5, 12), (5, 13), (6, 20), (4, 12)])]
    expected = [_run(stock, batch)[batch["attention_mask"].bool()] for batch in batches]
    errors = []

    def work(index):
        try:
            for _ in range(8):
                output = _run(model, batches[index])[batches[index]["attention_mask"].bool()]
                assert tiny.relative_error(output, expected[index]) < 1e-5
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert _runner(model).replays >= 20


def test_a_capture_that_fails_is_announced_once_and_answers_stay_right(recorder):
    model, stock, batch = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert(), tiny.ragged()
    recorder["error"] = RuntimeError("operation not permitted when stream is capturing")
    _run(model, batch)
    with pytest.warns(RuntimeWarning, match="not permitted.*without graphs") as caught:
        for _ in range(3):
            _assert_equal(model, stock, batch)
    assert len(caught) == 1
    assert tiny.calls(model) == (12, 0)


def test_running_out_of_memory_gives_the_graphs_up(recorder):
    model, stock, batch = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert(), tiny.ragged()
    for _ in range(2):
        _run(model, batch)
    recorder["error"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.warns(RuntimeWarning, match="not enough memory"):
        warmup(model, [(3, 30)])
    _assert_equal(model, stock, batch)
    assert not _runner(model)._captured


def test_warmup_captures_ahead_of_traffic(recorder):
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    warmup(model, [(4, 16), [12, 3, 1, 9, 0]])
    assert recorder["captures"] == 2
    batch = tiny.ragged(4, 16)
    batch["attention_mask"].fill_(1)
    _assert_equal(model, stock, batch)
    assert recorder["captures"] == 2
    assert _runner(model).replays == 3


def test_warmup_without_graphs_and_of_what_is_not_fast(recorder):
    model = tiny.bert()
    with pytest.raises(NotFastError):
        warmup(model, [(1, 8)])
    to_fast(model)
    warmup(model, [(2, 8)])
    assert not recorder["captures"]
    for shape in ((1, 2, 3), [], [0, 0], (0, 4), [-1, 4]):
        with pytest.raises(ValueError, match="shape"):
            warmup(model, [shape])
    with pytest.raises(ValueError, match="training mode"):
        warmup(model.train(), [(2, 8)])


def test_the_number_of_graphs_is_bounded(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    for seqlen in (12, 20, 40, 60):
        for _ in range(2):
            _assert_equal(model, stock, tiny.ragged(6, seqlen))
    assert recorder["captures"] == 2


def test_large_batches_run_without_a_graph(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_TOKENS", 20)
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    for _ in range(3):
        _assert_equal(model, stock, tiny.ragged())
    assert not recorder["captures"]


def test_on_a_cpu_the_option_changes_nothing(monkeypatch):
    monkeypatch.undo()
    model, stock = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert()
    for _ in range(3):
        _assert_equal(model, stock, tiny.ragged())
    assert not _runner(model).replays


def test_off_by_default():
    model = to_fast(tiny.bert())
    assert _runner(model) is None
    reverse(model)
    with fast(model, cuda_graphs=True):
        assert _runner(model) is not None


def test_tf32_is_part_of_the_key(recorder):
    model, batch = to_fast(tiny.bert(), cuda_graphs=True), tiny.ragged()
    matmul = torch.backends.cuda.matmul
    previous = matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
            assert _triton.dot_precision(torch.float32) == setting
            for _ in range(2):
                _run(model, batch)
    finally:
        matmul.fp32_precision = previous
    assert recorder["captures"] == 2


def test_copies_capture_their_own(recorder):
    model, stock, batch = to_fast(tiny.bert(), cuda_graphs=True), tiny.bert(), tiny.ragged()
    for _ in range(2):
        _run(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(to_fast(tiny.bert(), cuda_graphs=True)))):
        assert _runner(twin) is not _runner(model)
        for _ in range(2):
            _assert_equal(twin, stock, batch)
        assert _runner(twin).captures == 1


def test_a_model_of_two_stacks_and_one_without_a_mask(recorder):
    from transformers import CLIPConfig, CLIPModel

    from .conformance.weights import sharpen

    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, projection_dim=32)
    stock = CLIPModel(
        CLIPConfig(
            text_config=dict(sizes, vocab_size=99, max_position_embeddings=32),
            vision_config=dict(sizes, image_size=32, patch_size=8),
            projection_dim=32,
        )
    ).eval()
    sharpen(stock, 0)
    model = to_fast(copy.deepcopy(stock), cuda_graphs=True)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = stock.get_image_features(pixels)
        for _ in range(3):
            output = model.get_image_features(pixels)
    pick = lambda features: getattr(features, "pooler_output", features)  # noqa: E731
    assert tiny.relative_error(pick(output), pick(expected)) < 1e-5
    assert recorder["captures"] == 1


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100, 300, 1000, MAX_TOKENS])
def test_buckets_round_up_by_little(tokens):
    bucket = bucket_of([tokens])
    assert tokens <= bucket.tokens <= max(tokens * 9 / 8, tokens + 16)
    assert bucket.sequences == 1
    assert tokens <= bucket.longest < 2 * max(tokens, 16)
    assert bucket_of([1] * 5).sequences == 16
