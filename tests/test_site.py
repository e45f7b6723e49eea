"""The documentation site builds with strict links, holds every page, and fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastencoder
from tools import data_flow

from .docs import snippets

ROOT = snippets.ROOT


def build(root: Path, to: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(to),
    ]  # --quiet would hide warnings from --strict
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        command, cwd=root, env=os.environ | quiet, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("site")
    result = build(ROOT, to)
    assert result.returncode == 0, result.stdout + result.stderr
    return to


class Page(HTMLParser):
    """What a browser would fetch to show a page, and the page's words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "link"):
            self.fetched += [value for name in ("src", "href") if (value := given.get(name))]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_every_page_is_on_the_site(site: Path) -> None:
    missing = [page for page in snippets.pages() if not _built(site, page).is_file()]
    assert not missing


def _built(site: Path, page: str) -> Path:
    path = Path(page)
    return site / path.parent / ("index.html" if path.stem == "README" else f"{path.stem}/index.html")


def test_a_reader_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [url for url in Page(path).fetched if re.match(r"(https?:)?//", url)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path


def test_what_is_for_the_tests_is_not_shown(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not re.search("<!-- (invisible-code-block|not run)", path.read_text(encoding="utf-8")), path


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    for name in fastencoder.__all__:
        documented = getattr(fastencoder, name)
        assert f'id="fastencoder.{name}"' in page or f'id="{documented.__module__}.{name}"' in page, name


def test_lists_and_tables_are_lists_and_tables(site: Path) -> None:
    """Markdown on the site wants an empty line before them, which other readers of Markdown do not."""
    for path in site.rglob("*.html"):
        for paragraph in re.findall(r"<p>(.*?)</p>", path.read_text(encoding="utf-8"), re.DOTALL):
            assert not re.search(r"^(- |\d+\. |\| ?-)", paragraph, re.MULTILINE), f"{path}: {paragraph[:200]}"


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("README.md", "[nowhere](docs/nowhere.md)"),
        ("docs/gpu.md", "[no such heading](cpu.md#no-such-heading)"),
        ("docs/api.md", "::: fastencoder.no_such_function"),
    ],
)
@pytest.mark.slow
def test_a_wrong_link_ends_the_build(page: str, wrong: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    leave_out = shutil.ignore_patterns(".*", "*.so", "__pycache__", "tests", "build", "site")
    shutil.copytree(ROOT, copy, ignore=leave_out)
    with (copy / page).open("a", encoding="utf-8") as file:
        file.write(f"\n{wrong}\n")
    assert build(copy, tmp_path / "site").returncode != 0


def test_the_picture_is_what_its_script_draws() -> None:
    assert data_flow.PICTURE.read_text(encoding="utf-8") == data_flow.picture(), "python -m tools.data_flow"
