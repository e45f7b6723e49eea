"""torch.compile and torch.export of a converted model: one graph, packed inside, with the stock model's answers."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    DistilBertConfig,
    DistilBertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastencoder import to_fast

from . import tiny
from .conformance.weights import sharpen

HIDDEN = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(1))
REAL = tiny.ragged()["attention_mask"].bool()  # [5, 12]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


class Compiled:
    """A compiled model that keeps its graphs."""

    def __init__(self, model: Any, backend: str = "eager", **options: Any) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._compile = lookup_backend(backend)
        self._function = torch.compile(model, backend=self._record, **options)

    def _record(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs.append(graph)
        return self._compile(graph, inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def operators(self, first: int = 0) -> Counter[str]:
        return operators(self.graphs[first:])


def operators(graphs: list[torch.fx.GraphModule]) -> Counter[str]:
    """How often each operator of this package is in the graphs."""
    targets = [str(node.target).split(".") for graph in graphs for node in graph.graph.nodes]
    return Counter(target[1] for target in targets if target[0] == "fastencoder")


def _bert(seed: int = 0, **config: Any) -> nn.Module:
    return tiny.bert(seed, num_hidden_layers=2, **config)


def _sharp(model: nn.Module) -> nn.Module:
    sharpen(model.eval())
    return model


def _distilbert() -> nn.Module:
    sizes = dict(dim=48, n_layers=3, n_heads=3, hidden_dim=80)
    return _sharp(DistilBertModel(DistilBertConfig(vocab_size=99, max_position_embeddings=64, **sizes)))


def _wav2vec2(**config: Any) -> nn.Module:
    convolutions = dict(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2)
    positions = dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    return _sharp(Wav2Vec2Model(Wav2Vec2Config(**tiny.SIZES, **convolutions, **positions, **config)))


def _albert() -> nn.Module:
    return _sharp(AlbertModel(AlbertConfig(vocab_size=99, max_position_embeddings=64, embedding_size=16, **tiny.SIZES)))


def _bart() -> nn.Module:
    sizes = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2)
    config = BartConfig(vocab_size=99, d_model=48, encoder_layers=3, decoder_layers=1, **sizes)
    return _sharp(BartModel(config).get_encoder())


def _speech() -> dict[str, torch.Tensor]:
    mask = (torch.arange(400) < torch.tensor([200, 330, 380])[:, None]).long()
    return {"input_values": torch.randn(3, 400, generator=torch.Generator().manual_seed(2)), "attention_mask": mask}


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


MODELS = {
    "bert": (tiny.bert, tiny.ragged),
    "bert-eager": (lambda: tiny.bert(attn_implementation="eager"), tiny.ragged),
    "distilbert": (_distilbert, tiny.ragged),
    "albert": (_albert, tiny.ragged),
    "bart": (_bart, tiny.ragged),
    "vit": (tiny.vit, _image),
    "wav2vec2": (_wav2vec2, _speech),
    "wav2vec2-pre": (lambda: _wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer"), _speech),
}


LONG = ("albert", "bart", "bert-eager", "wav2vec2-pre")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def _real(model: nn.Module, inputs: dict[str, torch.Tensor], positions: int) -> torch.Tensor | None:
    mask = inputs.get("attention_mask")
    if "input_values" in inputs:
        mask = model._get_feature_vector_attention_mask(positions, mask)
    return mask


def _exact(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The stock model in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return copy.deepcopy(model).double()(**wide).last_hidden_state


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in MODELS])
def test_a_whole_model_is_one_graph_with_the_stock_answers(name: str) -> None:
    _compare(*MODELS[name], backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "wav2vec2"])
def test_inductor(name: str) -> None:
    _compare(*MODELS[name], backend="inductor")


def _compare(build: Callable, make_inputs: Callable, backend: str) -> None:
    stock, inputs = build(), make_inputs()
    expected = _exact(stock, inputs)
    fast = Compiled(to_fast(stock), backend, fullgraph=True)
    for _ in range(2):
        got = fast(**inputs).last_hidden_state
    real = _real(stock, inputs, got.shape[1])
    assert tiny.relative_error(got, expected, real) < 1e-5
    assert len(fast.graphs) == 1
    found = fast.operators()
    if "attention_mask" not in inputs and not found["packed_attention"]:  # transformers 5.17 gives images a mask, too
        assert found["varlen_attention"] == 3 and found["pack"] == found["unpack"] == 0
    else:
        assert found["packed_attention"] == 3
        assert found["padding_geometry"] == found["pack"] == found["unpack"] == 1


MASKS = {
    "one row": lambda: REAL[:, None, None, :],
    "expanded": lambda: REAL[:, None, None, :].expand(5, 1, 12, 12),
    "materialised": lambda: REAL[:, None, None, :].expand(5, 1, 12, 12).clone(),
    "additive": lambda: torch.zeros(5, 1, 1, 12).masked_fill(~REAL[:, None, None, :], torch.finfo(torch.float32).min),
    "nothing masked": lambda: torch.ones(5, 1, 1, 12, dtype=torch.bool),
    "no mask": lambda: None,
    # What the layers cannot know while they are traced: these are not key padding.
    "causal": lambda: torch.ones(12, 12, dtype=torch.bool).tril().expand(5, 1, 12, 12),
    "shared causal": lambda: torch.ones(1, 1, 12, 12, dtype=torch.bool).tril(),
    "bias": lambda: 3 * torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(4)),
    "bias of keys": lambda: 3 * torch.randn(5, 1, 1, 12, generator=torch.Generator().manual_seed(5)),
    # What they can: another bias for each head is left to the original layers.
    "bias of heads": lambda: 3 * torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(6)),
}
PADDED = ("one row", "expanded", "materialised", "additive")


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_that_reaches_an_encoder(name: str) -> None:
    stock = _bert().encoder
    mask = MASKS[name]()
    expected = stock(HIDDEN, mask).last_hidden_state
    fast = Compiled(to_fast(copy.deepcopy(stock)), fullgraph=True)
    got = fast(HIDDEN, mask).last_hidden_state
    assert tiny.relative_error(got, expected, REAL if name in PADDED else None) < 1e-5
    if name in PADDED:
        assert (got[~REAL] == 0).all()
    assert bool(fast.operators()) == (name != "bias of heads")


class _Rows(torch.fx.Interpreter):
    """Runs a graph and records how many tokens reach the projections."""

    seen: ClassVar[set[int]] = set()

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.fastencoder.linear:
            self.seen.add(args[0].shape[0])
        return super().call_function(target, args, kwargs)


def test_padding_is_dropped_inside_the_graph() -> None:
    runs: list[_Rows] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        runs.append(_Rows(graph))
        return runs[-1].run

    fast = torch.compile(to_fast(_bert().encoder), backend=backend, fullgraph=True)
    mask = REAL[:, None, None, :]
    for rows in (mask, mask.flip(0), torch.zeros_like(mask), torch.ones_like(mask)):
        _Rows.seen.clear()
        out = fast(HIDDEN, rows).last_hidden_state
        assert _Rows.seen == {int(rows.sum())}
        assert (out[~rows[:, 0, 0]] == 0).all()
    assert len(runs) == 1


def test_shapes_may_change() -> None:
    stock = _bert()
    fast = Compiled(to_fast(copy.deepcopy(stock)), "aot_eager")
    for batch, seqlen in ((5, 12), (4, 9), (2, 30), (7, 17), (3, 40), (2, 2)):
        ids = torch.randint(5, 99, (batch, seqlen))
        mask = (torch.arange(seqlen) < torch.randint(1, seqlen + 1, (batch, 1))).long()
        expected = stock(input_ids=ids, attention_mask=mask).last_hidden_state
        got = fast(input_ids=ids, attention_mask=mask).last_hidden_state
        assert tiny.relative_error(got, expected, mask) < 1e-5
    assert len(fast.graphs) <= 2  # the first shapes, and any others
    assert not counters["graph_break"]


def _replace_linear(model: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    linear = model.encoder.layer[1].intermediate.dense
    other = Doubled(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    model.encoder.layer[1].intermediate.dense = other.eval()


def _add_module(model: nn.Module) -> None:
    model.encoder.layer[1].output.extra = nn.Linear(48, 48)


def _wrap_linear(model: nn.Module) -> None:
    model.encoder.layer[1].output.dense = nn.Sequential(model.encoder.layer[1].output.dense, nn.Tanh())


def _patch_forward(model: nn.Module) -> None:
    part = model.encoder.layer[1].attention.output
    original = part.forward
    part.forward = lambda hidden, residual: 2 * original(hidden, residual)


def _change_eps(model: nn.Module) -> None:
    model.encoder.layer[1].output.LayerNorm.eps = 0.7


def _change_scaling(model: nn.Module) -> None:
    model.encoder.layer[1].attention.self.scaling = 0.9


def _load_weights(model: nn.Module) -> None:
    model.load_state_dict(_bert(seed=7).state_dict())


def _write_weights(model: nn.Module) -> None:
    model.encoder.layer[1].output.dense.weight.data.mul_(1.5)


def _new_linear(model: nn.Module) -> None:
    torch.manual_seed(0)
    model.encoder.layer[1].output.dense = nn.Linear(80, 48)


CHANGES = {  # change -> how many of the two layers stay fast
    _replace_linear: 1,
    _wrap_linear: 1,
    _add_module: 1,
    _patch_forward: 1,
    _change_eps: 2,
    _change_scaling: 2,
    _load_weights: 2,
    _write_weights: 2,
    _new_linear: 2,
}


@pytest.mark.parametrize(
    "change",
    [
        slow(change) if change in (_wrap_linear, _add_module, _change_eps, _write_weights, _new_linear) else change
        for change in CHANGES
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_after_compilation_is_seen(change: Callable) -> None:
    stock, inputs = _bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock))
    fast = Compiled(model)
    before = fast(**inputs).last_hidden_state
    change(stock)
    change(model)
    seen = len(fast.graphs)
    expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-5
    if change is not _add_module:
        assert tiny.relative_error(before, expected, inputs["attention_mask"]) > 1e-3
    assert fast.operators(seen if len(fast.graphs) > seen else 0)["packed_attention"] == CHANGES[change]


def test_another_attention_function_is_seen() -> None:
    def doubled(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return 2 * sdpa_attention_forward(module, query, *args, **kwargs)[0], None

    ALL_ATTENTION_FUNCTIONS.register("doubled", doubled)
    stock, mask = _bert(), REAL[:, None, None, :]
    model = to_fast(copy.deepcopy(stock))
    fast = Compiled(model.encoder, fullgraph=True)
    fast(HIDDEN, mask)
    for one in (stock, model):
        one.config._attn_implementation = "doubled"
    expected, got = stock.encoder(HIDDEN, mask).last_hidden_state, fast(HIDDEN, mask).last_hidden_state
    assert tiny.relative_error(got, expected, REAL) < 1e-5
    assert len(fast.graphs) == 2 and not fast.operators(1)


def test_hooks_are_guarded_where_torch_guards_hooks() -> None:
    stock, inputs = _bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        fast = Compiled(model)
        fast(**inputs)
        for one in (stock, model):
            one.encoder.layer[1].intermediate.dense.register_forward_hook(lambda _, __, out: out * 0.5)
            one.encoder.layer[0].register_forward_hook(lambda _, __, out: out * 0.5)
        expected, got = stock(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-5
    assert fast.operators(1)["packed_attention"] == 1


def test_training_mode_and_gradients_run_the_original() -> None:
    stock, inputs = _bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), tiny.ragged()
    model = to_fast(copy.deepcopy(stock))
    fast = Compiled(model, "aot_eager")
    fast(**inputs)
    model.encoder.layer[1].output.dropout.train()
    fast(**inputs)
    assert fast.operators(1)["packed_attention"] == 1
    model.eval()
    with torch.enable_grad():
        for one in (stock, fast):
            one(**inputs).last_hidden_state[REAL].square().sum().backward()
    assert not fast.operators(2)
    for one, other in zip(stock.encoder.parameters(), model.encoder.parameters(), strict=True):
        assert tiny.relative_error(one.grad, other.grad) < 1e-5


def test_autocast_runs_the_original() -> None:
    fast, inputs = Compiled(to_fast(_bert())), tiny.ragged()
    with torch.autocast("cpu", torch.bfloat16):
        fast(**inputs)
    assert fast.graphs and not fast.operators()


@pytest.mark.parametrize(
    ("what", "compile_all"),
    [("hidden_states", True), ("hidden_states", False), slow("attentions", True), slow("attentions", False)],
)
def test_recorded_outputs(what: str, compile_all: bool) -> None:
    """transformers records through hooks, which it adds when something is recorded for the first time."""
    stock, inputs = _bert(attn_implementation="eager"), {**tiny.ragged(), f"output_{what}": True}
    expected = stock(**inputs)[what]
    model = to_fast(copy.deepcopy(stock))
    if compile_all:
        got = Compiled(model)(**inputs)[what]
    else:
        model(**inputs)
        model.encoder.compile(backend="eager")
        got = model(**inputs)[what]
    real = REAL if what == "hidden_states" else None
    assert len(expected) == len(got)
    assert all(tiny.relative_error(one, other, real) < 1e-5 for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("place", ["a layer", slow("inside a layer"), slow("the encoder")])
def test_graph_breaks_of_others(place: str) -> None:
    """Where a graph ends inside the stack, the next one goes on with the tokens as they are."""
    stock, inputs = _bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock))
    where = {"a layer": "encoder.layer.1", "inside a layer": "encoder.layer.1.output.dense", "the encoder": "encoder"}
    model.get_submodule(where[place]).register_forward_hook(lambda *_: torch._dynamo.graph_break())
    fast = Compiled(model)
    expected = stock(**inputs).last_hidden_state
    for _ in range(2):
        assert tiny.relative_error(fast(**inputs).last_hidden_state, expected, REAL) < 1e-5
    assert counters["graph_break"]


@pytest.mark.parametrize("chosen", [(1,), slow((0, 1))], ids=["one", "all"])
def test_layers_compiled_one_by_one(chosen: tuple[int, ...]) -> None:
    stock, inputs = _bert(), tiny.ragged()
    model = to_fast(copy.deepcopy(stock))
    for index in chosen:
        model.encoder.layer[index].compile(backend="eager")
    expected = stock(**inputs).last_hidden_state
    for _ in range(2):
        assert tiny.relative_error(model(**inputs).last_hidden_state, expected, REAL) < 1e-5


def test_threads_share_a_graph() -> None:
    stock, inputs = _bert(), tiny.ragged()
    expected = stock(**inputs).last_hidden_state
    fast = Compiled(to_fast(stock))
    errors: list[float] = []

    def run() -> None:
        with torch.no_grad():
            errors.append(tiny.relative_error(fast(**inputs).last_hidden_state, expected, REAL))

    for _ in range(3):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(errors) == 3 and max(errors) < 1e-5
    assert len(fast.graphs) == 1


@pytest.mark.slow
def test_code_that_reads_padding_keeps_the_original() -> None:
    stock, inputs = _wav2vec2(add_adapter=True), _speech()
    expected = stock(**inputs).last_hidden_state
    fast = Compiled(to_fast(stock))
    assert tiny.relative_error(fast(**inputs).last_hidden_state, expected) < 1e-5
    assert not fast.operators()


@pytest.mark.parametrize(("whole", "strict"), [(True, False), (False, True), slow(True, True), slow(False, False)])
def test_export(whole: bool, strict: bool) -> None:
    stock, inputs = _bert(), tiny.ragged()
    fast = to_fast(copy.deepcopy(stock))

    def arguments(mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if whole:
            return {"input_ids": inputs["input_ids"], "attention_mask": mask.long()}
        return {"hidden_states": HIDDEN, "attention_mask": mask[:, None, None, :]}

    program = torch.export.export(fast if whole else fast.encoder, (), arguments(REAL), strict=strict)
    found = operators([program.graph_module])
    assert found["packed_attention"] == 2 and found["padding_geometry"] == found["pack"] == found["unpack"] == 1
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    for mask in (REAL, REAL.flip(0, 1), torch.ones_like(REAL)):
        expected = (stock if whole else stock.encoder)(**arguments(mask)).last_hidden_state
        for run in (program.module(), loaded):
            assert tiny.relative_error(run(**arguments(mask)).last_hidden_state, expected, mask) < 1e-5


def test_jit_trace_runs_the_original() -> None:
    stock = _bert(return_dict=False).encoder
    fast = to_fast(copy.deepcopy(stock))
    layer = torch.jit.trace(fast.layer[0], (HIDDEN, REAL[:, None, None, :]))
    assert torch.equal(layer(HIDDEN, REAL[:, None, None, :]), stock.layer[0](HIDDEN, REAL[:, None, None, :]))
