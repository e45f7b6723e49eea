"""Use a fast model, give the original back, save it, load it: every tensor has the bits that it had.

    python examples/save_after_reverse.py         # all-MiniLM-L6-v2
    python examples/save_after_reverse.py ./my-model     # put your own folder here

Saving while the model is fast writes the same file; `reverse` is not needed for that.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from embedder import default_folder
from transformers import AutoModel

from fastencoder import reverse, to_fast


def main(folder: str) -> None:
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    to_fast(model)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[101, 2129, 102]]))
    reverse(model)

    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        loaded = AutoModel.from_pretrained(saved, local_files_only=True, use_safetensors=True).state_dict()
    equal = sum(torch.equal(tensor, loaded[name]) for name, tensor in before.items())
    print(f"{equal} of {len(before)} tensors are equal, bit for bit")
    if equal != len(before) or loaded.keys() != before.keys():
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else default_folder())
