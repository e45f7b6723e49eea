"""What mkdocs is given to build the documentation site: the files under the paths that they have in the repository.

mkdocs reads one folder; README, the changelog and the measurements lie outside of `docs/`. Here they join it, and all keep
their places relative to one another, so a link that works in the repository works on the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

#: What the site is made of; everything that a page links to is among it.
PATTERNS = (
    "*.md",
    "LICENSE",
    "docs/*.md",
    "docs/images/*",
    "benchmarks/*.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "examples/*",
)
# What tests run before a snippet, and why they do not run one.
_FOR_TESTS = re.compile(r"^<!-- (?:invisible-code-block|not run).*?-->\n+", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """mkdocs calls this with the files that it found."""
    root = Path(config.config_file_path).parent
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()}):
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with the text of each page."""
    return _FOR_TESTS.sub("", markdown)
