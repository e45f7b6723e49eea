"""Whether code behind a stack of layers reads their hidden states at padding. Zeros there would change its answer."""

from __future__ import annotations

from torch import nn

from .registry import qualified_name
from .spec import Adapter

# Their pooled output is the hidden state of the last position, whether or not that is padding.
_TAKE_THE_LAST = frozenset(
    f"transformers.models.{name}"
    for name in ("siglip.modeling_siglip.SiglipTextModel", "siglip2.modeling_siglip2.Siglip2TextModel")
)
# Whoever decodes their frames decodes those of padding, too: transformers' pipeline does, and so does everybody who takes the
# likeliest letter of every frame.
FRAMES_ARE_DECODED = ("ForCTC",)
# Of the `summary_type`s that transformers' sequence summaries know, those that may read padding.
_SUMMARIES_OF_PADDING = ("last", "mean")


def something_reads_padding(name: str, modules: dict[str, nn.Module], adapter: Adapter) -> bool:
    """Whether a module of the model is known to read padding behind the layer at `name`.

    Args:
        name: path of the layer.
        modules: all modules of the model by path.
        adapter: the layer's; `padding_readers` are those that its family knows.
    """
    readers = (*adapter.padding_readers, *FRAMES_ARE_DECODED)
    if any(type(module).__name__.endswith(readers) for module in modules.values()):
        return True
    if any(getattr(module, "summary_type", "first") in _SUMMARIES_OF_PADDING for module in modules.values()):
        return True
    around = ("", *(name[:end] for end, letter in enumerate(name) if letter == "."))
    return any(qualified_name(type(modules[path])) in _TAKE_THE_LAST for path in around)
