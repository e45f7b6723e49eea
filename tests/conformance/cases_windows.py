"""Rows of windowed vision transformers: Swin's line, and the line of ViTDet and SAM.

Grids are no multiple of the window, so that windows are filled up, and in the second stage of Swin's line they still are.
"""

from __future__ import annotations

from typing import Any

from .case import Case, merge

# A grid of 11 x 9 tokens in windows of 4; then 6 x 5.
SWIN = {
    "image_size": (22, 18),
    "patch_size": 2,
    "embed_dim": 48,
    "depths": [2, 2],
    "num_heads": [3, 3],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.1,
}
SAM = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_dim": 80,
    "image_size": 28,
    "patch_size": 4,
    "window_size": 3,
    "global_attn_indexes": [1],
    "output_channels": 16,
}
IMAGE = {"image_size": (22, 18)}


def swin(package: str, layer: str, model: str, **other: Any) -> Case:
    config = merge(SWIN, other.pop("config", {}))
    placement = other.pop("placement", "pre")
    stack = other.pop("stack", "encoder.layers.0.blocks|encoder.layers.1.blocks")
    options = other.pop("options", IMAGE)
    inputs = other.pop("inputs", "image")
    return Case(package, layer, model, stack, inputs, placement, config, options=options, more_after=True, **other)


def sam(package: str, layer: str, model: str, **other: Any) -> Case:
    config = merge(SAM, other.pop("config", {}))
    config_class = layer.replace("Layer", "Config")
    return Case(package, layer, model, "layers", "image", "pre", config, config_class, more_after=True, **other)


CASES: list[Case] = [
    swin("swin", "SwinLayer", "SwinModel"),
    swin("donut", "DonutSwinLayer", "DonutSwinModel", module="modeling_donut_swin"),
    # Its hidden states are tuples, and with attentions it fails in transformers itself.
    swin(
        "maskformer",
        "MaskFormerSwinLayer",
        "MaskFormerSwinModel",
        module="modeling_maskformer_swin",
        outputs=("last_hidden_state", "no hidden states", "no attentions"),
        options={**IMAGE, "attentions": "broken"},
    ),
    swin("swinv2", "Swinv2Layer", "Swinv2Model", placement="residual"),
    swin(
        "swin2sr",
        "Swin2SRLayer",
        "Swin2SRModel",
        placement="residual",
        stack="encoder.stages.0.layers",
        config={"image_size": 12, "patch_size": 1, "depths": [2], "num_heads": [2]},
        options={"image_size": (12, 8)},  # the model itself takes nothing but whole windows
    ),
    swin(
        "clap",
        "ClapAudioLayer",
        "ClapAudioModel",
        inputs="clap_audio",
        stack="audio_encoder.layers.0.blocks|audio_encoder.layers.1.blocks",
        config={
            "image_size": None,
            "embed_dim": None,
            "spec_size": 40,
            "num_mel_bins": 10,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "patch_embeds_hidden_size": 48,
            "hidden_size": 96,
            "num_attention_heads": [3, 3],
            "num_hidden_layers": 2,
        },
        outputs=("last_hidden_state", "hidden_states", "attentions"),
    ),
    sam("sam", "SamVisionLayer", "SamVisionEncoder"),
    sam("sam_hq", "SamHQVisionLayer", "SamHQVisionEncoder"),
    sam("got_ocr2", "GotOcr2VisionLayer", "GotOcr2VisionEncoder"),
    sam("slanext", "SLANeXtVisionLayer", "SLANeXtVisionEncoder"),
    sam("pp_formulanet", "PPFormulaNetVisionLayer", "PPFormulaNetVisionModel", config={"output_channels": 256}),
    sam("deepseek_ocr2", "DeepseekOcr2SamVisionLayer", "DeepseekOcr2SamVisionEncoder"),
    sam("unlimited_ocr", "UnlimitedOcrSamVisionLayer", "UnlimitedOcrSamVisionEncoder"),
    Case(
        "vitdet",
        "VitDetLayer",
        "VitDetModel",
        "encoder.layer",
        "image",
        "pre",
        {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "mlp_ratio": 2,
            "image_size": 28,
            "patch_size": 4,
            "window_size": 3,
            "window_block_indices": [0, 2],
            "use_relative_position_embeddings": True,
        },
        more_after=True,
    ),
    Case(
        "seggpt",
        "SegGptLayer",
        "SegGptModel",
        "encoder.layers",
        "painted_image",
        "pre",
        {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "mlp_dim": 80,
            "image_size": [16, 8],
            "patch_size": 4,
            "pretrain_image_size": 8,
            "intermediate_hidden_state_indices": [2],
            "merge_index": 0,
        },
        more_after=True,
    ),
]
