"""Tiny models of layers that the registry does not know, and whose attention goes through transformers' interface."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fastencoder import fingerprints

from .conformance import weights

SIZE = 13  # tokens, where a case does not say otherwise


@dataclass(frozen=True)
class AttentionCase:
    """One model.

    Args:
        package, model: `transformers.models.<package>.modeling_<package>.<model>`.
        config: of the config class `config_class`.
        inputs: what the forward is called with, from the model, a mask `[B, S]` and a generator.
        real: the mask of the output's tokens, from the mask of the input's.
        padding: "runs" (padding is left out), "at end" (only if it is at the end of the rows), "stays" (calls with padding
            run the original attention).
        modules: how many attention modules are converted.
        mask_size: length of the mask.
        at_end_only: the model itself cannot have padding elsewhere.
    """

    package: str
    model: str
    config_class: str
    config: dict[str, Any]
    inputs: Callable[[nn.Module, torch.Tensor, torch.Generator], dict[str, Any]]
    padding: str = "runs"
    modules: int = 3
    real: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, mask: mask.bool()
    mask_size: int = SIZE
    at_end_only: bool = False
    output: str = "last_hidden_state"

    @property
    def id(self) -> str:
        return f"{self.package}.{self.model}"

    def build(self, seed: int = 0) -> Any:
        """The model in fp32 with weights under which every term shows.

        Skips where transformers has no such class, or if its layers are known by now.
        """
        config_class = _lookup(self.package, "configuration", self.config_class)
        model_class = _lookup(self.package, "modeling", self.model)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = model_class(config_class(**self.config)).float().eval()
        if fingerprints.find_all(model):
            pytest.skip("its layers are known: they are fast as a whole")
        weights.sharpen(model, seed)
        for module in model.modules():  # a running variance is positive
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(generator=torch.Generator().manual_seed(seed))
                module.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(seed))
        return model

    def batch(self, model: nn.Module, mask: torch.Tensor, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        return self.inputs(model, mask, torch.Generator().manual_seed(seed))

    def run(self, model: Any, batch: dict[str, Any], **more: Any) -> Any:
        """One forward without gradients. In the dtype of the model."""
        dtype = next(model.parameters()).dtype
        cast = {
            key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in batch.items()
        }
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            return model(**cast, **more)


def _lookup(package: str, kind: str, name: str) -> Any:
    module = importlib.import_module(f"transformers.models.{package}.{kind}_{package}")
    if not hasattr(module, name):
        pytest.skip(f"the installed transformers has no {name}")
    return getattr(module, name)


def _ids(model: Any, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(5, 50, mask.shape, generator=generator)


def _text(model: Any, mask: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": _ids(model, mask, generator), "attention_mask": mask}


def _query_former(model: Any, mask: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Four learned queries, then an instruction; every other layer also looks at an image."""
    rows = len(mask)
    return {
        "input_ids": _ids(model, mask, generator),
        "attention_mask": torch.cat((torch.ones(rows, 4, dtype=mask.dtype), mask), 1),
        "query_embeds": torch.randn(rows, 4, 48, generator=generator),
        "encoder_hidden_states": torch.randn(rows, 17, 32, generator=generator),  # as long as the queries and the text
    }


def _queries_are_real(model: Any, mask: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.ones(len(mask), 4), mask), 1).bool()


def _blip2_queries(model: Any, mask: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    rows, size = mask.shape
    return {
        "query_embeds": torch.randn(rows, size, 48, generator=generator),
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(rows, size, 32, generator=generator),
    }


def _frames(width: int, mask_name: str = "attention_mask") -> Callable[..., dict[str, Any]]:
    def build(model: Any, mask: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
        features = torch.randn(*mask.shape, width, generator=generator)
        return {"input_features": features, mask_name: mask}

    return build


def _subsampled(model: Any, mask: torch.Tensor) -> torch.Tensor:
    frames = model._get_subsampling_output_length(torch.tensor(mask.shape[1]))
    return model._get_output_attention_mask(mask, target_length=int(frames)).bool()


def _frames_of_samples(model: Any, mask: torch.Tensor) -> torch.Tensor:
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(mask.shape[1])))
    return model._get_feature_vector_attention_mask(frames, mask).bool()


_SPEECH = dict(
    hidden_size=48,
    speech_encoder_layers=3,
    speech_encoder_attention_heads=3,
    speech_encoder_intermediate_size=40,
    feature_projection_input_dim=20,
    speech_encoder_layerdrop=0.0,
    add_adapter=False,
    conv_depthwise_kernel_size=5,
    max_source_positions=64,
)
_CONFORMER = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    conv_depthwise_kernel_size=5,
    layerdrop=0.0,
)
_QFORMER = dict(
    vocab_size=60,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    encoder_hidden_size=32,
    cross_attention_frequency=2,
)

CASES = [
    AttentionCase(
        "mobilebert",
        "MobileBertModel",
        "MobileBertConfig",
        dict(
            vocab_size=60,
            hidden_size=48,
            intermediate_size=40,
            embedding_size=16,
            intra_bottleneck_size=48,
            true_hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_feedforward_networks=2,
        ),
        _text,
    ),
    AttentionCase(
        "xmod",
        "XmodModel",
        "XmodConfig",
        dict(
            vocab_size=60,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=40,
            languages=["de_DE", "en_XX"],
            default_language="en_XX",
        ),
        _text,
    ),
    AttentionCase(
        "instructblip",
        "InstructBlipQFormerModel",
        "InstructBlipQFormerConfig",
        _QFORMER,
        _query_former,
        real=_queries_are_real,
    ),
    AttentionCase("blip_2", "Blip2QFormerModel", "Blip2QFormerConfig", _QFORMER, _blip2_queries),
    AttentionCase(
        "dia",
        "DiaEncoder",
        "DiaEncoderConfig",
        dict(
            vocab_size=60,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=16,
            intermediate_size=40,
        ),
        _text,
    ),
    AttentionCase(
        "lasr",
        "LasrEncoder",
        "LasrEncoderConfig",
        dict(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=40,
            num_mel_bins=20,
            conv_kernel_size=5,
            subsampling_conv_channels=16,
        ),
        _frames(20),
        real=_subsampled,
        mask_size=76,
        at_end_only=True,
    ),
    AttentionCase(
        "wav2vec2_bert",
        "Wav2Vec2BertModel",
        "Wav2Vec2BertConfig",
        dict(**_CONFORMER, feature_projection_input_dim=20, position_embeddings_type="relative_key"),
        _frames(20),
        padding="at end",
    ),
    AttentionCase(
        "seamless_m4t",
        "SeamlessM4TSpeechEncoder",
        "SeamlessM4TConfig",
        dict(**_SPEECH, position_embeddings_type="relative"),
        _frames(20),
        padding="at end",
    ),
    AttentionCase(
        "seamless_m4t_v2",
        "SeamlessM4Tv2SpeechEncoder",
        "SeamlessM4Tv2Config",
        dict(**_SPEECH, position_embeddings_type="relative_key"),
        _frames(20),
        padding="at end",
    ),
    AttentionCase(
        "fun_asr_nano",
        "FunAsrNanoEncoder",
        "FunAsrNanoEncoderConfig",
        dict(
            num_mel_bins=8,
            hidden_size=48,
            num_attention_heads=3,
            intermediate_size=40,
            num_hidden_layers=3,
            num_stacked_frames=3,
            fsmn_kernel_size=3,
            num_timestamp_prediction_layers=0,
        ),
        _frames(24, "input_features_mask"),
    ),
    # Its convolutions do not mask padding: the original attention decides what they find there.
    AttentionCase(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        dict(
            **_CONFORMER,
            position_embeddings_type="rotary",
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=4,
            conv_dim=(16, 16),
            conv_kernel=(5, 3),
            conv_stride=(3, 2),
            num_feat_extract_layers=2,
        ),
        lambda model, mask, generator: {
            "input_values": torch.randn(mask.shape, generator=generator),
            "attention_mask": mask,
        },
        padding="stays",
        real=_frames_of_samples,
        mask_size=90,
        at_end_only=True,
    ),
    # Positions and padding reach its attention as one bias.
    AttentionCase(
        "parakeet",
        "ParakeetEncoder",
        "ParakeetEncoderConfig",
        dict(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=40,
            num_mel_bins=24,
            conv_kernel_size=5,
            subsampling_conv_channels=16,
        ),
        _frames(24),
        padding="stays",
        real=_subsampled,
        mask_size=100,
        at_end_only=True,
    ),
]
