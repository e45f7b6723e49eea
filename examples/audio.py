"""Speech features from wav2vec2 for recordings of different lengths, made fast.

    python examples/audio.py                      # a small model with random weights
    python examples/audio.py ./my-wav2vec2        # put your own folder here

The mask counts samples. The model makes frames of them, and the fast layers leave out the frames that are padding.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModel, Wav2Vec2Config, Wav2Vec2Model

from fastencoder import to_fast  # <- one

RATE = 16_000  # samples a second
SECONDS = (1.0, 0.4, 0.7)


def load(folder: str | None) -> torch.nn.Module:
    if folder is not None:
        return AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    torch.manual_seed(0)
    return Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            conv_dim=(32,) * 7,
            feat_extract_norm="layer",
            num_conv_pos_embeddings=16,
        )
    )


@torch.inference_mode()
def main(folder: str | None) -> None:
    model = to_fast(load(folder).eval())  # <- two

    # Made-up tones, padded as a feature extractor would: [B, samples] and a mask over the samples.
    lengths = torch.tensor([int(seconds * RATE) for seconds in SECONDS])
    time = torch.arange(int(lengths.max())) / RATE
    mask = torch.arange(len(time)) < lengths[:, None]
    samples = torch.sin(2 * torch.pi * 440 * time) * mask
    frames = model(input_values=samples, attention_mask=mask.long()).last_hidden_state
    print(f"{len(samples)} recordings -> frames {tuple(frames.shape)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
