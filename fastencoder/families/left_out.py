"""Encoder layer classes of transformers that are no fast layer, each with the reason.

A class that is registered is not listed here. Some of these still run their attention on packed tokens (the attention level).
"""

from __future__ import annotations

_MODELS = "transformers.models"

# Reason -> "package.Class" (in the package's modeling file).
_REASONS: dict[str, str] = {
    "attends to chosen tokens only (windows with global tokens, random blocks, hashed or sampled neighbours), which is another "
    "computation than attention inside a sequence": (
        "longformer.LongformerLayer led.LEDEncoderLayer big_bird.BigBirdLayer bigbird_pegasus.BigBirdPegasusEncoderLayer "
        "longt5.LongT5Block mra.MraLayer reformer.ReformerLayer yoso.YosoLayer pegasus_x.PegasusXEncoderLayer "
        "informer.InformerEncoderLayer"
    ),
    "approximates attention by landmarks that average over the padded row": "nystromformer.NystromformerLayer",
    "computes autocorrelation over the whole row by a Fourier transform, in place of attention": (
        "autoformer.AutoformerEncoderLayer"
    ),
    "mixes tokens by a Fourier transform over the whole padded row, and has no attention": "fnet.FNetLayer",
    "mixes neighbouring tokens by a convolution beside its attention": "convbert.ConvBertLayer",
    "pools the sequence between its layers, and attends with relative positions of its own": "funnel.FunnelLayer",
    "has two streams of tokens with attention of their own in every layer": (
        "lilt.LiltLayer luke.LukeLayer xlnet.XLNetLayer lxmert.LxmertXLayer"
    ),
    "has bottlenecks around its attention and several feed-forward blocks, in a program of its own": (
        "mobilebert.MobileBertLayer"
    ),
    "projects by grouped convolutions, with the channels first": "squeezebert.SqueezeBertModule",
    "works on integers between its projections (quantisation-aware training)": "ibert.IBertLayer",
    "samples a few points around each token on several feature maps (deformable attention), in place of attention": (
        "deformable_detr.DeformableDetrEncoderLayer grounding_dino.GroundingDinoDeformableLayer "
        "mask2former.Mask2FormerPixelDecoderEncoderLayer mm_grounding_dino.MMGroundingDinoDeformableLayer "
        "oneformer.OneFormerPixelDecoderEncoderLayer"
    ),
    "shrinks keys and values by a convolution over the image, so that they are other tokens than the queries": (
        "segformer.SegformerLayer glpn.GLPNLayer pvt.PvtLayer pvt_v2.PvtV2BlockLayer cvt.CvtLayer"
    ),
    "pools queries between layers, so that their number changes inside a layer": "hiera.HieraLayer sam2.Sam2MultiScaleBlock",
    "has convolutions between attention and feed-forward block": (
        "florence2.Florence2VisionBlock florence2.Florence2VisionSpatialBlock florence2.Florence2VisionChannelBlock "
        "swiftformer.SwiftFormerEncoderBlock "
        "mobilevitv2.MobileViTV2TransformerLayer levit.LevitResidualLayer"
    ),
    "attends to a neighbourhood of each pixel (natten)": "dinat.DinatLayer",
    "attends over time and over space in turn, and mixes frames in between": (
        "timesformer.TimesformerLayer x_clip.XCLIPVisionEncoderLayer"
    ),
    "returns its attention weights whether or not they are asked for": (
        "grounding_dino.GroundingDinoTextEnhancerLayer mm_grounding_dino.MMGroundingDinoTextEnhancerLayer"
    ),
    "attends over patches and over channels in turn, with batch norms": "patchtst.PatchTSTEncoderLayer",
    "exchanges aggregated tokens between two images": "efficientloftr.EfficientLoFTRLocalFeatureTransformerLayer",
    "routes tokens to experts with a capacity that depends on the whole batch": (
        "switch_transformers.SwitchTransformersBlock openai_privacy_filter.OpenAIPrivacyFilterEncoderLayer"
    ),
    "sees other tokens by their kind: image tokens one another, queries also those before them": (
        "deepseek_ocr2.DeepseekOcr2VisionEncoderLayer"
    ),
    "updates representations of pairs of residues": "esmfold2.EsmFold2MSAEncoderLayer esmfold2.EsmFold2PairUpdateLayer",
    "is a stack of causal convolutions, and has no attention": "muse_spark.MuseSparkAudioLayer",
    "rotates its values as well as its queries and keys": "clvp.ClvpEncoderLayer",
    "is a causal decoder unless its caller builds another mask": (
        "gemma.GemmaDecoderLayer diffusion_gemma.DiffusionGemmaEncoderTextLayer"
    ),
    "has norms that depend on another input, and a gated output": (
        "esmfold2.EsmFold2AtomLayer esmfold2.EsmFold2DiffusionLayer"
    ),
    "attends to other tokens between its self-attention and its feed-forward block: the prompt of a detector, or the image": (
        "sam3.Sam3DetrEncoderLayer sam3.Sam3GeometryEncoderLayer sam3_lite_text.Sam3LiteTextDetrEncoderLayer "
        "sam3_lite_text.Sam3LiteTextGeometryEncoderLayer"
    ),
    "attends to a memory of earlier frames between its self-attention and its feed-forward block": (
        "edgetam_video.EdgeTamVideoMemoryAttentionLayer sam2_video.Sam2VideoMemoryAttentionLayer "
        "sam3_tracker_video.Sam3TrackerVideoMemoryAttentionLayer"
    ),
    "has latent vectors for queries, and the tokens beside them for keys: cross-attention": (
        "edgetam_video.EdgeTamVideoPerceiverEncoderLayer idefics2.Idefics2PerceiverLayer"
    ),
    "is the cross-attention of latent vectors to an image, and no layer": (
        "kosmos2.KosmosTextAttention kosmos2_5.Kosmos2_5TextAttention"
    ),
    "is the attention of a module that merges neighbouring patches between two layers, and no layer; the layers are fast": (
        "minicpm_ocr.MiniCPMOcrVisionAttention minicpmv4_6.MiniCPMV4_6VisionAttention minicpmv4_7.MiniCPMV4_7VisionAttention"
    ),
    "is the cross-attention that pools the patches of an image or of a video, and no layer; the layers are fast": (
        "molmo2.Molmo2VisionAttention videoprism.VideoPrismMultiheadAttentionPoolingHead"
    ),
    "mixes the first hidden states into every layer, with value embeddings and gates": "neomme.NeoMMEEncoderLayer",
    "routes tokens to experts in some of its layers, with a capacity that depends on the whole batch": (
        "nllb_moe.NllbMoeEncoderLayer"
    ),
    "takes masks between pairs of words, and adds positions to queries and keys": (
        "grounding_dino.GroundingDinoTextEnhancerLayer mm_grounding_dino.MMGroundingDinoTextEnhancerLayer"
    ),
    "has a convolution over frames between its attention and its second feed-forward block (a conformer)": (
        "wav2vec2_conformer.Wav2Vec2ConformerEncoderLayer wav2vec2_bert.Wav2Vec2BertEncoderLayer "
        "parakeet.ParakeetEncoderBlock fastspeech2_conformer.FastSpeech2ConformerEncoderLayer "
        "fun_asr_nano.FunAsrNanoEncoderLayer gemma3n.Gemma3nAudioConformerBlock gemma4.Gemma4AudioLayer "
        "granite_speech.GraniteSpeechConformerBlock granite_speech5.GraniteSpeech5EncoderSubsamplingBlock "
        "granite_speech5.GraniteSpeech5EncoderBlock granite_speech_plus.GraniteSpeechPlusConformerBlock "
        "lasr.LasrEncoderBlock nemotron_asr_streaming.NemotronAsrStreamingEncoderBlock "
        "seamless_m4t.SeamlessM4TConformerAdapterLayer seamless_m4t.SeamlessM4TConformerEncoderLayer "
        "seamless_m4t_v2.SeamlessM4Tv2ConformerAdapterLayer seamless_m4t_v2.SeamlessM4Tv2ConformerEncoderLayer "
        "vits.VitsEncoderLayer"
    ),
}


def _table() -> dict[str, str]:
    found = {}
    for reason, classes in _REASONS.items():
        for name in classes.split():
            package, _, cls = name.partition(".")
            found[f"{_MODELS}.{package}.modeling_{package}.{cls}"] = reason
    return found


# Qualified class name -> why there is no fast layer of it.
LEFT_OUT: dict[str, str] = _table()
