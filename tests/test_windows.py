"""Windowed vision transformers: what is refused, what a call leaves to the original layers, and windows of every size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import SamVisionConfig, SwinConfig, SwinModel
from transformers.models.sam import modeling_sam
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder

import fastencoder
from fastencoder.layers.attention.grid import windows

from .conformance.weights import sharpen
from .tiny import calls, reasons, relative_error

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_dim": 80,
    "image_size": 28,
    "patch_size": 4,
    "window_size": 3,
    "global_attn_indexes": [1],
    "output_channels": 16,
}


class SamVisionAttentionSplit(SamVisionAttention):
    """What users write to put LoRA on single projections of SAM: three linears in the place of one."""

    def __init__(self, config: SamVisionConfig, window_size: int) -> None:
        super().__init__(config, window_size)
        del self.qkv
        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def qkv(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(hidden_states), self.k(hidden_states), self.v(hidden_states)], dim=-1)


class SamVisionAttentionKept(SamVisionAttention):
    """The same parts, and other maths."""

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool | None = None) -> tuple[torch.Tensor, ...]:
        output, weights = super().forward(hidden_states, output_attentions)
        return 2 * output, weights


def encoder(implementation: str = "eager", **more: object) -> nn.Module:
    config = SamVisionConfig(**{**SIZES, **more}, attn_implementation=implementation)
    model = SamVisionEncoder(config).eval()
    sharpen(model)
    return model


@pytest.mark.parametrize("attention", [SamVisionAttentionSplit, SamVisionAttentionKept])
def test_a_users_own_attention_is_refused(attention: type, monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(modeling_sam.SAM_VISION_ATTENTION_CLASSES)
    monkeypatch.setattr(modeling_sam, "SAM_VISION_ATTENTION_CLASSES", {**known, "eager": attention})
    model = encoder()
    assert type(model.layers[0].attn) is attention
    image = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        before = model(image).last_hidden_state
        with pytest.raises(fastencoder.NotEligibleError) as caught:
            fastencoder.to_fast(model)
        assert attention.__name__ in str(caught.value) or "no attn.qkv" in str(caught.value)
        assert not fastencoder.is_fast(model)
        assert torch.equal(model(image).last_hidden_state, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("use_rel_pos", [False, True])
def test_sam_with_and_without_relative_positions(implementation: str, use_rel_pos: bool) -> None:
    stock = encoder(implementation, use_rel_pos=use_rel_pos)
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    image = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = copy.deepcopy(stock).double()(image.double()).last_hidden_state
        assert relative_error(fast(image).last_hidden_state, exact) < 1e-5
    assert calls(fast) == (2, 0)


def test_sam_interpolates_positions_of_another_grid() -> None:
    stock = encoder(use_abs_pos=False)
    stock.patch_embed.image_size = (36, 20)  # a grid of 9 x 5, where the layers were made for 7 x 7
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    image = torch.randn(2, 3, 36, 20, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = copy.deepcopy(stock).double()(image.double()).last_hidden_state
        assert relative_error(fast(image).last_hidden_state, exact) < 1e-5
    assert calls(fast) == (2, 0)


def swin(**more: object) -> nn.Module:
    sizes = dict(embed_dim=48, depths=[2], num_heads=[3], mlp_ratio=2.0, patch_size=2, window_size=4)
    model = SwinModel(SwinConfig(image_size=20, **{**sizes, **more})).eval()
    sharpen(model)
    return model


@pytest.mark.parametrize("size", [(16, 16), (18, 26), (8, 8), (20, 12)])
def test_swin_on_images_of_every_size(size: tuple[int, int]) -> None:
    """Also smaller ones than a window, which make the stock layers remember another window."""
    stock = swin()
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = copy.deepcopy(stock).double()(image.double(), interpolate_pos_encoding=True).last_hidden_state
        ours = fast(image, interpolate_pos_encoding=True).last_hidden_state
        stock(image, interpolate_pos_encoding=True)
    assert relative_error(ours, exact) < 1e-5
    assert calls(fast) == (2, 0)
    remembered = [[(block.window_size, block.shift_size) for block in m.encoder.layers[0].blocks] for m in (stock, fast)]
    assert remembered[0] == remembered[1]


def test_swin_with_a_window_that_it_has_no_positions_for_is_left_to_the_original() -> None:
    fast = fastencoder.to_fast(swin())
    with torch.inference_mode(), pytest.raises(RuntimeError):  # transformers' own answer
        fast(torch.randn(1, 3, 6, 6), interpolate_pos_encoding=True)
    assert "relative positions" in next(iter(reasons(fast)))


def test_swin_when_a_gradient_is_needed() -> None:
    fast = fastencoder.to_fast(swin())
    fast(torch.randn(1, 3, 16, 16)).last_hidden_state.sum().backward()
    assert calls(fast) == (0, 2)


@pytest.mark.parametrize("shape", [(5, 7, 3, 0), (6, 6, 3, 1), (7, 4, 4, 2), (3, 3, 3, 0), (4, 6, 0, 0)])
def test_windows_give_every_token_its_place_back(shape: tuple[int, int, int, int]) -> None:
    height, width, side, shift = shape
    cut = windows(2, height, width, side, shift, torch.device("cpu"))
    tokens = torch.arange(2 * height * width)
    rows = torch.cat([tokens, torch.tensor([-1])]) if cut.filled else tokens
    taken = cut.take(rows)
    assert torch.equal(cut.give_back(taken), tokens)
    assert taken.shape[0] == cut.offsets[-1] == 2 * cut.count * cut.size
    assert sorted(taken[taken >= 0].tolist()) == tokens.tolist()
    if side:
        grid = nn.functional.pad(tokens[: height * width].view(height, width), (0, -width % side, 0, -height % side), value=-1)
        window = grid.roll((-shift, -shift), (0, 1))[:side, :side].flatten()
        assert torch.equal(taken[: cut.size], window)
