"""docs/troubleshooting.md quotes the messages that the source has, and all that a user can meet."""

from __future__ import annotations

import re

import pytest

from tools import messages

from .docs.snippets import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
FILLED = messages.FILLED
# What is said of a proposal that does not agree, and what only passes another message on.
ELSEWHERE = {"it returns a …, and the adapter a …", "fastencoder: …"}


def quotes(page: str) -> list[str]:
    """The messages in the first column of the tables."""
    rows = re.findall(r"^\| (`.*?`)[^|`]*\|", page, re.MULTILINE)
    return [row.strip("`") for row in rows]


def in_source(quote: str, strings: set[str]) -> bool:
    """Whether some string of the package contains this, whatever is filled in at the ends of the quote."""
    return any(quote.strip(f"{FILLED} ") in text for text in strings)


def is_quoted(message: str, quoted: list[str]) -> bool:
    """Whether the page has this message, or so much of it that it is found by it."""
    return any(quote == message or (quote in message and len(quote.strip(f"{FILLED} ")) >= 18) for quote in quoted)


def test_every_quoted_message_is_in_the_source() -> None:
    strings = messages.strings()
    quoted = quotes(PAGE)
    assert len(quoted) > 150
    missing = [quote for quote in quoted if not in_source(quote, strings)]
    assert not missing, "docs/troubleshooting.md quotes what no source says"


def test_every_message_is_quoted() -> None:
    quoted = quotes(PAGE)
    missing = [
        f"{file}: {text}" for file, text in messages.messages() if text not in ELSEWHERE and not is_quoted(text, quoted)
    ]
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_no_message_is_quoted_twice() -> None:
    quoted = quotes(PAGE)
    assert len(quoted) == len(set(quoted))


@pytest.mark.parametrize(
    "wrong", ["its weights have mixed types: …", "the mask differs between layers", "a gradient is needed"]
)
def test_a_message_that_was_changed_is_found(wrong: str) -> None:
    assert not in_source(wrong, messages.strings())
    assert in_source("its weights have mixed dtypes: …", messages.strings())


def test_a_message_that_is_not_quoted_is_found() -> None:
    assert not is_quoted("the moon is full", quotes(PAGE))
    assert is_quoted("autocast is on", quotes(PAGE))
    assert not is_quoted("autocast is on", [quote for quote in quotes(PAGE) if quote != "autocast is on"])
