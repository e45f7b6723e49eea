"""Files that a user may have copied out of transformers: BERT's layers and their loop under other names, changed or not."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from fastencoder.fingerprints.normalised import closure

from .conformance.weights import sharpen
from .tiny import SIZES

HEAD = '''"""Copied."""
from __future__ import annotations
import torch
import torch.nn as nn
from collections.abc import Callable
from transformers import pytorch_utils
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer as Layer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
'''

TAIL = '''
class MineModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = MineEncoder(config)

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        return self.encoder(x, attention_mask=mask).last_hidden_state
'''


def source() -> str:
    """The closure of BertEncoder, renamed, its definitions in another order, without comments and blank lines."""
    parts = closure("transformers.models.bert.modeling_bert", "BertEncoder").parts
    body = "\n".join(ast.unparse(file.definitions[name][0]) for file, name in reversed(parts))
    body = body.replace("Bert", "Mine").replace("GradientCheckpointingLayer", "Layer")
    body = body.replace("apply_chunking_to_forward", "pytorch_utils.apply_chunking_to_forward")
    return HEAD + body + TAIL


@contextmanager
def module(folder: Path, text: str, name: str = "copied_encoder") -> Iterator[ModuleType]:
    """The text as a module, imported from a file in `folder`."""
    folder.joinpath(f"{name}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


def model(copied: ModuleType) -> torch.nn.Module:
    """A tiny model of the file's own classes."""
    from transformers import BertConfig

    config = BertConfig(vocab_size=99, **SIZES)
    config._attn_implementation = "sdpa"
    made = copied.MineModel(config).eval()
    sharpen(made)
    return made
