"""Batches for a model: random ones with every kind of padding, of given lengths, of texts, or from a file."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_TOKENS = 24  # of the longest row of a random batch
_DECODER_TOKENS = 7  # fewer than any encoder's, so that the shapes can be told apart


class CannotMakeInputs(ValueError):
    """No inputs can be made up for this model. The message is one line for the user."""


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of a model.

    Args:
        name: what is special about it.
        inputs: the model's keyword arguments.
        real: bool `[B, S]`, which positions hold tokens; None: all of them do.
    """

    name: str
    inputs: dict[str, torch.Tensor] = field(repr=False)
    real: torch.Tensor | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """Real tokens, or, of inputs that have none, rows."""
        ids = self.inputs.get("input_ids")
        if self.real is not None:
            return int(self.real.sum())
        return ids.numel() if ids is not None else self.rows

    @property
    def rows(self) -> int:
        """Sequences, images or sounds."""
        return len(next(iter(self.inputs.values())))

    def to(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The arguments on a device, with what is floating in this dtype."""
        return {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in self.inputs.items()
        }


def ragged(model: Any, seed: int = 0) -> list[Batch]:
    """Random batches for a model, by what its `forward` calls its main input: text, images or sound.

    Text and sound come without padding, with padding on the right, on the left, with holes, and as one batch of all these with
    a row that is nothing but padding and a row of one token. Images have no padding, and come once.

    Raises:
        CannotMakeInputs: the model takes something else.
    """
    generator = torch.Generator().manual_seed(seed)
    make = _maker(model, generator)
    if model.main_input_name == "pixel_values":
        return [make("no padding", None)]
    size = min(_TOKENS, _positions(model) - 2)  # some models begin to count behind the padding token's index
    at, lengths = torch.arange(size), torch.randint(1, size, (4, 1), generator=generator)
    holes = torch.rand(4, size, generator=generator) < 0.6
    holes[:, 0] = True
    right, left = at < lengths, at >= size - lengths
    nothing, one = torch.zeros(1, size, dtype=torch.bool), at[None] < 1
    batches = [make("no padding", None), make("right padding", right)]
    if model.main_input_name == "input_ids":  # sound is only ever padded on the right
        mixed = torch.cat([left[:2], holes[:2], nothing, one])
        batches += [make("left padding", left), make("holes", holes), make("mixed, with an empty row", mixed)]
    return batches


def of_lengths(model: Any, lengths: Sequence[int], batch_size: int, seed: int = 0) -> list[Batch]:
    """Random text of these lengths in tokens, in batches in their order, padded on the right.

    Raises:
        CannotMakeInputs: the model takes no text, or not that long ones.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        raise CannotMakeInputs(
            f"lengths are of texts, and the main input of {type(model).__name__} is {model.main_input_name}"
        )
    if not lengths or min(lengths) < 1:
        raise CannotMakeInputs("every length is at least 1 token")
    if max(lengths) > _positions(model):
        raise CannotMakeInputs(f"{max(lengths)} tokens are more than the {_positions(model)} positions of the model")
    make = _maker(model, torch.Generator().manual_seed(seed))
    parts = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return [make(f"batch {i}", torch.arange(max(part)) < torch.tensor(part)[:, None]) for i, part in enumerate(parts)]


def of_images(model: Any, count: int, batch_size: int, seed: int = 0) -> list[Batch]:
    """`count` random images in batches. Raises CannotMakeInputs if the model takes none."""
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise CannotMakeInputs(f"{type(model).__name__} takes no images: give --texts or --lengths")
    shape = _image_shape(model.config)
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    return [
        Batch(f"batch {i}", {"pixel_values": torch.randn(n, *shape, generator=generator)}) for i, n in enumerate(sizes)
    ]


def of_texts(tokenizer: Any, texts: Sequence[str], batch_size: int, longest: int) -> list[Batch]:
    """Texts in batches in their order, each padded to its longest text and cut at `longest` tokens."""
    batches: list[Batch] = []
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        inputs = dict(tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt"))
        batches.append(Batch(f"batch {len(batches)}", inputs, inputs["attention_mask"].bool()))
    return batches


def from_file(path: Path) -> list[Batch]:
    """One batch from a safetensors file of tensors that are named as the model's arguments.

    Raises:
        CannotMakeInputs: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        inputs = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CannotMakeInputs(f"cannot read '{path}': {error}") from error
    if not inputs:
        raise CannotMakeInputs(f"there is no tensor in '{path}'")
    mask = inputs.get("attention_mask")
    return [Batch(path.name, inputs, mask.bool() if mask is not None and mask.dim() == 2 else None)]


Make = Callable[[str, torch.Tensor | None], Batch]


def _maker(model: Any, generator: torch.Generator) -> Make:
    """What makes a batch with a given padding, tried out: with the main input alone, else with all that are known."""
    main = getattr(model, "main_input_name", "input_ids")
    known = {"input_ids": _text, "pixel_values": _image, "input_values": _sound, "input_features": _spectrum}
    if main not in known:
        raise CannotMakeInputs(
            f"no inputs can be made up for {type(model).__name__}, which wants {main}: give --inputs"
        )
    taken = inspect.signature(model.forward).parameters
    every = [main, *(name for name in known if name in taken and name != main)]
    problem: Exception | None = None
    for wanted in dict.fromkeys([(main,), tuple(every)]):

        def make(name: str, real: torch.Tensor | None, wanted: tuple[str, ...] = wanted) -> Batch:
            rows = 3 if real is None else len(real)
            inputs: dict[str, torch.Tensor] = {}
            for argument in wanted:
                made, positions = known[argument](model, rows, real if argument == main else None, generator)
                inputs |= made
                real = positions if argument == main else real
            if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
                inputs["decoder_input_ids"] = torch.randint(
                    5, _vocabulary(model), (rows, _DECODER_TOKENS), generator=generator
                )
            return Batch(name, inputs, real)

        try:
            _run_quietly(model, make("a try", None))
            return make
        except CannotMakeInputs as error:
            problem = problem or error
        except Exception as error:
            problem = error
    said = str(problem).strip().splitlines() or [""]
    raise CannotMakeInputs(
        f"{type(model).__name__} did not run on made-up inputs ({type(problem).__name__}: {said[0][:200]}): give --inputs"
    )


@torch.inference_mode()
def _run_quietly(model: Any, batch: Batch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**batch.to(model.dtype, model.device))


Made = tuple[dict[str, torch.Tensor], torch.Tensor | None]


def _text(model: Any, rows: int, real: torch.Tensor | None, generator: torch.Generator) -> Made:
    size = min(_TOKENS, _positions(model) - 2) if real is None else real.shape[1]
    padding = getattr(model.config, "pad_token_id", None)
    ids = torch.randint(5, _vocabulary(model), (rows, size), generator=generator)
    if padding is not None:
        ids[ids == padding] = 5 if padding != 5 else 6
    if real is None:
        return {"input_ids": ids}, None
    if padding is not None and padding >= 0:
        ids[~real] = padding
    return {"input_ids": ids, "attention_mask": real.long()}, real


def _image(model: Any, rows: int, real: torch.Tensor | None, generator: torch.Generator) -> Made:
    return {"pixel_values": torch.randn(rows, *_image_shape(model.config), generator=generator)}, None


def _sound(model: Any, rows: int, real: torch.Tensor | None, generator: torch.Generator) -> Made:
    """Samples for convolutions, or a spectrogram `[frames, bins]` for models that say how long theirs is."""
    config = model.config
    if not hasattr(config, "conv_stride"):
        bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
        if bins is None or frames is None:
            raise CannotMakeInputs("the config does not say how long a sound is")
        return {"input_values": torch.randn(rows, frames, bins, generator=generator)}, None
    stride = math.prod(config.conv_stride)
    samples = (_TOKENS + 1) * stride
    sound = torch.randn(rows, samples, generator=generator)
    if real is None:
        return {"input_values": sound}, None
    mask = (torch.arange(samples) < (real.sum(1) + 2)[:, None] * stride).long()
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
    return {"input_values": sound, "attention_mask": mask}, model._get_feature_vector_attention_mask(
        frames, mask
    ).bool()


def _spectrum(model: Any, rows: int, real: torch.Tensor | None, generator: torch.Generator) -> Made:
    config = getattr(model.config, "audio_config", model.config)
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if bins is None or positions is None:
        raise CannotMakeInputs("the config does not say how long a sound is")
    return {"input_features": torch.randn(rows, bins, 2 * positions, generator=generator)}, None


def _image_shape(config: Any) -> tuple[int, int, int]:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise CannotMakeInputs("the config does not say how large an image is")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return getattr(config, "num_channels", 3), height, width


def _vocabulary(model: Any) -> int:
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        raise CannotMakeInputs("its vocabulary is not known") from None


def _positions(model: Any) -> int:
    """Tokens of the longest text, as far as the config says."""
    config = getattr(model.config, "text_config", model.config)
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else 1 << 20
