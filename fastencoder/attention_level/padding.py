"""Whether the real tokens of a model depend on what its hidden states are at padding.

A converted attention answers zero at padding, where the original answers something finite. Attention never looks there, but a
convolution, a pooling or the capacity of an expert may: the convolutions of wav2vec2-conformer do, those of w2v-BERT mask it
first. So padding is left out only in the layers that are listed here. The code around them was read, and a test puts other
values at padding and sees nothing change (`tests/test_attention_level.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..instance_forward import is_patched
from ..padding_readers import FRAMES_ARE_DECODED
from ..registry import qualified_name

_PACKAGE = "transformers.models."
# Layer classes that keep padding to itself, from one to the next.
KEEPS_PADDING_APART = frozenset(
    f"{_PACKAGE}{name}"
    for name in (
        "blip_2.modeling_blip_2.Blip2QFormerLayer",
        "dia.modeling_dia.DiaEncoderLayer",
        "fun_asr_nano.modeling_fun_asr_nano.FunAsrNanoEncoderLayer",
        "instructblip.modeling_instructblip.InstructBlipQFormerLayer",
        "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoQFormerLayer",
        "lasr.modeling_lasr.LasrEncoderBlock",
        "mobilebert.modeling_mobilebert.MobileBertLayer",
        "seamless_m4t.modeling_seamless_m4t.SeamlessM4TConformerEncoderLayer",
        "seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2ConformerEncoderLayer",
        "wav2vec2_bert.modeling_wav2vec2_bert.Wav2Vec2BertEncoderLayer",
        "xmod.modeling_xmod.XmodLayer",
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


def what_reads_padding(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why padding must stay in the attention of a module, or None if it can be left out.

    Args:
        name: path of the attention module.
        modules: all modules of the model, in order of registration, which is taken for the order in which they run.
    """
    elements = [path for path in ancestors(name) if path.rpartition(".")[2].isdigit()]
    layer = next((path for path in elements if qualified_name(type(modules[path])) in KEEPS_PADDING_APART), None)
    if layer is None:
        what = type(modules[elements[0]] if elements else modules[name]).__name__
        return f"whether anything reads the hidden states of a {what} at padding is not known"
    layers = layer.rpartition(".")[0] + "."
    for module in modules.values():
        if type(module).__name__.endswith(FRAMES_ARE_DECODED):
            return f"who decodes the answer of {type(module).__name__} reads the frames of padding"
    for other, module in modules.items():
        if other.startswith(layers) and not _is_own_code(module):
            return f"{other}, a {type(module).__name__} of {type(module).__module__}, may read the hidden states at padding"
    names = list(modules)
    last = max(index for index, other in enumerate(names) if other.startswith(layers))
    for other in names[last + 1 :]:
        if _mixes_neighbours(modules[other]):
            return f"{other}, a {type(modules[other]).__name__} behind the layers, reads the hidden states at padding"
    return None


def ancestors(name: str) -> Iterator[str]:
    """The paths of the modules around a module, the nearest first, down to "" for the whole model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_own_code(module: nn.Module) -> bool:
    """Whether a module runs code of transformers or torch, or of PEFT, which adapts tokens one by one."""
    ours = ("transformers", "torch", "peft", "fastencoder")
    return type(module).__module__.partition(".")[0] in ours and not is_patched(module)


def _mixes_neighbours(module: nn.Module) -> bool:
    if isinstance(module, _CONVOLUTIONS):
        return any(size > 1 for size in module.kernel_size)
    return isinstance(module, _NEIGHBOURS) or type(module).__name__.endswith(_NEIGHBOURS_BY_NAME)
