"""Which encoder layer classes the models of the installed transformers are made of, and what fastencoder does with each.

    python -m tools.survey docs/models.json [MODEL_TYPE ...]

builds every model type from its default config on the meta device, asks `explain`, and writes what it found (a few minutes).
With model types, only these are surveyed, and the rest of the file stays. `python -m tools.models_page` makes the page of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SECONDS = 120  # for one model type: some default configs are enormous even without weights


def survey_of(model_type: str) -> dict[str, list[str]] | str:
    """For each layer class of a model type `[level or "", status, reason]`; or why the model cannot be built."""
    import torch
    from transformers import AutoModel

    import fastencoder
    from fastencoder.cli.common import quiet
    from fastencoder.cli.loading import ModelNotFound, any_class_of, default_config

    quiet()
    warnings.simplefilter("ignore")
    try:
        config = default_config(model_type)
        with torch.device("meta"):
            try:
                model = AutoModel.from_config(config)
            except Exception:
                model_class = any_class_of(config)
                if model_class is None:
                    raise
                model = model_class._from_config(config)
    except ModelNotFound as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    found: dict[str, list[str]] = {}
    for row in fastencoder.explain(model):
        reason = "; ".join(row.reasons)
        level = row.level or ""
        known = found.get(row.layer_class)
        if known is None or (level and not known[0]):
            found[row.layer_class] = [level, row.status, reason]
    return found


def _answer(model_type: str, results: Any) -> None:
    results.put(survey_of(model_type))


def _within_time(model_type: str) -> dict[str, list[str]] | str:
    """In a process of its own, which may be ended."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    worker = context.Process(target=_answer, args=(model_type, results))
    worker.start()
    worker.join(_SECONDS)
    if worker.is_alive():
        worker.terminate()
        return f"took more than {_SECONDS} seconds to build"
    return "the process ended early" if results.empty() else results.get()


def main() -> None:
    import torch
    import transformers
    from rich.progress import track
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    import fastencoder  # noqa: F401  (imported once, before the processes are made)

    path, wanted = Path(sys.argv[1]), sys.argv[2:] or sorted(CONFIG_MAPPING_NAMES)
    known = json.loads(path.read_text()) if path.is_file() and sys.argv[2:] else {"models": {}, "not built": {}}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = list(track(pool.map(_within_time, wanted), description="model types", total=len(wanted)))
    for model_type, answer in zip(wanted, answers, strict=True):
        known["models"].pop(model_type, None)
        known["not built"].pop(model_type, None)
        if isinstance(answer, str):
            known["not built"][model_type] = answer
        elif answer:
            known["models"][model_type] = answer
    known["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
