"""Every snippet of README, docs and the other pages runs, or says why it cannot and is checked as far as it can be."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastencoder import registry

from .docs import snippets
from .docs.parts import folder, texts
from .docs.shell import check_line

# Blocks that no test runs, by page and reason. A new one is a decision: give the reason here as well.
NOT_RUN = {
    ("docs/gpu.md", snippets.CUDA): 1,
    ("docs/ahead-of-time.md", "compiles several hundred kernels, and starts the reader's own server"): 1,
}
# Blocks that are no program.
TEXT = {"docs/architecture.md": 1}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder: a model in ./my-model and a package of its own. What a page registers or sets is undone."""
    (tmp_path / "my-model").symlink_to(folder)
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    shutil.copytree(Path(snippets.__file__).parent / "my_package", tmp_path / "my_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("page", snippets.pages())
def test_snippets_of(page: str, place: Path) -> None:
    before = torch.is_grad_enabled(), torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("error", message="fastencoder: gradients")  # an example of something slow
        done = snippets.evaluate(snippets.ROOT / page)
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == before
    allowed = Counter({reason: number for (of, reason), number in NOT_RUN.items() if of == page})
    assert done.checked <= allowed
    assert done.checked == allowed or torch.cuda.is_available()
    assert done.text == TEXT.get(page, 0)


def test_the_model_types_that_readme_names_are_fast() -> None:
    rows = re.findall(r"^\| [^|`]+ \| (`.*`) \|$", (snippets.ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    survey = json.loads((snippets.ROOT / "docs" / "models.json").read_text(encoding="utf-8"))["models"]
    assert len(named) == len(set(named)) > 40
    assert not [name for name in named if "layer" not in {row[0] for row in survey[name].values()}]


def test_pages_that_are_listed_exist_and_those_for_users_have_snippets() -> None:
    pages = snippets.pages()
    assert {page for page, _ in NOT_RUN} | set(TEXT) <= set(pages)
    assert {"README.md", "docs/getting-started.md", "docs/adding-a-model.md", "docs/gpu.md", "docs/cpu.md"} <= set(
        pages
    )


WRONG = {
    "an exception": "```python\n1 / 0\n```\n",
    "a syntax error in a block that does not run": "<!-- not run: for a test -->\n```python\ndef\n```\n",
    "a block of no language": "```\nmake test\n```\n",
    "a block of another language": "```ruby\nputs 1\n```\n",
    "an unknown target": "```bash\nmake tests\n```\n",
    "an unknown variable": "```bash\nmake test COLOUR=red\n```\n",
    "an unknown option of a program": "```bash\nmake bench BENCH_ARGS='--no-such-option'\n```\n",
    "an unknown extra": "```bash\npip install '.[no-such-extra]'\n```\n",
    "an unknown command": "```bash\nfrobnicate\n```\n",
    "an unknown subcommand": "```bash\nfastencoder expain bert\n```\n",
    "an unknown option": "```bash\nfastencoder explain bert --jsn\n```\n",
    "an unknown model": "```bash\nfastencoder explain brt\n```\n",
    "an unknown option, not run": "<!-- not run: for a test -->\n```bash\nfastencoder compile bert --archs sm_90\n```\n",
    "a program that is not there": "```bash\npython examples/nothing.py\n```\n",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_snippet_is_found(what: str, place: Path) -> None:
    page = place / "page.md"
    page.write_text(f"# Page\n\n{WRONG[what]}")
    with pytest.raises((ValueError, ZeroDivisionError, SyntaxError)):
        snippets.evaluate(page)


def test_blocks_share_a_namespace_and_are_counted(place: Path) -> None:
    page = place / "page.md"
    page.write_text(
        "<!-- invisible-code-block: python\nx = 1\n-->\n\n```python\ny = x + 1\n```\n\n"
        "<!-- not run: for a test -->\n```python\nraise SystemExit\n```\n\n"
        "```bash\nmake test  # every test\npip install '.[demo]'\n```\n\n```text\nnothing\n```\n"
    )
    assert snippets.evaluate(page) == snippets.Done(run=2, checked=Counter({"for a test": 1}), text=1)
    check_line("make pytest WORKERS=0")


def test_the_tests_that_the_page_on_reliability_names_exist() -> None:
    page = (snippets.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|fastencoder)/[\w/.]+)(?:::(\w+))?`", page)
    assert len(named) > 15
    for path, test in named:
        found = snippets.ROOT / path
        assert found.exists(), path
        assert not test or f"def {test}(" in found.read_text(encoding="utf-8"), test
