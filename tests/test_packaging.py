"""What holds for the package as a whole: it imports fast and anywhere, and its files agree with each other."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastencoder

ROOT = Path(__file__).parents[1]
PUBLIC = ("explain", "fast", "is_fast", "register", "reverse", "to_fast")


def run_python(code: str, timeout: int = 120) -> str:
    """Run code in a fresh interpreter in the repository's root, and give what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def repository_files() -> list[Path]:
    """Everything that is tracked, or would be by `git add .`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# ---- importing

IMPORT_TIME = """
import time
import torch, transformers
begin = time.process_time()
import fastencoder
print(time.process_time() - begin)
"""


def test_import_adds_less_than_a_fifth_of_a_second() -> None:
    """Of the processor's time, since other tests run beside it; the fastest of three, which leaves out the compilation to
    bytecode."""
    assert min(float(run_python(IMPORT_TIME)) for _ in range(3)) < 0.2


WITHOUT = """
import sys
for name in ("triton", "optimum"):
    sys.modules[name] = None  # importing it now raises ImportError
import torch
import fastencoder
from transformers import BertConfig, BertModel
config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
model = BertModel(config).eval()
ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
with torch.inference_mode():
    stock = model(ids, attention_mask=mask).last_hidden_state
    fast = fastencoder.to_fast(model)(ids, attention_mask=mask).last_hidden_state
real = mask.bool()
print(float((stock - fast)[real].abs().max()), float(stock[~real].abs().max()), float(fast[~real].abs().max()))
"""


def test_works_without_triton_and_optimum() -> None:
    difference, stock_padding, fast_padding = map(float, run_python(WITHOUT).split())
    assert difference < 1e-5
    assert stock_padding > 0 and fast_padding == 0  # so the fast layers did run


def test_import_starts_nothing_of_a_gpu_and_no_heavy_module() -> None:
    loaded = run_python("import sys, fastencoder; print(' '.join(sys.modules))").split()
    assert not {"triton", "optimum", "matplotlib", "sentence_transformers", "fastencoder.demo"} & set(loaded)
    code = "import fastencoder, torch; print(torch.cuda.is_initialized(), torch._C._get_default_device())"
    assert run_python(code) == "False cpu"


def test_help_of_the_command_does_not_build_models() -> None:
    loaded = run_python("import sys, fastencoder.cli; print(' '.join(sys.modules))").split()
    assert not {"fastencoder.demo", "transformers.modeling_utils"} & set(loaded)


def test_public_names_are_there_and_documented() -> None:
    for name in PUBLIC:
        assert (getattr(fastencoder, name).__doc__ or "").strip(), name
        assert name in fastencoder.__all__
    for name in ("NotEligibleError", "AlreadyFastError", "NotFastError"):
        assert issubclass(getattr(fastencoder, name), ValueError)


# ---- the files


def test_version_is_the_same_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastencoder.__version__)
    assert f"## {fastencoder.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "version" in project()["project"]["dynamic"]  # so there is no second place to change
    try:
        installed = importlib.metadata.version("fastencoder")
    except importlib.metadata.PackageNotFoundError:
        return  # a checkout on PYTHONPATH
    assert installed == fastencoder.__version__


def test_what_is_always_imported_is_a_dependency_and_the_rest_is_an_extra() -> None:
    """Every third-party module that the package imports anywhere is installed with it or with one of its extras."""
    described = project()["project"]
    groups = [described["dependencies"], *described["optional-dependencies"].values()]
    names = {re.match(r"[\w-]+", text)[0].replace("-", "_") for group in groups for text in group}
    imported = set()
    for path in (ROOT / "fastencoder").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"fastencoder"}
    assert {"torch", "transformers", "rich", "typer"} <= third_party
    assert third_party <= names


def test_typed_marker_and_licence_ship_with_the_package() -> None:
    assert (ROOT / "fastencoder" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project()["project"]["license"] == "Apache-2.0"


def test_every_file_of_the_package_ships() -> None:
    patterns = project()["tool"]["setuptools"]["package-data"]["fastencoder"]
    package = ROOT / "fastencoder"
    files = {path for path in repository_files() if path.is_relative_to(package) and path.suffix != ".py"}
    sources = {
        path for path in files if path.parent == package / "native"
    }  # they are built; the source archive has them
    assert sources
    assert (ROOT / "MANIFEST.in").read_text() == "graft fastencoder/native\n"
    files -= sources
    assert files == {path for pattern in patterns for path in package.glob(pattern)} != set()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of what is in the checkout, unpacked as pip would. Without the C++ extension, which takes a minute."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for path in repository_files():
        if not path.is_relative_to(ROOT / "tests"):
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "."]
    compilers = {"CC": "false", "CXX": "false"}
    done = subprocess.run(
        command, cwd=source, env={**os.environ, **compilers}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    [wheel] = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_every_file_and_no_other(installed: Path) -> None:
    expected = {path.relative_to(ROOT) for path in repository_files() if path.is_relative_to(ROOT / "fastencoder")}
    plugins = ROOT / "plugins"
    expected |= {path.relative_to(plugins) for path in repository_files() if path.is_relative_to(plugins)}
    shipped = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in shipped if ".dist-info" not in path.parts[0]} == expected
    # They belong to optimum: with such a file here, optimum's own modules could not be found.
    assert not list((installed / "optimum").rglob("__init__.py"))


def run_optimum(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """optimum-cli, with the wheel in front of everything else, and without what is installed in place: optimum would find the
    command twice."""
    command = [sys.executable, "-S", "-m", "optimum.commands.optimum_cli", *arguments]
    paths = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=installed, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_optimum_cli_has_the_command(installed: Path) -> None:
    done = run_optimum(installed, "fastencoder", "explain", "bert", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eligible"]
    assert "fastencoder" in run_optimum(installed, "--help").stdout


def test_optimum_cli_passes_options_and_exit_codes_on(installed: Path) -> None:
    done = run_optimum(installed, "fastencoder", "--help")
    assert done.returncode == 0
    for command in ("optimum-cli fastencoder", "explain", "verify", "bench", "compile"):
        assert command in done.stdout
    done = run_optimum(installed, "fastencoder", "explain", "--json", "brt")
    assert done.returncode == 2 and "did you mean bert" in done.stderr


def test_the_checkout_does_not_look_like_optimum() -> None:
    """Whoever looks for optimum from the root of a checkout finds optimum itself, or nothing."""
    assert not (ROOT / "optimum").exists()


def test_every_folder_of_the_package_is_a_package() -> None:
    for path in (ROOT / "fastencoder").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py and would not be installed"


def test_no_file_names_a_place_of_somebodys_machine() -> None:
    """Absolute paths and package indexes mean something on one machine only. Whoever installs has set up their own."""
    wrong = re.compile(r"(?<![\w.~})/-])/(?:work|tmp|root|home|opt|mnt)\b|--(?:extra-)?index-url|--find-links")
    found = []
    for path in repository_files():
        if path == Path(__file__):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        where = path.relative_to(ROOT)
        found += [f"{where}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if wrong.search(line)]
    assert not found, "\n".join(found)


def test_no_generated_or_large_file_is_tracked() -> None:
    for path in repository_files():
        assert path.suffix not in {".pyc", ".safetensors", ".bin", ".pt", ".so", ".cubin"}, path
        assert path.stat().st_size < 2_000_000, path


def test_links_in_the_documents_lead_somewhere() -> None:
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{path.name} points to {target}"
