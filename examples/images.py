"""Image features from a vision transformer, made fast.

    python examples/images.py                     # a small ViT with random weights
    python examples/images.py ./my-vit            # put your own folder here: ViT, DINOv2, SigLIP's vision tower, ...

Images have no padding to drop, so what there is to gain is in the fused kernels alone.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModel, ViTConfig, ViTModel

from fastencoder import to_fast  # <- one


def load(folder: str | None) -> torch.nn.Module:
    if folder is not None:
        return AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(
            image_size=64,
            patch_size=16,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        )
    )


@torch.inference_mode()
def main(folder: str | None) -> None:
    model = to_fast(load(folder).eval())  # <- two

    # Two made-up images as an image processor would give them: [B, C, H, W], normalised.
    size = model.config.image_size
    images = torch.rand(2, model.config.num_channels, size, size) * 2 - 1
    features = model(pixel_values=images).last_hidden_state
    print(f"{len(images)} images -> features {tuple(features.shape)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
