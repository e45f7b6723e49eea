"""Every condition that refuses a layer, with a reason that says what and why."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import Dinov2Config, Dinov2Model, Wav2Vec2Config, Wav2Vec2Model
from transformers.models.bert import modeling_bert

from fastencoder import NotEligibleError, explain, is_fast, reverse, to_fast

from . import tiny


class OtherAttention(nn.Module):
    """Somebody's own attention in the place of BertSelfAttention."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = original.query, original.key, original.value
        self.num_attention_heads = original.num_attention_heads

    def forward(self, hidden_states, *_, **__):
        return self.value(hidden_states), None


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _set(path: str, make):
    def change(layer: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        module = layer.get_submodule(owner)
        setattr(module, name, make(getattr(module, name)))

    return change


class MixesTokens(nn.Module):
    """An adapter that looks at the neighbours of a token, as a convolution does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x + x.roll(1, dims=1))


class Wrapped(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.delta(x)


CHANGES = {
    "linear that mixes tokens": (
        _set("attention.self.query", lambda m: MixesTokens(m)),
        "attention.self.query is a .*MixesTokens, which does not treat each token by itself",
    ),
    "other norm": (
        _set("output.LayerNorm", lambda m: nn.GroupNorm(4, 48)),
        "output.LayerNorm is a .*GroupNorm, which is neither LayerNorm nor RMSNorm",
    ),
    "norm without weight": (
        _set("output.LayerNorm", lambda m: nn.LayerNorm(48, elementwise_affine=False)),
        "output.LayerNorm has no weight",
    ),
    "other attention": (_set("attention.self", OtherAttention), "attention.self is a .*OtherAttention, not the part"),
    "unknown activation": (
        _set("intermediate.intermediate_act_fn", lambda m: nn.Softmax(-1)),
        "activation intermediate.intermediate_act_fn is torch.nn.*Softmax",
    ),
    "activation function of somebody": (
        lambda layer: (
            layer.intermediate._modules.pop("intermediate_act_fn"),
            object.__setattr__(layer.intermediate, "intermediate_act_fn", lambda x: x),
        ),
        "not a known element-wise activation",
    ),
    "added adapter": (
        lambda layer: layer.output.add_module("adapter", nn.Linear(48, 48)),
        "output.adapter.weight is not part",
    ),
    "added parameter": (
        lambda layer: layer.register_parameter("gate", nn.Parameter(torch.zeros(1))),
        "gate is not part of this family",
    ),
    "added buffer": (lambda layer: layer.register_buffer("table", torch.zeros(3)), "table is not part of this family"),
    "inner forward hook": (
        lambda layer: layer.intermediate.register_forward_hook(lambda *_: None),
        "intermediate has forward hooks",
    ),
    "inner forward pre-hook": (
        lambda layer: layer.output.dense.register_forward_pre_hook(lambda *_: None),
        "output.dense has forward hooks",
    ),
    "patched forward": (
        lambda layer: setattr(layer, "forward", partial(type(layer).forward, layer)),
        "somebody has replaced the forward of the layer itself",
    ),
    "patched inner forward": (
        lambda layer: setattr(layer.output, "forward", partial(type(layer.output).forward, layer.output)),
        "somebody has replaced the forward of output",
    ),
    "mixed dtypes": (
        lambda layer: layer.output.dense.to(torch.bfloat16),
        "mixed dtypes: torch.bfloat16, torch.float32",
    ),
    "meta weights": (lambda layer: layer.output.dense.to("meta"), "several devices: cpu, meta"),
    "missing part": (lambda layer: delattr(layer.output, "LayerNorm"), "no output.LayerNorm"),
    "unequal widths": (
        _set("attention.self.value", lambda m: nn.Linear(48, 32)),
        "unequal widths",
    ),
    "heads that do not divide": (
        lambda layer: setattr(layer.attention.self, "num_attention_heads", 5),
        "5 heads do not divide",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_refused_with_the_reason(change: str) -> None:
    alter, reason = CHANGES[change]
    model = tiny.bert()
    alter(model.encoder.layer[1])
    classes = [type(module) for module in model.modules()]
    with pytest.raises(NotEligibleError, match=reason) as caught:
        to_fast(model)
    assert "encoder.layer.1" in str(caught.value)
    assert [row.status for row in explain(model)] == ["eligible", "refused", "eligible"]
    assert [type(module) for module in model.modules()] == classes


def _run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).last_hidden_state


# Parts that are not plain, and stay what they are inside the fast layer.
OPAQUE = {
    "wrapped linear": _set("attention.self.query", Wrapped),
    "subclassed linear": _set("output.dense", lambda m: OtherLinear(80, 48)),
    "parametrised linear": lambda layer: parametrizations.weight_norm(layer.intermediate.dense),
    "all three wrapped": lambda layer: [_set(f"attention.self.{n}", Wrapped)(layer) for n in ("query", "key", "value")],
    "root mean square norm": _set("output.LayerNorm", lambda m: nn.RMSNorm(48)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", OPAQUE)
def test_an_opaque_part_is_called_as_it_is(change: str, when: str) -> None:
    stock = tiny.bert()
    fast = copy.deepcopy(stock)
    inputs = tiny.ragged()
    if when == "after":
        to_fast(fast)
        _run(fast, inputs)
    for model in (stock, fast):
        torch.manual_seed(0)
        OPAQUE[change](model.encoder.layer[1])
        model.eval()
    if when == "before":
        to_fast(fast)
    before = tiny.calls(fast)
    error = tiny.relative_error(_run(fast, inputs), _run(stock, inputs), inputs["attention_mask"])
    assert error < 1e-5
    assert tiny.calls(fast)[0] > before[0]
    assert tiny.calls(fast)[1] == 0, tiny.reasons(fast)
    reverse(fast)
    assert torch.equal(_run(fast, inputs), _run(stock, inputs))


# Changes that leave a converted layer's own forward, and so its answers, as they were; one that the layer's class shadows; and
# one that reads hidden states at padding, which the layers before it leave empty.
WITHOUT_EFFECT = ("linear that mixes tokens", "added parameter", "added buffer", "heads that do not divide", "patched forward")


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in WITHOUT_EFFECT])
def test_the_same_change_after_the_conversion_runs_the_original(change: str) -> None:
    """Never wrong: a layer that stops being eligible hands its calls to its own, changed, forward."""
    alter, _ = CHANGES[change]
    stock = tiny.bert()
    fast = to_fast(copy.deepcopy(stock))
    inputs = tiny.ragged()
    with torch.inference_mode():
        fast(**inputs)
    results = []
    for model in (stock, fast):
        torch.manual_seed(0)
        alter(model.encoder.layer[1])
        try:
            with torch.inference_mode():
                results.append(model(**inputs).last_hidden_state)
        except Exception as error:
            results.append(error)
    expected, got = results
    if isinstance(expected, Exception):  # the change broke the stock model: the fast one breaks in the same way
        assert type(got) is type(expected)
    else:
        assert tiny.relative_error(got, expected, inputs["attention_mask"]) < 1e-5
        assert tiny.calls(fast)[1] == 1, tiny.reasons(fast)


def test_a_class_whose_code_was_replaced(monkeypatch) -> None:
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(modeling_bert.BertSelfAttention, "forward", forward)
    with pytest.raises(NotEligibleError, match=r"BertSelfAttention\.forward \(in attention\.self\) has been replaced"):
        to_fast(tiny.bert())


def test_a_layer_class_whose_forward_was_replaced(monkeypatch) -> None:
    monkeypatch.setattr(modeling_bert.BertLayer, "forward", lambda self, x, *_, **__: x)
    with pytest.raises(NotEligibleError, match=r"BertLayer\.forward has been replaced"):
        to_fast(tiny.bert())


def test_a_subclass_of_a_known_layer_is_left_alone() -> None:
    class MyBertLayer(modeling_bert.BertLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return 2 * super().forward(hidden_states, *args, **kwargs)

    model = tiny.bert()
    for layer in model.encoder.layer:
        layer.__class__ = MyBertLayer
    with pytest.raises(NotEligibleError, match="a subclass of BertLayer"):
        to_fast(model)
    assert {row.status for row in explain(model)} == {"left alone"}


def test_a_layer_of_a_known_name_from_another_module_is_not_mistaken() -> None:
    """Remote code often keeps the names of the model it started from."""

    class BertLayer(nn.Module):
        def __init__(self, original: nn.Module) -> None:
            super().__init__()
            self.attention, self.intermediate, self.output = original.attention, original.intermediate, original.output

        def forward(self, hidden_states, *_, **__):
            return hidden_states

    model = tiny.bert()
    model.encoder.layer = nn.ModuleList(BertLayer(layer) for layer in model.encoder.layer)
    with pytest.raises(NotEligibleError, match="this layer class is not registered"):
        to_fast(model)


def test_variants_inside_a_known_class() -> None:
    swiglu = Dinov2Model(Dinov2Config(use_swiglu_ffn=True, image_size=28, patch_size=14, mlp_ratio=2, **tiny.SIZES))
    assert is_fast(to_fast(swiglu))
    sizes = dict(
        conv_dim=(16,), conv_kernel=(4,), conv_stride=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    adapters = Wav2Vec2Config(vocab_size=9, do_stable_layer_norm=True, adapter_attn_dim=8, **sizes, **tiny.SIZES)
    with pytest.raises(NotEligibleError, match="adapter_layer"):
        to_fast(Wav2Vec2Model(adapters))


def test_an_attention_function_of_somebody_is_not_bypassed() -> None:
    """Registered before the conversion: refused. Chosen after it: the original layers call it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def halved(*args, **kwargs):
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output / 2, weights

    AttentionInterface.register("halved", halved)
    AttentionMaskInterface.register("halved", sdpa_mask)
    inputs = tiny.ragged()
    stock, other = tiny.bert(), tiny.bert(attn_implementation="halved")
    fast = to_fast(tiny.bert())
    with torch.inference_mode():
        expected = other(**inputs).last_hidden_state
        assert tiny.relative_error(stock(**inputs).last_hidden_state, expected) > 0.01
        fast(**inputs)
        fast.set_attn_implementation("halved")
        assert tiny.relative_error(fast(**inputs).last_hidden_state, expected) < 1e-5
        fast.set_attn_implementation("sdpa")
        fast(**inputs)
    assert tiny.calls(fast) == (6, 3)
    with pytest.raises(NotEligibleError, match="attention implementation 'halved' is not transformers' own"):
        to_fast(other)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_is_an_opaque_part(when: str) -> None:
    """Wrapped before or after the conversion, switched off and on, merged: the answers of the stock model, and fast."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=False)
    inputs = tiny.ragged()
    models = [tiny.bert(), tiny.bert()]
    if when == "after":
        to_fast(models[1])
        _run(models[1], inputs)
    adapted = []
    for model in models:
        torch.manual_seed(1)
        adapted.append(peft.get_peft_model(model, config).eval())
    if when == "before":
        to_fast(adapted[1])

    def error() -> float:
        stock, fast = (_run(model, inputs) for model in adapted)
        return tiny.relative_error(fast, stock, inputs["attention_mask"])

    plain = _run(tiny.bert(), inputs)
    assert tiny.relative_error(_run(adapted[1], inputs), plain, inputs["attention_mask"]) > 0.01
    assert error() < 1e-5
    with adapted[0].disable_adapter(), adapted[1].disable_adapter():
        assert error() < 1e-5
        assert tiny.relative_error(_run(adapted[1], inputs), plain, inputs["attention_mask"]) < 1e-5
    assert error() < 1e-5
    adapted = [model.merge_and_unload() for model in adapted]
    assert error() < 1e-5
    assert tiny.calls(adapted[1])[1] == 0, tiny.reasons(adapted[1])


def test_explain_touches_nothing_and_knows_memory() -> None:
    model = tiny.bert()
    classes = [type(module) for module in model.modules()]
    report = explain(model)
    assert [type(module) for module in model.modules()] == classes
    assert len(report) == 3 and report.eligible
    linear = sum(p.nbytes for n, p in model.encoder.named_parameters() if p.dim() == 2)
    assert report.extra_bytes == linear
    assert "3 eligible" in report.summary() and "BertLayer" in str(report)
    assert max(map(len, str(report).splitlines())) <= 100
    assert report.to_dict()["layers"][0]["status"] == "eligible"
    to_fast(model)
    assert [row.status for row in explain(model)] == ["fast"] * 3
    assert explain(model).extra_bytes == linear


def test_a_model_on_the_meta_device_can_be_explained_not_converted() -> None:
    with torch.device("meta"):
        model = modeling_bert.BertModel(tiny.bert().config)
    assert explain(model).eligible
    with pytest.raises(NotEligibleError, match="meta device"):
        to_fast(model)
