"""What vision blocks are given beside hidden states: tables of angles, cumulative lengths, and masks of blocks."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fastencoder
from fastencoder.layers.attention.blocks import block_lengths
from fastencoder.packing import NotAPaddingMask

from . import batches, measure
from .case import Case
from .cases import BY_ID
from .cases_vision import CASES, ROTATING
from .fast import calls, models_of, reasons, stock_of

TABLES = ("position_embeddings", "freqs_ci")
QWEN = "qwen2_5_vl.Qwen2_5_VLVisionBlock"
PIXTRAL = "pixtral.PixtralAttentionLayer"
_ROTATED = [case for case in CASES if fastencoder.registry.by_class(case.layer_class_name).adapter.attention != "plain"]


def _ids(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def _unturned(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook that takes the rotation away."""

    def flat(table: Any) -> Any:
        if isinstance(table, torch.Tensor):
            return torch.ones_like(table)
        return torch.ones_like(table[0]), torch.zeros_like(table[1])

    args = tuple(flat(value) if isinstance(value, tuple | list) else value for value in args)
    return args, {name: flat(value) if name in TABLES else value for name, value in kwargs.items()}


@_ids(_ROTATED)
def test_rotation_shows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = copy.deepcopy(stock_of(case))
    batch = batches.build(case, stock, batches.NONE)
    before = measure.last_real(case, measure.run(stock, batch), batch)
    for layer in case.layers(stock):
        layer.register_forward_pre_hook(_unturned, with_kwargs=True)
        if hasattr(layer, "rotary_emb"):  # SAM 3 makes its tables inside
            monkeypatch.setattr(layer.rotary_emb, "attention_scaling", 0.0)
    if case.package == "vjepa2":
        monkeypatch.setattr(sys.modules[case.module_name], "rotate_queries_or_keys", lambda x, pos: x)
    assert measure.error(measure.last_real(case, measure.run(stock, batch), batch), before) > 0.1


@_ids([case for case in CASES if case.inputs in ("patches", "strip", "image_sizes", "mel_chunks", "mel_rows")])
def test_images_are_kept_apart(case: Case) -> None:
    """A change in the last image reaches its own tokens only, in the stock model and in the fast one."""
    models = models_of(case)
    batch = batches.build(case, models.stock, batches.NONE)
    name = next(iter(batch.inputs))
    changed = copy.copy(batch)
    changed.inputs = {**batch.inputs, name: batch.inputs[name].clone()}
    last = {"strip": (..., slice(-8, None)), "mel_chunks": (..., slice(-4, None)), "image_sizes": -1, "mel_rows": -1}
    where = (0, -1) if case.options.get("row") else last.get(case.inputs, -1)
    changed.inputs[name][where] += 1.0
    tokens = []
    for model in (models.stock, models.fast):
        one, other = (measure.run(model, b)["last_hidden_state"] for b in (batch, changed))
        differs = ((one - other).abs() > 1e-4).flatten(0, -2).any(-1)
        tokens.append(differs)
    assert torch.equal(*tokens)
    # Up to transformers 5.17 MiniMax's images see one another.
    together = case.package == "minimax_m3_vl" and "cu_seqlens" not in inspect.getsource(type(models.stock).forward)
    assert 0 < int(tokens[0].sum()) < len(tokens[0]) + together


@_ids(ROTATING)
def test_tokens_travel_packed_where_graphs_are_asked_for(case: Case) -> None:
    """Then layers hand packed tokens on although there is no padding, unless their loop looks between them."""
    stock = stock_of(case)
    fast = fastencoder.to_fast(copy.deepcopy(stock), cuda_graphs=True)
    batch = batches.build(case, stock, batches.NONE)
    exact = measure.last_real(case, measure.reference(case, measure.double(case, stock), batch), batch)
    assert measure.error(measure.last_real(case, measure.run(fast, batch), batch), exact) <= measure.FP32_BAR
    assert calls(fast)[0] > 0 and calls(fast)[1] == 0, reasons(fast)


def test_windows_and_images_have_batches_of_their_own() -> None:
    """The layers of Qwen2.5-VL are given windows or images; either is read once a forward."""
    models = models_of(BY_ID[QWEN])
    model = copy.deepcopy(models.fast)
    seen: list[torch.Tensor] = []
    from_offsets = fastencoder.packing.PackedBatch.from_offsets

    def spy(values: torch.Tensor, offsets: torch.Tensor, longest: int | None = None) -> Any:
        seen.append(offsets)
        return from_offsets(values, offsets, longest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastencoder.packing.PackedBatch, "from_offsets", spy)
        measure.run(model, batches.build(BY_ID[QWEN], model, batches.NONE))
    assert len(seen) == 2 and len({len(offsets) for offsets in seen}) == 2
    assert len(list(model.blocks)) == 3


def _call_alone(layer: nn.Module, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return layer(**arguments)


def test_a_block_called_by_itself() -> None:
    models = models_of(BY_ID[QWEN])
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(20, 8, generator=generator).repeat(1, 2)
    inputs = {
        "hidden_states": torch.randn(20, 48, generator=generator),
        "position_embeddings": (angles.cos(), angles.sin()),
        "cu_seqlens": torch.tensor([0, 7, 8, 20]),
    }
    stock, fast = models.stock.blocks[0], copy.deepcopy(models.fast).blocks[0]
    before = calls(fast)[0]
    torch.testing.assert_close(_call_alone(fast, **inputs), _call_alone(stock, **inputs), rtol=1e-4, atol=1e-4)
    assert calls(fast)[0] == before + 1
    for wrong in ({"cu_seqlens": torch.tensor([0, 7, 19])}, {"cu_seqlens": torch.tensor([1, 20])}):
        with pytest.raises(RuntimeError):  # what the stock block says
            _call_alone(stock, **{**inputs, **wrong})
        with pytest.raises(RuntimeError):
            _call_alone(fast, **{**inputs, **wrong})
    with pytest.raises(TypeError):
        _call_alone(fast, hidden_states=inputs["hidden_states"], position_embeddings=inputs["position_embeddings"])
    assert calls(fast)[0] == before + 1


def test_tables_that_do_not_fit_are_delegated() -> None:
    models = models_of(BY_ID["dinov3_vit.DINOv3ViTLayer"])
    layer = copy.deepcopy(models.fast).model.layer[0]
    hidden = torch.randn(2, 12, 48)
    table = torch.randn(13, 16)
    with pytest.raises(RuntimeError):
        _call_alone(layer, hidden_states=hidden, position_embeddings=(table, table))
    assert "position_embeddings" in layer._fastencoder.last_reason


def _block_mask(lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    blocks = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()
    if dtype is not torch.bool:
        blocks = torch.zeros(blocks.shape, dtype=dtype).masked_fill(~blocks, torch.finfo(dtype).min)
    return blocks[None, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 4], [1, 1, 1]])
def test_block_lengths(lengths: list[int], dtype: torch.dtype) -> None:
    assert block_lengths(_block_mask(lengths, dtype), sum(lengths)) == tuple(lengths)


def test_masks_that_are_not_blocks_are_refused() -> None:
    mask = _block_mask([3, 4], torch.float32)
    for row, column in ((0, 1), (1, 0), (0, 6), (6, 0), (2, 2)):
        other = mask.clone()
        other[0, 0, row, column] = torch.finfo(torch.float32).min if other[0, 0, row, column] == 0 else 0.0
        with pytest.raises(NotAPaddingMask):
            block_lengths(other, 7)
    bias = mask.clone()
    bias[0, 0, 0, 6] = -1.0
    for other in (bias, mask[:, :, :6], mask.expand(2, 1, 7, 7), torch.ones(1, 1, 7, 7).tril(), mask.int()):
        with pytest.raises(NotAPaddingMask):
            block_lengths(other, 7)


def test_another_mask_of_pixtral_is_delegated() -> None:
    case = BY_ID[PIXTRAL]
    models = models_of(case)
    fast = copy.deepcopy(models.fast)
    tokens, generator = 12, torch.Generator().manual_seed(3)
    angles = torch.randn(tokens, 8, generator=generator).repeat(1, 2)
    inputs = {
        "inputs_embeds": torch.randn(1, tokens, 48, generator=generator),
        "position_embeddings": (angles.cos(), angles.sin()),
    }
    causal = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    for mask, ran_fast in ((causal, False), (None, True), (_block_mask([5, 7], torch.float32), True)):
        before = calls(fast)
        with torch.no_grad():
            ours = fast.transformer(attention_mask=mask, **inputs).last_hidden_state
            theirs = models.stock.transformer(attention_mask=mask, **inputs).last_hidden_state
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (calls(fast)[0] > before[0]) == ran_fast, reasons(fast)
