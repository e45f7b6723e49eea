"""Bundles: they hold what a model asks for and nothing else, Triton compiles nothing with one, and damage is refused.

Without a GPU, Triton's launcher runs up to the point where it would launch. The kernels of this process may be interpreted, so
other processes do it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, DistilBertConfig, ViTConfig

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90")
BOUNDS = {"max_tokens": 18, "max_seqlen": 17}
# One layer each, of the real width.
MODELS = {
    "bert": BertConfig(num_hidden_layers=1, vocab_size=100),
    "vit": ViTConfig(num_hidden_layers=1),
    "distilbert": DistilBertConfig(n_layers=1, vocab_size=100),
}


def process(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    hidden = ("TRITON_INTERPRET", "FASTENCODER_BUNDLE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {"TRITON_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)


def call(function: str, cache: Path, **arguments: Any) -> Any:
    script = Path(__file__).with_name("bundle_process.py")
    done = process(str(script), function, json.dumps(arguments), cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compile_bundle(model: str, out: Path, cache: Path, *more: str) -> subprocess.CompletedProcess:
    options = [f"--max-tokens={BOUNDS['max_tokens']}", f"--max-seqlen={BOUNDS['max_seqlen']}", *more]
    return process("-m", "fastencoder", "compile", model, "--out", str(out), *options, cache=cache)


def keys_of(bundle: Path, architecture: str) -> list[str]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    return sorted(entry["key"] for entry in manifest["kernels"] if entry["architecture"] == architecture)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache on the machine that makes bundles."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Path]:
    """The folders of a model and of its bundle for two architectures, and so few tokens that every batch can be tried."""
    folder = tmp_path_factory.mktemp("bert")
    MODELS["bert"].save_pretrained(folder / "model")
    architectures = [f"--arch={name}" for name in ARCHITECTURES]
    done = compile_bundle(str(folder / "model"), folder / "bundle", cache, *architectures)
    assert done.returncode == 0, done.stderr
    return folder / "model", folder / "bundle"


@pytest.mark.parametrize("name", MODELS)
def test_batches_ask_for_what_was_requested(name: str, cache: Path, tmp_path: Path) -> None:
    """Random shapes ask for nothing that a bundle would not hold, and all of them together for nearly everything."""
    MODELS[name].save_pretrained(tmp_path)
    outcome = call("requested_and_asked", cache, folder=str(tmp_path), max_tokens=600, max_seqlen=130, count=80)
    assert set(outcome) == set(ARCHITECTURES)
    for requested, asked in outcome.values():
        assert set(asked) <= set(requested)
        assert len(asked) >= 0.9 * len(requested) > 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bundle_holds_exactly_what_every_batch_asks_for(
    made: tuple[Path, Path], cache: Path, architecture: str
) -> None:
    model, bundle = made
    asked = call("keys_of_every_shape", cache, folder=str(model), architecture=architecture, **BOUNDS)
    assert asked == keys_of(bundle, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_compiled_with_it(made: tuple[Path, Path], tmp_path: Path, architecture: str) -> None:
    model, bundle = made
    said = call(
        "warm_up_with", tmp_path / "empty", bundle_folder=str(bundle), folder=str(model), architecture=architecture, **BOUNDS
    )
    assert said["loaded"] and said["hits"] == said["keys"] > 10
    assert said["compiled"] == 0 and said["written"] == []


def test_without_it_something_is_compiled(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = made
    said = call(
        "warm_up_with", tmp_path / "empty", bundle_folder=None, folder=str(model), architecture="sm_80", **BOUNDS
    )
    assert said["compiled"] == 1 and len(said["written"]) == 1


def test_damage_is_refused(made: tuple[Path, Path], cache: Path, tmp_path: Path) -> None:
    _, bundle = made
    outcome = call("load_damaged", cache, bundle_folder=str(bundle), scratch=str(tmp_path))
    assert len(outcome) >= 15
    for expected, said in outcome.items():
        assert said["loaded"] is False and said["untouched"], expected
        (warning,) = said["warnings"]
        assert expected in warning and "Kernels are compiled when they are first needed" in warning
        assert len(warning.splitlines()) == 1


def test_a_bundle_is_data(made: tuple[Path, Path]) -> None:
    _, bundle = made
    manifest = json.loads((bundle / "manifest.json").read_text())
    named = {f"kernels/{entry['key']}/{name}" for entry in manifest["kernels"] for name in entry["files"]}
    there = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert there == named | {"manifest.json"}
    assert {Path(name).suffix for name in named} == {".json", ".cubin"}


def test_a_bundle_replaces_only_a_bundle(made: tuple[Path, Path], cache: Path, tmp_path: Path) -> None:
    model, bundle = made
    before = (bundle / "manifest.json").read_text()
    architectures = [f"--arch={name}" for name in ARCHITECTURES]
    assert compile_bundle(str(model), bundle, cache, *architectures).returncode == 0
    assert (bundle / "manifest.json").read_text() == before
    (tmp_path / "precious").write_text("mine")
    done = compile_bundle(str(model), tmp_path, cache, *architectures)
    assert done.returncode == 2 and "other files" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bert", "--arch=sm90"), "did you mean sm_90?"),
        (("bert", "--arch=sm_90", "--dtype=bf61"), "bf16"),
        (("brt", "--arch=sm_90"), "did you mean bert"),
        (("gpt2", "--arch=sm_90"), "no layer that can be fast"),
    ],
)
def test_a_wrong_question_gets_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = process("-m", "fastencoder", "compile", *arguments, "--out", str(tmp_path / "out"), cache=tmp_path)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_environment_names_a_bundle(tmp_path: Path) -> None:
    """Read once, when the first kernel is launched."""
    said = call("launch_twice", tmp_path / "cache", named=str(tmp_path / "nowhere"))
    assert said["launched"] == 2
    (warning,) = said["warnings"]
    assert "nowhere" in warning and "there is no manifest.json in it" in warning
    assert call("launch_twice", tmp_path / "cache", named="") == {"launched": 2, "warnings": []}
