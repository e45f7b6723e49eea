"""What a request to the embedding servers may be: `{"texts": ["...", ...]}`, within limits; and what is said if it is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """A request that is not answered, with its HTTP status and one sentence for whoever sent it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Limits:
    """Of one request.

    Args:
        body_bytes: of the whole body.
        texts: how many.
        characters, tokens: of one text. Characters are counted before anything is tokenized.
    """

    body_bytes: int = 4 * 2**20
    texts: int = 128
    characters: int = 20_000
    tokens: int = 256


def parse(body: bytes) -> Any:
    """The JSON value of a body. Raises Refused."""
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None


def check_texts(value: Any, limits: Limits) -> list[str]:
    """The texts of a request. Raises Refused."""
    texts = value.get("texts") if isinstance(value, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused(422, 'the body has to be {"texts": ["...", ...]}')
    if not texts:
        raise Refused(422, "there is no text")
    if len(texts) > limits.texts:
        raise Refused(413, f"{len(texts)} texts are more than the {limits.texts} of a request")
    for index, text in enumerate(texts):
        if not text.strip():
            raise Refused(422, f"text {index} is empty")
        if len(text) > limits.characters:
            raise Refused(413, f"text {index} has {len(text)} characters, and may have {limits.characters}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # "\\ud800" is good JSON, and no text
            raise Refused(400, f"text {index} has half a surrogate pair") from None
    return texts


def check_tokens(rows: list[list[int]], limits: Limits) -> None:
    """Raises Refused if a text is longer than the model can read."""
    for index, row in enumerate(rows):
        if len(row) > limits.tokens:
            raise Refused(413, f"text {index} has {len(row)} tokens, and may have {limits.tokens}")
