"""LoRA on a fast model: the adapter is a part of the layer that is called as it is, and can be switched off and merged.

pip install peft
python examples/lora.py                       # all-MiniLM-L6-v2 with an adapter that nobody trained
python examples/lora.py ./my-model            # put your own folder here; PeftModel.from_pretrained(model, "./adapter")
"""

from __future__ import annotations

import sys

import torch
from embedder import default_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

from fastencoder import explain, to_fast  # <- one

TEXTS = ["How do I catch an error?", "The try statement specifies exception handlers."]


@torch.inference_mode()
def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    # init_lora_weights=False: an untrained adapter that changes the answers, to see it at work.
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"], init_lora_weights=False)).eval()
    model = to_fast(model)  # <- two
    print(explain(model).summary())

    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    adapted = model(**batch).last_hidden_state
    with model.disable_adapter():
        plain = model(**batch).last_hidden_state
    merged = model.merge_and_unload()  # the adapter is in the weights now: plain layers, faster still
    print(f"the adapter changes the answers by {float((adapted - plain).norm() / plain.norm()):.2f}")
    difference = (merged(**batch).last_hidden_state - adapted).norm() / adapted.norm()
    print(f"merged, they are the same up to {float(difference):.0e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else default_folder())
