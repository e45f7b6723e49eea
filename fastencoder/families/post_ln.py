"""Post-LN multi-head attention: `x = norm1(x + attention(x))`, `x = norm2(x + feed_forward(x))`.

The original Transformer (https://arxiv.org/abs/1706.03762) and BERT (https://arxiv.org/abs/1810.04805).
"""

from __future__ import annotations

from dataclasses import replace

from ..spec import Adapter, NameMap

BERT_NAMES = NameMap(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    norm1="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm2="output.LayerNorm",
    heads="attention.self.num_attention_heads",
    scaling="attention.self.scaling",
)
BERT = Adapter("post", (BERT_NAMES,))
BERT_TUPLE = replace(BERT, extra_outputs=0)

# X-MOD (https://arxiv.org/abs/2205.06266): an adapter of the sequence's language before the last norm.
XMOD = replace(
    BERT,
    requires={"pre_norm": False},
    chosen_by="lang_ids",
    chosen_last="output.lang_adapter",
    extra_parameters=("output.adapter_modules", "output.adapter_layer_norm"),
)

DISTILBERT = Adapter(
    "post",
    (
        NameMap(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            out="attention.out_lin",
            norm1="sa_layer_norm",
            up="ffn.lin1",
            activation="ffn.activation",
            down="ffn.lin2",
            norm2="output_layer_norm",
            heads="attention.n_heads",
            scaling="attention.scaling",
        ),
    ),
)

ALBERT = Adapter(
    "post",
    (
        NameMap(
            query="attention.query",
            key="attention.key",
            value="attention.value",
            out="attention.dense",
            norm1="attention.LayerNorm",
            up="ffn",
            activation="activation",
            down="ffn_output",
            norm2="full_layer_layer_norm",
            heads="attention.num_attention_heads",
            scaling="attention.scaling",
        ),
    ),
    schedule="albert",
)

BART_NAMES = NameMap(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    norm1="self_attn_layer_norm",
    up="fc1",
    activation="activation_fn",
    down="fc2",
    norm2="final_layer_norm",
    heads="self_attn.num_heads",
    scaling="self_attn.scaling",
)
BART = Adapter("post", (BART_NAMES,), clamp="non-finite")

WAV2VEC2_NAMES = NameMap(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.out_proj",
    norm1="layer_norm",
    up="feed_forward.intermediate_dense",
    activation="feed_forward.intermediate_act_fn",
    down="feed_forward.output_dense",
    norm2="final_layer_norm",
    heads="attention.num_heads",
    scaling="attention.scaling",
)
# Convolutions over frames follow the encoder with config.add_adapter, and in the speaker models (TDNN layers).
WAV2VEC2 = Adapter(
    "post",
    (WAV2VEC2_NAMES,),
    padding_is_read="attention.config.add_adapter",
    padding_readers=("TDNNLayer",),
)

# The mask is additive and repeated for every head.
PROPHETNET = Adapter(
    "post",
    (
        NameMap(
            query="self_attn.query_proj",
            key="self_attn.key_proj",
            value="self_attn.value_proj",
            out="self_attn.out_proj",
            norm1="self_attn_layer_norm",
            up="feed_forward.intermediate",
            activation="feed_forward.activation_fn",
            down="feed_forward.output",
            norm2="feed_forward_layer_norm",
            heads="self_attn.num_attn_heads",
        ),
    ),
    extra_outputs=0,
    mask_by_head=True,
)

TVP = Adapter(
    "post",
    (
        NameMap(
            query="attention.query",
            key="attention.key",
            value="attention.value",
            out="attention.dense",
            norm1="attention.layer_norm",
            up="intermediate.dense",
            activation="intermediate.intermediate_act_fn",
            down="output.dense",
            norm2="output.layer_norm",
            heads="attention.num_attention_heads",
        ),
    ),
    extra_outputs=0,
)

TABLES: list[tuple[Adapter, dict[str, str]]] = [
    (
        BERT,
        {
            "bert.modeling_bert.BertLayer": "bert dpr",
            "roberta.modeling_roberta.RobertaLayer": "roberta",
            "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": "xlm-roberta",
            "electra.modeling_electra.ElectraLayer": "electra",
            "camembert.modeling_camembert.CamembertLayer": "camembert",
            "ernie.modeling_ernie.ErnieLayer": "ernie",
            "layoutlm.modeling_layoutlm.LayoutLMLayer": "layoutlm",
            "align.modeling_align.AlignTextLayer": "align align_text_model",
            "altclip.modeling_altclip.AltRobertaLayer": "altclip altclip_text_model",
            "bert_generation.modeling_bert_generation.BertGenerationLayer": "bert-generation",
            "bridgetower.modeling_bridgetower.BridgeTowerTextLayer": "bridgetower bridgetower_text_model",
            "chinese_clip.modeling_chinese_clip.ChineseCLIPTextLayer": "chinese_clip chinese_clip_text_model",
            "clap.modeling_clap.ClapTextLayer": "clap clap_text_model",
            "data2vec.modeling_data2vec_text.Data2VecTextLayer": "data2vec-text",
            "markuplm.modeling_markuplm.MarkupLMLayer": "markuplm",
            "roc_bert.modeling_roc_bert.RoCBertLayer": "roc_bert",
            "splinter.modeling_splinter.SplinterLayer": "splinter",
        },
    ),
    (
        BERT_TUPLE,
        {
            "visual_bert.modeling_visual_bert.VisualBertLayer": "visual_bert",
        },
    ),
    # Its logits are means over the cells of the table, of which one holds the question and the padding.
    (replace(BERT_TUPLE, padding_readers=("TapasForQuestionAnswering",)), {"tapas.modeling_tapas.TapasLayer": "tapas"}),
    # CANINE's outer layers attend inside chunks of characters: only the deep, global layers are this family. A convolution
    # over characters follows them.
    (
        replace(BERT_TUPLE, requires={"attention.local": False}, padding_is_read=True),
        {"canine.modeling_canine.CanineLayer": "canine"},
    ),
    (replace(BERT, extra_outputs=1), {"rembert.modeling_rembert.RemBertLayer": "rembert"}),
    (replace(BERT_TUPLE, keeps_hidden_states=True), {"lxmert.modeling_lxmert.LxmertLayer": "lxmert"}),
    (
        replace(BERT, decoder="GIT's text layers are a causal decoder"),
        {"git.modeling_git.GitLayer": "git"},
    ),
    (XMOD, {"xmod.modeling_xmod.XmodLayer": "xmod"}),
    (PROPHETNET, {"prophetnet.modeling_prophetnet.ProphetNetEncoderLayer": "prophetnet"}),
    (TVP, {"tvp.modeling_tvp.TvpEncodeLayer": "tvp"}),
    (DISTILBERT, {"distilbert.modeling_distilbert.TransformerBlock": "distilbert"}),
    (ALBERT, {"albert.modeling_albert.AlbertLayer": "albert"}),
    (
        BART,
        {
            "bart.modeling_bart.BartEncoderLayer": "bart",
            "marian.modeling_marian.MarianEncoderLayer": "marian",
            "blenderbot_small.modeling_blenderbot_small.BlenderbotSmallEncoderLayer": "blenderbot-small",
            "plbart.modeling_plbart.PLBartEncoderLayer": "plbart",
            "time_series_transformer.modeling_time_series_transformer.TimeSeriesTransformerEncoderLayer": (
                "time_series_transformer"
            ),
        },
    ),
    (replace(BART, extra_outputs=1), {"mvp.modeling_mvp.MvpEncoderLayer": "mvp"}),
    (
        replace(
            BART,
            clamp="none",
            extra_outputs=1,
            time_major=True,
            mask="encoder_padding_mask",
            mask_marks="padding",
        ),
        {"fsmt.modeling_fsmt.EncoderLayer": "fsmt"},
    ),
    (
        WAV2VEC2,
        {
            "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayer": "wav2vec2",
            "hubert.modeling_hubert.HubertEncoderLayer": "hubert",
            "data2vec.modeling_data2vec_audio.Data2VecAudioEncoderLayer": "data2vec-audio",
            "sew.modeling_sew.SEWEncoderLayer": "sew",
            "unispeech.modeling_unispeech.UniSpeechEncoderLayer": "unispeech",
            "unispeech_sat.modeling_unispeech_sat.UniSpeechSatEncoderLayer": "unispeech-sat",
        },
    ),
]
