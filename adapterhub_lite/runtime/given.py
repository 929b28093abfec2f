"""What callers give: refused with a word on what to give instead, before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..bases.load import Base
from ..errors import Unsupported


def texts_of(given: Any) -> list[str]:
    """One text, or a list of texts.

    Raises:
        Unsupported: something else.
    """
    if isinstance(given, bytes | Mapping):
        raise Unsupported(f"{type(given).__name__} is no text.", "Give a string, or a list of strings.")
    try:
        texts = [given] if isinstance(given, str) else list(given)
    except TypeError:
        raise Unsupported(f"{given!r} is no text.", "Give a string, or a list of strings.") from None
    for text in texts:
        if not isinstance(text, str):
            raise Unsupported(f"{str(text)[:40]!r} is no text.", "Give a string, or a list of strings.")
    return texts


def check_messages(given: Any) -> None:
    """Raise Unsupported where a conversation is not a list of messages with a role and a text each."""
    hint = 'Give a list such as [{"role": "user", "content": "Hello!"}].'
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence) or not given:
        raise Unsupported("A conversation is a list of messages.", hint)
    for message in given:
        if not isinstance(message, Mapping):
            raise Unsupported(f"{str(message)[:40]!r} is no message.", hint)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise Unsupported(f"A message has no text as its {key}.", hint)


def check_ids(base: Base, rows: Any) -> None:
    """Raise Unsupported where rows of token ids are none, or hold numbers that the base has no token for."""
    hint = "Give a list of lists of token ids."
    size = int(base.config.vocab_size)
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise Unsupported(f"{type(rows).__name__} holds no rows of token ids.", hint)
    for row in rows:
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise Unsupported(f"{str(row)[:40]!r} is no row of token ids.", hint)
        for token in row:
            if type(token) is not int or not 0 <= token < size:
                raise Unsupported(f"{str(token)[:40]!r} is no token of this base: it has {size}.", hint)
