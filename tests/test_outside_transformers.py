"""What of torch's own encoder layer and of timm's block is refused, and which of their calls are left to the original."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastencoder

from .conformance import external
from .conformance.absent import Absent
from .conformance.weights import sharpen
from .tiny import calls, reasons, relative_error


def layer(**more: object) -> nn.TransformerEncoderLayer:
    made = nn.TransformerEncoderLayer(**{"d_model": 32, "nhead": 2, "dim_feedforward": 48, "batch_first": True, **more}).eval()
    sharpen(made)
    return made


def pair(made: nn.Module) -> tuple[nn.Module, nn.Module]:
    return made, fastencoder.to_fast(copy.deepcopy(made))


def refusal(module: nn.Module) -> str:
    with pytest.raises(fastencoder.NotEligibleError) as caught:
        fastencoder.to_fast(module)
    return str(caught.value)


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), lambda x: F.silu(x) * 2], ids=["tanh", "lambda"])
def test_torch_activation_that_is_refused(activation: object) -> None:
    assert "activation" in refusal(layer(activation=activation)) or "GELU" in refusal(layer(activation=activation))


def test_torch_activation_that_was_replaced() -> None:
    made = layer()
    made.activation = nn.SiLU()  # torch's fused path goes on with ReLU
    assert "was replaced" in refusal(made)


@pytest.mark.parametrize("activation", [F.relu, "gelu", nn.SiLU(), nn.Hardswish(), F.silu])
def test_torch_activations(activation: object) -> None:
    stock, fast = pair(layer(activation=activation))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert relative_error(fast(x), stock(x)) < 1e-5
    assert calls(fast) == (1, 0)


@pytest.mark.parametrize("heads", [1, 2])
def test_torch_masks(heads: int) -> None:
    stock, fast = pair(layer(nhead=heads))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    some = torch.rand(2 * heads, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    some[:, range(5), range(5)] = False
    with torch.inference_mode():
        for mask in ({"src_mask": causal}, {"src_mask": causal, "is_causal": True}, {"src_mask": some}):
            assert relative_error(fast(x, **mask), stock(x, **mask)) < 1e-5
        assert relative_error(fast(x[0]), stock(x[0])) < 1e-5  # without a batch dimension
    assert calls(fast) == (3, 1)


def test_torch_additive_mask_is_left_to_torch() -> None:
    stock, fast = pair(layer(nhead=1))  # with two heads torch's fused path would answer NaN
    x, bias = torch.randn(2, 5, 32), torch.randn(5, 5)
    with torch.inference_mode():
        assert torch.equal(fast(x, src_mask=bias), stock(x, src_mask=bias))
    assert calls(fast) == (0, 1) and "other values" in next(iter(reasons(fast)))


def test_torch_encoder_hands_its_layers_nested_tensors() -> None:
    """Right padding and an even number of heads: torch's loop makes a nested tensor of the batch, and pads what comes out."""
    encoder = nn.TransformerEncoder(layer(), 3).eval()
    sharpen(encoder)
    stock, fast = pair(encoder)
    seen: list[bool] = []
    fast.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].is_nested))
    x = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.arange(6) >= torch.tensor([4, 1, 3])[:, None]
    with torch.inference_mode():
        ours, theirs = fast(x, src_key_padding_mask=padding), stock(x, src_key_padding_mask=padding)
    assert seen == [True] and calls(fast) == (3, 0)
    assert ours.shape == theirs.shape == x.shape
    assert relative_error(ours, theirs, ~padding) < 1e-5
    assert (ours[padding] == 0).all() and (theirs[padding] == 0).all()


def test_torch_layers_inside_a_transformer() -> None:
    model = nn.Transformer(32, 2, 2, 2, 48, batch_first=True).eval()
    sharpen(model)
    stock, fast = pair(model)
    source, target = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    with torch.inference_mode():
        assert relative_error(fast(source, target), stock(source, target)) < 1e-5
    assert calls(fast) == (2, 0)


def block(**more: object) -> nn.Module:
    try:
        external.import_timm()
    except Absent as absent:
        pytest.skip(str(absent))
    from timm.models.vision_transformer import Block

    made = Block(**{"dim": 32, "num_heads": 2, **more}).eval()
    sharpen(made)
    return made


def test_timm_parts_that_are_refused() -> None:
    made = block(attn_layer="diff")
    from timm.layers.attention import Attention, AttentionRope
    from timm.layers.mlp import GlobalResponseNormMlp

    assert "DiffAttention" in refusal(made)
    assert "AttentionRope" in refusal(block(attn_layer=AttentionRope))

    gated = block()
    gated.attn = Attention(32, 2, gated=True)
    assert "attn.gate" in refusal(gated)
    over_tokens = block()
    over_tokens.mlp = GlobalResponseNormMlp(32, 64)
    assert "GlobalResponseNormMlp" in refusal(over_tokens)

    class Mine(Attention):
        def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
            return super().forward(x) + 1

    own = block()
    own.attn = Mine(32, 2)
    assert "Mine" in refusal(own)


@pytest.mark.parametrize("fused", [False, True])
def test_timm_masks(fused: bool) -> None:
    made = block()
    made.attn.fused_attn = fused
    stock, fast = pair(made)
    x = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    pairs = torch.ones(3, 3).tril().bool()  # as large as a mask of padding would be
    with torch.inference_mode():
        assert relative_error(fast(x, is_causal=True), stock(x, is_causal=True)) < 1e-5
        theirs = stock(x, attn_mask=keys[:, None, None])
        assert relative_error(fast(x, attn_mask=keys[:, None, None]), theirs, keys) < 1e-5
        assert calls(fast) == (2, 0)
        assert torch.equal(fast(x, attn_mask=pairs), stock(x, attn_mask=pairs))
    assert calls(fast) == (2, 1)
