"""Rows of the post-LN family: BERT names, DistilBERT, ALBERT, BART names, wav2vec2 names."""

from __future__ import annotations

from typing import Any

from .case import LEFT_ALONE, REFUSED, Case, merge

TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
SEQ2SEQ = {
    "vocab_size": 60,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
WAV2VEC2 = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
SEQ2SEQ_OUTPUTS = ("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions")


def bert(package: str, layer: str, model: str, stack: str = "encoder.layer", **other: Any) -> Case:
    config = merge(TEXT, other.pop("config", {}))
    placement = other.pop("placement", "post")
    return Case(package, layer, model, stack, other.pop("inputs", "text"), placement, config, **other)


def bart(package: str, layer: str, model: str, **other: Any) -> Case:
    """A whole encoder-decoder model: the conversion must leave the decoder, which reads the encoder's output, alone."""
    config = merge(SEQ2SEQ, other.pop("config", {}))
    return Case(package, layer, model, "encoder.layers", "seq2seq", "post", config, outputs=SEQ2SEQ_OUTPUTS, **other)


def wav2vec2(package: str, layer: str, model: str, **other: Any) -> Case:
    return Case(
        package, layer, model, "encoder.layers", "audio", "post", merge(WAV2VEC2, other.pop("config", {})), **other
    )


ROBERTA = {"pad_token_id": 1, "type_vocab_size": 1}
XMOD = {**ROBERTA, "languages": ["en_XX", "de_DE"], "default_language": "en_XX"}

CASES: list[Case] = [
    bert("bert", "BertLayer", "BertModel"),
    bert("bert", "BertLayer", "BertModel", tag="tanh_gelu", config={"hidden_act": "gelu_new", "hidden_size": 60}),
    bert("bert", "BertLayer", "BertModel", tag="relu", config={"hidden_act": "relu", "num_hidden_layers": 3}),
    # Sizes that divide nothing: heads of 9, heads below 16, heads of 80.
    bert(
        "bert",
        "BertLayer",
        "BertModel",
        tag="odd",
        config={"hidden_size": 45, "num_attention_heads": 5, "intermediate_size": 37},
    ),
    bert("bert", "BertLayer", "BertModel", tag="small_heads", config={"hidden_size": 32, "num_attention_heads": 4}),
    bert("bert", "BertLayer", "BertModel", tag="wide_heads", config={"hidden_size": 160, "num_attention_heads": 2}),
    bert("bert", "BertLayer", "BertModel", tag="chunked", config={"chunk_size_feed_forward": 4}, options={"size": 12}),
    bert(
        "bert",
        "BertLayer",
        "BertModel",
        tag="decoder",
        config={"is_decoder": True},
        expect=REFUSED,
        why="a decoder: causal attention and a cache",
    ),
    bert("roberta", "RobertaLayer", "RobertaModel", config=ROBERTA),
    bert("xlm_roberta", "XLMRobertaLayer", "XLMRobertaModel", config=ROBERTA),
    bert("electra", "ElectraLayer", "ElectraModel", config={"embedding_size": 24}),
    bert("camembert", "CamembertLayer", "CamembertModel", config=ROBERTA),
    bert("ernie", "ErnieLayer", "ErnieModel", config={"use_task_id": True, "task_type_vocab_size": 3}),
    bert("layoutlm", "LayoutLMLayer", "LayoutLMModel", config={"max_2d_position_embeddings": 32}),
    bert("align", "AlignTextLayer", "AlignTextModel", eager_only=True),
    bert("altclip", "AltRobertaLayer", "AltRobertaModel", stack="encoder.layers", config=ROBERTA),
    bert("bert_generation", "BertGenerationLayer", "BertGenerationEncoder"),
    bert("bridgetower", "BridgeTowerTextLayer", "BridgeTowerTextModel", config=ROBERTA, eager_only=True),
    bert(
        "canine",
        "CanineLayer",
        "CanineModel",
        inputs="characters",
        stack="encoder.layer|final_char_encoder.layer",  # the layer of initial_char_encoder attends locally
        config={
            "num_hash_buckets": 64,
            "num_hash_functions": 3,
            "local_transformer_stride": 8,
            "downsampling_rate": 4,
            "upsampling_kernel_size": 4,
            "type_vocab_size": 2,
        },
        eager_only=True,
        padding_delegates=True,
        why="a convolution after the deep layers mixes padded positions into real ones",
        no_double="the stock mask is 0 * float64's minimum in float32: NaN",
    ),
    bert("chinese_clip", "ChineseCLIPTextLayer", "ChineseCLIPTextModel"),
    bert("clap", "ClapTextLayer", "ClapTextModel", config=ROBERTA, eager_only=True),
    bert("data2vec", "Data2VecTextLayer", "Data2VecTextModel", module="modeling_data2vec_text", config=ROBERTA),
    bert(
        "git",
        "GitLayer",
        "GitModel",
        config={
            "vision_config": {
                "hidden_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 3,
                "intermediate_size": 80,
                "image_size": 8,
                "patch_size": 4,
            }
        },
        inputs="text_and_image",
        options={"image_size": 8},
        expect=LEFT_ALONE,
        why="a causal decoder; only the layers of the vision tower are an encoder's",
        eager_only=True,
    ),
    bert(
        "lxmert",
        "LxmertLayer",
        "LxmertModel",
        stack="encoder.layer|encoder.r_layers",
        inputs="lxmert",
        config={"l_layers": 2, "r_layers": 2, "x_layers": 1, "visual_feat_dim": 12, "num_hidden_layers": None},
        more_after=True,
        outputs=("language_output+vision_output", "language_hidden_states", "language_attentions"),
        eager_only=True,
    ),
    bert(
        "markuplm",
        "MarkupLMLayer",
        "MarkupLMModel",
        config={"max_depth": 4, "xpath_unit_hidden_size": 8},
        eager_only=True,
    ),
    bert("xmod", "XmodLayer", "XmodModel", inputs="languages", config=XMOD),
    bert(
        "xmod",
        "XmodLayer",
        "XmodModel",
        tag="adapter_norm",
        inputs="languages",
        config={**XMOD, "adapter_layer_norm": True, "ln_before_adapter": False},
    ),
    bert(
        "xmod",
        "XmodLayer",
        "XmodModel",
        tag="pre_norm",
        inputs="languages",
        config={**XMOD, "pre_norm": True},
        expect=REFUSED,
        why="adapters in a pre-LN layer",
    ),
    bert("rembert", "RemBertLayer", "RemBertModel", config={"input_embedding_size": 24}, eager_only=True),
    bert(
        "roc_bert",
        "RoCBertLayer",
        "RoCBertModel",
        config={
            "pronunciation_embed_dim": 12,
            "pronunciation_vocab_size": 60,
            "shape_embed_dim": 12,
            "shape_vocab_size": 60,
        },
    ),
    bert("splinter", "SplinterLayer", "SplinterModel", config={"question_token_id": 4}, eager_only=True),
    bert(
        "tapas",
        "TapasLayer",
        "TapasModel",
        config={"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 10], "max_num_rows": 8, "max_num_columns": 8},
        eager_only=True,
    ),
    bert("visual_bert", "VisualBertLayer", "VisualBertModel", config={"visual_embedding_dim": 12}, eager_only=True),
    Case(
        "distilbert",
        "TransformerBlock",
        "DistilBertModel",
        "transformer.layer",
        "text",
        "post",
        {"dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 80, "vocab_size": 60, "max_position_embeddings": 40},
    ),
    Case(
        "albert",
        "AlbertLayer",
        "AlbertModel",
        "encoder.albert_layer_groups.0.albert_layers",
        "text",
        "post",
        {**TEXT, "embedding_size": 24, "num_hidden_layers": 3},
    ),
    Case(
        "albert",
        "AlbertLayer",
        "AlbertModel",
        "encoder.albert_layer_groups.0.albert_layers|encoder.albert_layer_groups.1.albert_layers",
        "text",
        "post",
        {**TEXT, "embedding_size": 24, "num_hidden_layers": 2, "num_hidden_groups": 2, "inner_group_num": 2},
        tag="groups",
    ),
    bart("bart", "BartEncoderLayer", "BartModel"),
    bart("bart", "BartEncoderLayer", "BartModel", tag="relu", config={"activation_function": "relu"}),
    bart("marian", "MarianEncoderLayer", "MarianModel", config={"decoder_start_token_id": 1, "vocab_size": 60}),
    bart("blenderbot_small", "BlenderbotSmallEncoderLayer", "BlenderbotSmallModel"),
    Case(
        "fsmt",
        "EncoderLayer",
        "FSMTModel",
        "encoder.layers",
        "seq2seq",
        "post",
        {
            **{key: value for key, value in SEQ2SEQ.items() if key != "vocab_size"},
            "langs": ["en", "de"],
            "src_vocab_size": 60,
            "tgt_vocab_size": 60,
        },
        outputs=SEQ2SEQ_OUTPUTS,
        options={"vocab": 60},
        eager_only=True,
        no_double="the stock causal mask is a float32 tensor filled with float64's minimum: an error",
    ),
    Case(
        "prophetnet",
        "ProphetNetEncoderLayer",
        "ProphetNetEncoder",
        "layers",
        "text",
        "post",
        {
            "vocab_size": 60,
            "hidden_size": 48,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 3,
            "num_decoder_attention_heads": 3,
            "encoder_ffn_dim": 80,
            "max_position_embeddings": 40,
        },
        eager_only=True,
        no_double="the stock mask is 0 * float64's minimum in float32: NaN",
    ),
    Case(
        "tvp",
        "TvpEncodeLayer",
        "hosts.MaskedEncoder",
        "encoder.layer",
        "hidden",
        "post",
        TEXT,
        config_class="TvpConfig",
        options={"width": 48},
        eager_only=True,
    ),
    bart("mvp", "MvpEncoderLayer", "MvpModel", eager_only=True),
    bart("plbart", "PLBartEncoderLayer", "PLBartModel"),
    Case(
        "time_series_transformer",
        "TimeSeriesTransformerEncoderLayer",
        "TimeSeriesTransformerEncoder",
        "layers",
        "series",
        "post",
        {
            "prediction_length": 3,
            "context_length": 13,
            "d_model": 48,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 80,
            "encoder_layers": 2,
            "encoder_layerdrop": 0.0,
        },
        eager_only=True,
    ),
    wav2vec2("wav2vec2", "Wav2Vec2EncoderLayer", "Wav2Vec2Model"),
    wav2vec2("hubert", "HubertEncoderLayer", "HubertModel"),
    wav2vec2(
        "data2vec",
        "Data2VecAudioEncoderLayer",
        "Data2VecAudioModel",
        module="modeling_data2vec_audio",
        config={"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
    ),
    wav2vec2("sew", "SEWEncoderLayer", "SEWModel", config={"squeeze_factor": 2}, more_after=True),
    wav2vec2("unispeech", "UniSpeechEncoderLayer", "UniSpeechModel"),
    wav2vec2("unispeech_sat", "UniSpeechSatEncoderLayer", "UniSpeechSatModel"),
    wav2vec2(
        "wav2vec2",
        "Wav2Vec2EncoderLayer",
        "Wav2Vec2Model",
        tag="layer_norm_features",
        config={"feat_extract_norm": "layer", "hidden_act": "gelu_new"},
    ),
]
