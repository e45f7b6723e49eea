"""The attention-only level: models whose layers are not known, over their real tokens."""

from __future__ import annotations

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import fastencoder
from fastencoder.attention_level import NAME, VarlenAttention, interface, padding, varlen_class, window
from fastencoder.attention_level.interface import attend, call_site, padding_mask
from fastencoder.packing import PackedBatch
from fastencoder.registry import qualified_name

from .attention_cases import CASES, SIZE, AttentionCase
from .conformance import batches, measure

BAR = 1e-5
PATTERNS = (batches.RIGHT, batches.LEFT, batches.HOLES, batches.EMPTY, batches.SINGLE, batches.FULL)
AT_END = (batches.RIGHT, batches.EMPTY, batches.SINGLE, batches.FULL)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def varlen(model: Any) -> list[VarlenAttention]:
    return [module for module in model.modules() if isinstance(module, VarlenAttention)]


def case_of(package: str) -> AttentionCase:
    return next(case for case in CASES if case.package == package)


def first_attention(model: Any) -> torch.nn.Module:
    return next(module for module in model.modules() if call_site(type(module)) is not None)


def error_of(case: AttentionCase, model: Any, other: Any, mask: torch.Tensor) -> float:
    """Relative, over real tokens."""
    batch, real = case.batch(model, mask), case.real(model, mask)
    return measure.error(case.run(model, batch)[case.output][real], case.run(other, batch)[case.output][real])


def counts(model: Any) -> tuple[int, int]:
    states = [module._fastencoder_attention for module in varlen(model)]
    return sum(state.fast_calls for state in states), sum(state.delegated_calls for state in states)


def reasons(model: Any) -> set[str | None]:
    return {module._fastencoder_attention.last_reason for module in varlen(model)}


@every_case
def test_real_tokens_of_every_kind_of_batch(case: AttentionCase) -> None:
    stock = case.build()
    exact, fast = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    fastencoder.to_fast(fast)
    assert len(varlen(fast)) == case.modules
    for pattern in AT_END if case.at_end_only else PATTERNS:
        mask = batches.mask(pattern, case.mask_size)
        batch, real = case.batch(stock, mask), case.real(stock, mask)
        before = counts(fast)
        ours = case.run(fast, batch)[case.output]
        theirs = case.run(exact, batch)[case.output]
        error = measure.error(ours[real], theirs[real])
        assert error <= BAR, f"{pattern}: relative error {error:.2e}"
        ran = counts(fast)[0] - before[0], counts(fast)[1] - before[1]
        runs = case.padding == "runs" or case.padding == "at end" and pattern in AT_END
        assert ran == ((case.modules, 0) if runs else (0, case.modules)), f"{pattern}: {ran}; {reasons(fast)}"
        assert torch.isfinite(ours).all()


def test_enough_of_these_models_are_not_known_as_a_whole() -> None:
    built = 0
    for case in CASES:
        with contextlib.suppress(pytest.skip.Exception):
            case.build()
            built += 1
    assert built >= 8


@every_case
def test_without_padding_on_a_cpu_nothing_changes(case: AttentionCase) -> None:
    stock = case.build()
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    batch = case.batch(stock, batches.mask(batches.ONES, case.mask_size))
    assert torch.equal(case.run(fast, batch)[case.output], case.run(stock, batch)[case.output])
    assert counts(fast)[0] == 0


@every_case
def test_real_tokens_do_not_depend_on_what_is_at_padding(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.padding == "stays":
        pytest.skip("padding stays in its attention")
    model = fastencoder.to_fast(case.build())
    mask = batches.mask(batches.RIGHT, case.mask_size)
    batch, real = case.batch(model, mask), case.real(model, mask)
    zeros = case.run(model, batch)[case.output]
    put_noise_at_padding(monkeypatch)
    noise = case.run(model, batch)[case.output]
    assert not torch.allclose(noise[~real], zeros[~real])
    assert measure.error(noise[real], zeros[real]) <= BAR


def put_noise_at_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    to_padded = PackedBatch.to_padded

    def noisy(self: PackedBatch, values: torch.Tensor) -> torch.Tensor:
        padded = to_padded(self, values)
        if self.indices is not None:
            padding = torch.ones(self.batch * self.seqlen, dtype=torch.bool)
            padding[self.indices.long()] = False
            padded.flatten(0, 1)[padding] = 5 * torch.randn_like(padded.flatten(0, 1)[padding])
        return padded

    monkeypatch.setattr(PackedBatch, "to_padded", noisy)


def test_that_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolutions of this one do read padding, and it is not listed."""
    case = case_of("wav2vec2_conformer")
    model = case.build()
    listed = {*padding.KEEPS_PADDING_APART, qualified_name(type(model.encoder.layers[0]))}
    monkeypatch.setattr(padding, "KEEPS_PADDING_APART", listed)
    exact = copy.deepcopy(model).double()
    fastencoder.to_fast(model)
    mask = batches.mask(batches.RIGHT, case.mask_size)
    batch, real = case.batch(model, mask), case.real(model, mask)
    assert measure.error(case.run(model, batch)[case.output][real], case.run(exact, batch)[case.output][real]) > 10 * BAR
    assert counts(model)[0] == case.modules


@every_case
def test_a_lost_mask_would_show(case: AttentionCase) -> None:
    """The models are sharp enough: attention to padding changes every real token's output."""
    model = case.build()
    mask = batches.mask(batches.RIGHT, case.mask_size)
    batch, real = case.batch(model, mask), case.real(model, mask)
    name = next(key for key in batch if key.endswith("mask"))
    everything = {**batch, name: torch.ones_like(batch[name])}
    assert measure.error(case.run(model, everything)[case.output][real], case.run(model, batch)[case.output][real]) > 0.01


# ---- where the attention function is named


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("package", ["mobilebert", "xmod", "dia"])
def test_the_name_never_loses_a_padding_mask(package: str, converted: bool) -> None:
    """transformers drops the mask of a name that it knows no mask function for."""
    case = case_of(package)
    model = case.build()
    exact = copy.deepcopy(model).double()
    varlen_class(type(first_attention(model)))  # makes the name known
    if converted:
        fastencoder.to_fast(model)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = NAME
    for pattern in PATTERNS:
        mask = batches.mask(pattern)
        assert error_of(case, model, exact, mask) <= BAR, pattern
    assert counts(model) == ((case.modules * len(PATTERNS), 0) if converted else (0, 0))


def test_the_mask_function_answers_with_a_view_or_like_sdpa() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    mask = batches.mask(batches.RIGHT).bool()
    sizes = dict(batch_size=len(mask), q_length=SIZE, kv_length=SIZE, attention_mask=mask)
    for function in (masking.bidirectional_mask_function, masking.causal_mask_function):
        for skip in (False, True):
            more = dict(mask_function=function, allow_is_causal_skip=skip, allow_is_bidirectional_skip=skip)
            assert torch.equal(padding_mask(**sizes, **more), masking.sdpa_mask(**sizes, **more))
    view = padding_mask(**sizes, mask_function=masking.bidirectional_mask_function)
    assert view.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
    assert padding_mask(len(mask), SIZE, SIZE, mask_function=masking.causal_mask_function) is None


def test_a_choice_of_the_user_is_left_as_it_is() -> None:
    case = case_of("mobilebert")
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    mask = batches.mask(batches.LEFT)
    for name in ("eager", "sdpa"):
        stock.set_attn_implementation(name)
        model.set_attn_implementation(name)
        before = counts(model)
        assert error_of(case, model, stock, mask) <= BAR
        assert counts(model)[0] == before[0] + case.modules
        assert model.config._attn_implementation == name
    model.set_attn_implementation("eager")
    fastencoder.reverse(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("package", ["mobilebert", "xmod", "wav2vec2_bert", "seamless_m4t"])
def test_attentions_are_those_of_the_original(package: str) -> None:
    case = case_of(package)
    stock = case.build()
    stock.set_attn_implementation("eager")
    for module in stock.modules():  # not in every release
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "eager"
    model = fastencoder.to_fast(copy.deepcopy(stock))
    mask = batches.mask(batches.RIGHT)
    batch = case.batch(model, mask)
    ours = case.run(model, batch, output_attentions=True)
    theirs = case.run(stock, batch, output_attentions=True)
    assert len(ours["attentions"]) == len(theirs["attentions"]) == case.modules
    assert all(torch.equal(a, b) for a, b in zip(ours["attentions"], theirs["attentions"], strict=True))
    assert torch.equal(ours[case.output], theirs[case.output])
    plain = case.run(model, batch)
    assert measure.error(plain[case.output][mask.bool()], theirs[case.output][mask.bool()]) <= BAR
    assert counts(model) == (case.modules, case.modules)


@every_case
def test_hidden_states(case: AttentionCase) -> None:
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    mask = batches.mask(batches.RIGHT, case.mask_size)
    batch, real = case.batch(stock, mask), case.real(stock, mask)
    ours = case.run(model, batch, output_hidden_states=True)["hidden_states"]
    theirs = case.run(stock, batch, output_hidden_states=True)["hidden_states"]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert measure.error(measure.pick(a, real), measure.pick(b, real)) <= BAR


# ---- when calls are passed on


def test_what_is_passed_on() -> None:
    case = case_of("mobilebert")
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    mask = batches.mask(batches.RIGHT)
    batch = case.batch(model, mask)

    def passed_on(reason: str, **more: Any) -> None:
        before = counts(model)
        ours, theirs = model(**{**batch, **more}), stock(**{**batch, **more})
        assert torch.equal(ours[case.output], theirs[case.output])
        assert counts(model) == (before[0], before[1] + case.modules)
        assert any(reason in str(said) for said in reasons(model)), reasons(model)

    passed_on("a gradient may be needed")
    with torch.no_grad():
        square = (torch.arange(SIZE)[:, None] >= torch.arange(SIZE)).expand(len(mask), 1, SIZE, SIZE)
        passed_on("differs between queries", attention_mask=square)
        with torch.autocast("cpu", torch.bfloat16):
            passed_on("autocast")
        for net in (stock, model):
            net.config._attn_implementation_internal = "flex_attention"
        assert model.encoder.layer[0].attention.self.config is model.config
        for net in (stock, model):
            net.config._attn_implementation_internal = "sdpa"
        model.train()
        before = counts(model)
        model(**batch)
        assert counts(model) == (before[0], before[1] + case.modules)


def test_cross_attention_of_equal_length_is_not_taken_for_self_attention() -> None:
    """The keys are as many as the queries, and the mask is the keys'."""
    case = case_of("blip_2")
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    crossing = [name for name, module in model.named_modules() if isinstance(module, VarlenAttention) and "cross" in name]
    assert not crossing
    mask, other = batches.mask(batches.RIGHT), batches.mask(batches.LEFT)
    batch = {**case.batch(model, mask), "encoder_attention_mask": other}
    ours, theirs = case.run(model, batch)[case.output], case.run(copy.deepcopy(stock).double(), batch)[case.output]
    assert measure.error(ours[mask.bool()], theirs[mask.bool()]) <= BAR
    attention = model.encoder.layer[0].attention.attention
    hidden = torch.randn(len(mask), SIZE, 48)
    keys = torch.zeros(len(mask), 1, 1, SIZE).masked_fill(other[:, None, None] == 0, torch.finfo(torch.float32).min)
    given = dict(encoder_hidden_states=torch.randn(len(mask), SIZE, 48), encoder_attention_mask=keys)
    with torch.no_grad():
        expected = stock.encoder.layer[0].attention.attention(hidden, **given)[0]
        assert torch.equal(attention(hidden, **given)[0], expected)


def test_packed_input_is_attended_within_its_sequences() -> None:
    model = fastencoder.to_fast(case_of("mobilebert").build())
    attention = model.encoder.layer[0].attention.self
    mask = batches.mask(batches.RIGHT).bool()
    hidden = torch.randn(*mask.shape, 48)
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    with torch.no_grad():
        padded = attention(hidden, hidden, hidden, mask[:, None, None])[0]
        tokens = hidden[mask][None]
        packed = attention(tokens, tokens, tokens, cu_seq_lens_q=offsets, max_length_q=SIZE)[0]
    assert torch.allclose(packed[0], padded[mask], atol=1e-6)
    assert attention._fastencoder_attention.fast_calls == 2


# ---- as on a GPU


@pytest.mark.parametrize("package", ["mobilebert", "wav2vec2_bert", "parakeet", "seamless_m4t"])
def test_full_batches_run_varlen_on_a_gpu(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "on_gpu", lambda device: True)
    case = case_of(package)
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    batch = case.batch(model, batches.mask(batches.ONES, case.mask_size))
    error = measure.error(case.run(model, batch)[case.output], case.run(stock.double(), batch)[case.output])
    assert error <= BAR
    assert counts(model) == ((0, case.modules) if package == "parakeet" else (case.modules, 0)), reasons(model)


def test_weights_are_only_left_out_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa never answers with weights; eager always does, and only layers that were read are known not to use them."""
    monkeypatch.setattr(interface, "on_gpu", lambda device: True)
    for package, runs in (("mobilebert", True), ("wav2vec2_conformer", False)):
        case = case_of(package)
        model = case.build()
        model.config._attn_implementation_internal = "eager"
        fastencoder.to_fast(model)
        case.run(model, case.batch(model, batches.mask(batches.ONES, case.mask_size)))
        assert counts(model) == ((case.modules, 0) if runs else (0, case.modules)), reasons(model)


@pytest.mark.parametrize(("name", "heads"), [("sdpa", 4), ("eager", 4), ("sdpa", 2)])
@pytest.mark.parametrize("causal", [None, False, True])
def test_the_function_itself(name: str, heads: int, causal: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of mask and causality, against the function of the same name; grouped keys, too."""
    from transformers.models.dia import modeling_dia

    monkeypatch.setattr(interface, "on_gpu", lambda device: True)
    module = torch.nn.Module.__new__(modeling_dia.DiaSelfAttention)
    torch.nn.Module.__init__(module)
    module.config = type("Config", (), {"_attn_implementation": name})()
    module.num_key_value_groups = 4 // heads
    module.is_causal = True
    module.training = False
    site = call_site(modeling_dia.DiaSelfAttention)
    assert site is not None
    query, key, value = (torch.randn(2, count, 7, 16) for count in (4, heads, heads))
    given = {} if causal is None else {"is_causal": causal}
    with torch.no_grad():
        ours, weights = attend(module, query, key, value, None, scaling=0.3, dropout=0.0, sliding_window=3, **given)
        theirs, _ = site.function(name)(module, query, key, value, None, scaling=0.3, dropout=0.0, sliding_window=3, **given)
    assert weights is None
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


# ---- the window


def test_a_mask_is_read_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    geometry = PackedBatch.geometry
    monkeypatch.setattr(window.PackedBatch, "geometry", lambda *args: (read.append(1), geometry(*args))[1])
    for package in ("mobilebert", "seamless_m4t", "fun_asr_nano"):
        case = case_of(package)
        model = fastencoder.to_fast(case.build())
        for _ in range(2):
            read.clear()
            case.run(model, case.batch(model, batches.mask(batches.RIGHT)))
            assert len(read) == 1


def test_a_mask_that_was_written_to_is_read_again() -> None:
    """Also in inference mode, where tensors do not count what is written to them, and after a forward that failed."""
    case = case_of("mobilebert")
    stock = case.build()
    model = fastencoder.to_fast(copy.deepcopy(stock))
    with torch.inference_mode():
        ids = torch.randint(5, 50, (4, SIZE))
        mask = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.bool)
        for pattern in (batches.RIGHT, batches.LEFT, batches.HOLES):
            real = batches.mask(pattern).bool()
            mask.copy_(real[:, None, None])
            with pytest.raises(RuntimeError, match="stop"):
                handle = model.encoder.layer[1].register_forward_pre_hook(_stop)
                model(ids, attention_mask=mask)
            handle.remove()
            ours, theirs = model(ids, attention_mask=mask)[0], stock(ids, attention_mask=mask)[0]
            assert measure.error(ours[real], theirs[real]) <= BAR, pattern
    assert not window._local.windows


def _stop(*_: Any) -> None:
    raise RuntimeError("stop")


def test_threads_do_not_share_a_window() -> None:
    case = case_of("dia")
    model = fastencoder.to_fast(case.build())
    patterns = [batches.RIGHT, batches.LEFT, batches.HOLES, batches.FULL] * 4
    work = [case.batch(model, batches.mask(pattern), seed) for seed, pattern in enumerate(patterns)]
    alone = [case.run(model, batch)[case.output] for batch in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: _plain_run(model, batch)[case.output], work))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def _plain_run(model: Any, batch: dict[str, Any]) -> Any:
    with torch.inference_mode():  # catch_warnings is not for threads
        return model(**batch)
