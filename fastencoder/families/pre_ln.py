"""Pre-LN multi-head attention: `x = x + attention(norm1(x))`, `x = x + feed_forward(norm2(x))`.

"On Layer Normalization in the Transformer Architecture" (https://arxiv.org/abs/2002.04745); with LayerScale
(https://arxiv.org/abs/2103.17239) each block's output is multiplied by a learned vector before it is added.
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap
from .post_ln import BART_NAMES, BERT_NAMES, WAV2VEC2

VIT_NAMES = NameMap(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    norm1="layernorm_before",
    up="mlp.fc1",
    activation="mlp.activation_fn",
    down="mlp.fc2",
    norm2="layernorm_after",
    heads="attention.num_attention_heads",
    scaling="attention.scaling",
)
VIT = Adapter("pre", (VIT_NAMES,))
# Up to transformers 5.17.
PIXIO = Adapter("pre", (VIT_NAMES, replace(VIT_NAMES, activation="mlp.activation")))

CLIP_NAMES = NameMap(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    norm1="layer_norm1",
    up="mlp.fc1",
    activation="mlp.activation_fn",
    down="mlp.fc2",
    norm2="layer_norm2",
    heads="self_attn.num_heads",
    scaling="self_attn.scale",
)
CLIP = Adapter("pre", (CLIP_NAMES,))

DINOV2_NAMES = replace(
    VIT_NAMES,
    norm1="norm1",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
)
# transformers up to 5.17 nests the attention as ViT once did.
DINOV2_NESTED_NAMES = replace(
    DINOV2_NAMES,
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    activation="mlp.activation",
    heads="attention.attention.num_attention_heads",
    scaling="attention.attention.scaling",
)


def with_gated(*maps: NameMap) -> tuple[NameMap, ...]:
    """The maps of DINOv2's line, and after each the one of its gated feed-forward block (`use_swiglu_ffn`).

    Up to transformers 5.17 that block has no module for its activation: then it is called as it is.
    """
    gated = [replace(names, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj") for names in maps]
    gated = [replace(names, activation="mlp.act_fn") for names in gated]
    whole = [replace(names, up="", activation="", down="", feed_forward="mlp") for names in maps]
    return (*maps, *gated, *whole)


DINOV2 = Adapter("pre", with_gated(DINOV2_NAMES, DINOV2_NESTED_NAMES))

# BERT's line with the norms before the blocks: each model keeps them elsewhere.
MEGATRON_BERT = Adapter("pre", (replace(BERT_NAMES, norm1="attention.ln", norm2="ln"),), extra_outputs=1)
XLM_ROBERTA_XL = Adapter("pre", (replace(BERT_NAMES, norm1="attention.self_attn_layer_norm", norm2="LayerNorm"),))
ROBERTA_PRELAYERNORM = Adapter(
    "pre", (replace(BERT_NAMES, norm1="attention.LayerNorm", norm2="intermediate.LayerNorm"),)
)

SEAMLESS_M4T = Adapter(
    "pre", (replace(BART_NAMES, up="ffn.fc1", activation="ffn.act", down="ffn.fc2", norm2="ffn_layer_norm"),)
)

MBART = Adapter("pre", (BART_NAMES,), clamp="always")
WAV2VEC2_STABLE = replace(WAV2VEC2, norm_placement="pre", requires={"adapter_layer": None})

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (
        VIT,
        {
            "vit.modeling_vit.ViTLayer": "vit",
            "deit.modeling_deit.DeiTLayer": "deit",
            "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTLayer": (
                "audio-spectrogram-transformer"
            ),
            "ijepa.modeling_ijepa.IJepaLayer": "ijepa",
            "vit_mae.modeling_vit_mae.ViTMAELayer": "vit_mae",
            "vit_msn.modeling_vit_msn.ViTMSNLayer": "vit_msn",
            "vivit.modeling_vivit.VivitLayer": "vivit",
        },
    ),
    (PIXIO, {"pixio.modeling_pixio.PixioLayer": "pixio"}),
    (
        CLIP,
        {
            "clip.modeling_clip.CLIPEncoderLayer": "clip clip_vision_model clip_text_model",
            "siglip.modeling_siglip.SiglipEncoderLayer": "siglip siglip_vision_model siglip_text_model",
            "siglip2.modeling_siglip2.Siglip2EncoderLayer": "siglip2 siglip2_vision_model siglip2_text_model",
            "altclip.modeling_altclip.AltCLIPEncoderLayer": "altclip altclip_vision_model",
            "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionLayer": "chinese_clip chinese_clip_vision_model",
            "clipseg.modeling_clipseg.CLIPSegEncoderLayer": "clipseg clipseg_vision_model clipseg_text_model",
            "git.modeling_git.GitVisionEncoderLayer": "git git_vision_model",
            "granite_docling.modeling_granite_docling.GraniteDoclingEncoderLayer": (
                "granite_docling granite_docling_vision"
            ),
            "groupvit.modeling_groupvit.GroupViTEncoderLayer": "groupvit groupvit_vision_model groupvit_text_model",
            "idefics.vision.IdeficsVisionEncoderLayer": "idefics",
            "idefics2.modeling_idefics2.Idefics2EncoderLayer": "idefics2 idefics2_vision",
            "idefics3.modeling_idefics3.Idefics3EncoderLayer": "idefics3 idefics3_vision",
            "kosmos2.modeling_kosmos2.Kosmos2VisionEncoderLayer": "kosmos-2 kosmos_2_vision_model",
            "metaclip_2.modeling_metaclip_2.MetaClip2EncoderLayer": (
                "metaclip_2 metaclip_2_vision_model metaclip_2_text_model"
            ),
            "owlvit.modeling_owlvit.OwlViTEncoderLayer": "owlvit owlvit_vision_model owlvit_text_model",
            "owlv2.modeling_owlv2.Owlv2EncoderLayer": "owlv2 owlv2_vision_model owlv2_text_model",
            "smolvlm.modeling_smolvlm.SmolVLMEncoderLayer": "smolvlm smolvlm_vision",
            "tipsv2.modeling_tipsv2.Tipsv2TextEncoderLayer": "tipsv2 tipsv2_text_model",
            "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrEncoderLayer": "unlimited_ocr unlimited_ocr_vision_encoder",
            "x_clip.modeling_x_clip.XCLIPEncoderLayer": "xclip xclip_text_model",
        },
    ),
    # Its other blocks, first and last, are convolutions over the tokens.
    (
        replace(CLIP, padding_readers=("RepMixerBlock",)),
        {
            "sam3_lite_text.modeling_sam3_lite_text.Sam3LiteTextTextEncoderLayer": (
                "sam3_lite_text sam3_lite_text_text_model"
            )
        },
    ),
    (
        DINOV2,
        {
            "dinov2.modeling_dinov2.Dinov2Layer": "dinov2 depth_anything",
            "radio.modeling_radio.RadioLayer": "radio",
            "tipsv2.modeling_tipsv2.Tipsv2VisionLayer": "tipsv2 tipsv2_vision_model",
            "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": "dinov2_with_registers",
        },
    ),
    (MEGATRON_BERT, {"megatron_bert.modeling_megatron_bert.MegatronBertLayer": "megatron-bert"}),
    (XLM_ROBERTA_XL, {"xlm_roberta_xl.modeling_xlm_roberta_xl.XLMRobertaXLLayer": "xlm-roberta-xl"}),
    (
        ROBERTA_PRELAYERNORM,
        {"roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormLayer": "roberta-prelayernorm"},
    ),
    (SEAMLESS_M4T, {"seamless_m4t.modeling_seamless_m4t.SeamlessM4TEncoderLayer": "seamless_m4t"}),
    # Where it makes units of speech, convolutions follow the encoder of the units.
    (
        replace(SEAMLESS_M4T, padding_readers=("TextToUnitDecoderLayer",)),
        {"seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2EncoderLayer": "seamless_m4t_v2"},
    ),
    (
        MBART,
        {
            "mbart.modeling_mbart.MBartEncoderLayer": "mbart",
            "m2m_100.modeling_m2m_100.M2M100EncoderLayer": "m2m_100",
            "pegasus.modeling_pegasus.PegasusEncoderLayer": "pegasus",
            "blenderbot.modeling_blenderbot.BlenderbotEncoderLayer": "blenderbot",
            "whisper.modeling_whisper.WhisperEncoderLayer": "whisper",
            "speech_to_text.modeling_speech_to_text.Speech2TextEncoderLayer": "speech_to_text",
            "audioflamingo3.modeling_audioflamingo3.AudioFlamingo3EncoderLayer": (
                "audioflamingo3 audioflamingo3_encoder"
            ),
            "moss_transcribe_diarize.modeling_moss_transcribe_diarize.MossTranscribeDiarizeAudioLayer": (
                "moss_transcribe_diarize moss_transcribe_diarize_audio"
            ),
            "qwen2_audio.modeling_qwen2_audio.Qwen2AudioEncoderLayer": "qwen2_audio qwen2_audio_encoder",
            "voxtral.modeling_voxtral.VoxtralEncoderLayer": "voxtral voxtral_encoder",
        },
    ),
    (
        WAV2VEC2_STABLE,
        {
            "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm": "wav2vec2",
            "hubert.modeling_hubert.HubertEncoderLayerStableLayerNorm": "hubert",
            "unispeech.modeling_unispeech.UniSpeechEncoderLayerStableLayerNorm": "unispeech",
            "unispeech_sat.modeling_unispeech_sat.UniSpeechSatEncoderLayerStableLayerNorm": "unispeech-sat",
        },
    ),
]
