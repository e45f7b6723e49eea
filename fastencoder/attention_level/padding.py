"""Whether the real tokens of a model depend on what its hidden states are at padding.

A converted attention answers zero at padding, where the original answers something finite. Attention never looks there, but a
convolution, a pooling or the capacity of an expert may: the convolutions of wav2vec2-conformer do, those of w2v-BERT mask it
first. So padding is left out only in the classes that are listed here. The code around them was read, and a test puts other
values at padding and sees nothing change (`tests/test_attention_level.py`).
"""

from __future__ import annotations

from torch import nn

_PACKAGE = "transformers.models."
# Attention classes of layers that keep padding to itself, up to the end of their list of layers.
KEEPS_PADDING_APART = frozenset(
    f"{_PACKAGE}{name}"
    for name in (
        "blip_2.modeling_blip_2.Blip2QFormerMultiHeadAttention",
        "detr.modeling_detr.DetrSelfAttention",
        "dia.modeling_dia.DiaSelfAttention",
        "fun_asr_nano.modeling_fun_asr_nano.FunAsrNanoAttention",
        "instructblip.modeling_instructblip.InstructBlipQFormerMultiHeadAttention",
        "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoQFormerMultiHeadAttention",
        "lasr.modeling_lasr.LasrEncoderAttention",
        "mobilebert.modeling_mobilebert.MobileBertSelfAttention",
        "pop2piano.modeling_pop2piano.Pop2PianoAttention",
        "seamless_m4t.modeling_seamless_m4t.SeamlessM4TAttention",
        "seamless_m4t.modeling_seamless_m4t.SeamlessM4TConformerSelfAttention",
        "seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2Attention",
        "seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2ConformerSelfAttention",
        "udop.modeling_udop.UdopAttention",
        "wav2vec2_bert.modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention",
        "xmod.modeling_xmod.XmodSelfAttention",
    )
)

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NEIGHBOURS = (
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.Fold,
    nn.GroupNorm,
    nn.RNNBase,
    nn.Unfold,
    nn.Upsample,
)
_NEIGHBOURS_BY_NAME = ("TDNNLayer",)  # a convolution whose weights sit in a linear


def what_reads_padding(
    name: str, attention_class: type[nn.Module], modules: dict[str, nn.Module]
) -> str | None:
    """Why padding must stay in the attention of this module, or None if it can be left out.

    Args:
        name: path of the attention module.
        attention_class: its own class.
        modules: all modules of the model, in order of registration, which is taken for the order in which they run.
    """
    if f"{attention_class.__module__}.{attention_class.__qualname__}" not in KEEPS_PADDING_APART:
        return f"whether anything reads the hidden states of a {attention_class.__name__} at padding is not known"
    layers = _list_around(name, modules) + "."
    for other, module in modules.items():
        if (other.startswith(layers) or layers.startswith(f"{other}.") and other) and not _is_own_code(module):
            return f"{other}, a {type(module).__name__} of {type(module).__module__}, may read the hidden states at padding"
    names = list(modules)
    last = max(index for index, other in enumerate(names) if other == name or other.startswith(layers))
    for other in names[last + 1 :]:
        if _mixes_neighbours(modules[other]):
            return f"{other}, a {type(modules[other]).__name__} behind the layers, reads the hidden states at padding"
    return None


def _list_around(name: str, modules: dict[str, nn.Module]) -> str:
    """The path of the list of layers that a module is in; its own path if it is in none."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path and isinstance(modules[path], nn.ModuleList) and not isinstance(_parent(path, modules), nn.ModuleList):
            return path
    return name


def _parent(path: str, modules: dict[str, nn.Module]) -> nn.Module:
    return modules[path.rpartition(".")[0]]


def _is_own_code(module: nn.Module) -> bool:
    """Whether a module runs code of transformers or torch, or of PEFT, which adapts tokens one by one."""
    ours = ("transformers", "torch", "peft", "fastencoder")
    return type(module).__module__.partition(".")[0] in ours and "forward" not in vars(module)


def _mixes_neighbours(module: nn.Module) -> bool:
    if isinstance(module, _CONVOLUTIONS):
        return any(size > 1 for size in module.kernel_size)
    return isinstance(module, _NEIGHBOURS) or type(module).__name__.endswith(_NEIGHBOURS_BY_NAME)
