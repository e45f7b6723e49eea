"""Reranking: a sequence classifier scores pairs of a question and a text, made fast.

    python examples/reranking.py                  # a small model with random weights: shows the calls, ranks nothing
    python examples/reranking.py ./my-reranker    # put your own folder here: a cross-encoder such as ms-marco-MiniLM-L6

With sentence-transformers the same line works on its own object: `to_fast(CrossEncoder(folder))`.
"""

from __future__ import annotations

import sys

import torch
from embedder import default_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from fastencoder import to_fast  # <- one

QUESTION = "How do I catch an error?"
TEXTS = [
    "A for statement iterates over the elements of a sequence.",
    "The try statement specifies exception handlers for a group of statements.",
    "A class definition makes a class object.",
]


def load(folder: str | None) -> tuple[torch.nn.Module, object]:
    if folder is not None:
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    small = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(default_folder(), local_files_only=True)  # a real one, of another model
    return BertForSequenceClassification(small), tokenizer


@torch.inference_mode()
def main(folder: str | None) -> None:
    model, tokenizer = load(folder)
    model = to_fast(model.eval())  # <- two

    # All pairs in one batch, each as long as it is: padding costs nothing.
    batch = tokenizer(
        [QUESTION] * len(TEXTS), TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    scores = model(**batch).logits[:, 0]
    for index in scores.argsort(descending=True).tolist():
        print(f"  {scores[index]:6.3f}  {TEXTS[index]}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
