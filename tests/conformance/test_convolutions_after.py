"""Models that convolve over the encoder's output: what stands at padding reaches real positions there.

The stock model computes on padded positions too, so zeros in their place would change the result for real ones: with
padding, these models must not get them.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import fastencoder

from . import batches, measure, weights
from .cases_post_ln import WAV2VEC2

SAMPLES = 400
SMALL_HEADS = {"tdnn_dim": (24, 24), "tdnn_kernel": (5, 3), "tdnn_dilation": (1, 2), "xvector_output_dim": 16}


def config(**more: object) -> transformers.Wav2Vec2Config:
    return transformers.Wav2Vec2Config(**{**WAV2VEC2, **more})


def adapter_model() -> nn.Module:
    return transformers.Wav2Vec2Model(config(add_adapter=True, num_adapter_layers=1, output_hidden_size=48))


def stable_adapter_model() -> nn.Module:
    stable = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    return transformers.Wav2Vec2Model(config(add_adapter=True, num_adapter_layers=1, output_hidden_size=48, **stable))


def speaker_model() -> nn.Module:
    return transformers.Wav2Vec2ForXVector(config(**SMALL_HEADS))


def _output(model: nn.Module, batch: batches.Batch) -> torch.Tensor:
    output = measure.run(model, batch)
    if "embeddings" in output:
        return output.embeddings
    hidden = output.last_hidden_state
    real = model._get_feature_vector_attention_mask(hidden.shape[1], batch.inputs["attention_mask"], add_adapter=True)
    return hidden[real.bool()]


@pytest.mark.parametrize("make", [adapter_model, stable_adapter_model, speaker_model])
@pytest.mark.parametrize("lengths", [(400, 400, 400), (340, 241, 303), (375, 400, 259)])
def test_real_positions_after_a_convolution(make: object, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    stock = make().eval()
    weights.sharpen(stock)
    fast = fastencoder.to_fast(copy.deepcopy(stock))
    samples = torch.randn(len(lengths), SAMPLES, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(SAMPLES) < torch.tensor(lengths)[:, None]).long()
    batch = batches.Batch({"input_values": samples, "attention_mask": mask})
    exact = _output(copy.deepcopy(stock).double(), batch.to(torch.float64))
    assert measure.error(_output(fast, batch), exact) <= measure.FP32_BAR
