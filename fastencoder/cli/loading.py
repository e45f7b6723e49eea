"""What MODEL means: a local folder, or a model type of transformers.

Nothing is ever downloaded, only safetensors files are read, and a model's own code is never run.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import first_line, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MOST_BYTES = 8 * 2**30  # of a model that is given memory


class ModelNotFound(ValueError):
    """MODEL is neither a usable local folder nor the name of a model type. The message is one line for the user."""


def load_model(name: str, to_run: bool = False) -> tuple[PreTrainedModel, list[str]]:
    """The model that `name` means, and remarks for the user about how it was made.

    A folder gives the model class that its config names, with the weights of its safetensors files. Without such files,
    and for the name of a model type, the model has the right modules, dtypes and sizes. Its memory was never written to,
    which is good for looking at; with `to_run` it has random weights (`checks.weights.draw`).

    Raises: ModelNotFound.
    """
    quiet()
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _from_folder(folder, to_run)
    if folder.is_file():
        raise ModelNotFound(f"'{name}' is a file; MODEL is a folder with config.json, or a model type such as bert")
    config = default_config(name)
    return _without_weights(config, None, to_run), [f"default {type(config).__name__}; the weights are not real"]


def _from_folder(folder: Path, to_run: bool) -> tuple[PreTrainedModel, list[str]]:
    import transformers

    if not (folder / "config.json").is_file():
        inner = [path.parent for path in sorted(folder.glob("*/config.json"))]
        hint = f"; did you mean '{inner[0]}'?" if inner else ""
        raise ModelNotFound(f"there is no config.json in '{folder}'{hint}")
    notes = []
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelNotFound(f"cannot read '{folder / 'config.json'}': {first_line(error)}") from error
    if raw.get("auto_map"):
        notes.append("config.json asks for code of its own, which is never run; this is transformers' class")
    name = (getattr(config, "architectures", None) or [None])[0]
    model_class = getattr(transformers, name, None) if name else None
    if name and model_class is None:
        notes.append(f"transformers has no {name}; the bare model is explained")
    if any(folder.glob("*.safetensors")):
        try:
            net = (model_class or transformers.AutoModel).from_pretrained(
                folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise ModelNotFound(f"cannot load '{folder}': {first_line(error)}") from error
        return net.eval(), notes
    notes.append("no safetensors files; the weights are not real")
    return _without_weights(config, model_class, to_run), notes


def default_config(name: str) -> PretrainedConfig:
    """The default config of a model type (`xlm-roberta`) or a config class (`BertConfig`), in any case."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = {key.lower().replace("_", "-"): key for key in CONFIG_MAPPING_NAMES}
    wanted = name.lower().replace("_", "-")
    key = known.get(wanted)
    if key is None:
        classes = {str(value).lower(): key for key, value in CONFIG_MAPPING_NAMES.items()}
        key = classes.get(name.lower())
    if key is None:
        close = [known[match] for match in difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        if "/" in name or os.sep in name:
            hint = "; models are not downloaded, so give a folder on this machine"
        raise ModelNotFound(f"'{name}' is neither a folder nor a model type of transformers{hint}")
    try:
        return CONFIG_MAPPING[key]()
    except Exception as error:
        raise ModelNotFound(f"'{name}' has no default config: {first_line(error)}") from error


def _without_weights(config: PretrainedConfig, model_class: Any, to_run: bool) -> PreTrainedModel:
    """A model whose memory is reserved and never written: a model of gigabytes costs little. Larger ones stay on the meta
    device. With `to_run` it has random weights, or is refused if it is that large."""
    import torch
    import transformers

    try:
        if model_class is None and type(config) not in transformers.MODEL_MAPPING:
            model_class = any_class_of(config)
        build = model_class._from_config if model_class else transformers.AutoModel.from_config
        with torch.device("meta"):
            net = build(config)
        size = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
        if to_run and size <= _MOST_BYTES:
            from ..checks.weights import draw

            net = build(config)
            draw(net)
        elif size <= _MOST_BYTES:
            net = net.to_empty(device="cpu")
    except Exception as error:
        raise ModelNotFound(f"cannot build a model from {type(config).__name__}: {first_line(error)}") from error
    if to_run and size > _MOST_BYTES:
        raise ModelNotFound(
            f"random weights of {type(config).__name__} take {size / 2**30:.0f} GiB; give a folder with a smaller one"
        )
    return net.eval()


def any_class_of(config: PretrainedConfig) -> Any:
    """A model class for a config that AutoModel does not know, such as the text half of a two-tower model; or None."""
    from transformers import PreTrainedModel

    modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    found = [
        value
        for name, value in vars(modeling).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and not name.endswith("PreTrainedModel")
        if getattr(value, "config_class", None) is type(config)
    ]
    return min(found, key=lambda value: (not value.__name__.endswith("Model"), len(value.__name__)), default=None)
