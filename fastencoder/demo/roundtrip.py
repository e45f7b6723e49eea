"""The way back: ``reverse``, ``save_pretrained``, reload; every tensor compared bit for bit."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass

import torch
from transformers import AutoModel, PreTrainedModel

import fastencoder
from fastencoder.demo.data import Batch


@dataclass(frozen=True)
class Step:
    """One thing that was done, and how many of the original's tensors came out of it bit for bit equal."""

    what: str
    equal: int
    tensors: int
    same_names: bool

    @property
    def passed(self) -> bool:
        """Every tensor is there under its name, with the same bits, and none besides."""
        return self.same_names and self.equal == self.tensors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and bits; unlike ``==``, a NaN equals itself and 0.0 differs from -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(raw[0], raw[1])


def check(model: PreTrainedModel, batch: Batch) -> list[Step]:
    """Convert a copy of ``model``, use it, and take it back; ``model`` itself is not changed."""
    net = copy.deepcopy(model)
    before = {key: value.detach().clone() for key, value in net.state_dict().items()}
    answer = net(**batch.inputs).last_hidden_state

    def step(what: str, now: dict[str, torch.Tensor]) -> Step:
        equal = sum(key in now and same_bits(value, now[key]) for key, value in before.items())
        return Step(what, equal, len(before), now.keys() == before.keys())

    def saved_and_reloaded() -> dict[str, torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            loaded = AutoModel.from_pretrained(
                folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
            return {key: value.clone() for key, value in loaded.state_dict().items()}

    fastencoder.to_fast(net)
    net(**batch.inputs)
    steps = [step("save_pretrained while fast, reload: weights", saved_and_reloaded())]
    fastencoder.reverse(net)
    steps.append(step("reverse: weights", net.state_dict()))
    again = net(**batch.inputs).last_hidden_state
    steps.append(Step("reverse: answers on the first batch", int(same_bits(answer, again)), 1, True))
    steps.append(step("reverse, save_pretrained, reload: weights", saved_and_reloaded()))
    return steps
