"""Tokens to text as they arrive: never half a character, never past a stop string."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from ..bases.load import Base

_HALF = "\ufffd"  # what a decoder gives for the bytes of an incomplete character


class TextStream:
    """Decodes one row's tokens; `push` returns the text that is now certain.

    The text ends where a stop string begins; of several that occur, the one that begins first counts, whatever tokens
    the text comes in. A whole one therefore waits for what began before it and may yet become another (of "abcd" and
    "bc" in "abc"); of two that begin together either gives the same text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), lock: Any = None) -> None:
        """`lock`: held while the tokenizer decodes."""
        self._tokenizer = tokenizer
        self._lock = lock if lock is not None else nullcontext()
        self._stop = [s for s in stop if s]
        self._tokens: list[int] = []
        self._sent = 0
        self.done = False

    @property
    def stops(self) -> bool:
        """Whether some text may end the answer, so that every token must be looked at."""
        return bool(self._stop)

    def add(self, token: int) -> None:
        """Add a token whose text nobody asks for before `finish`; decoding all at every token costs their square."""
        self._tokens.append(token)

    def push(self, token: int) -> str:
        """Add a token; returns new text, "" while a character or a possible stop string is incomplete."""
        self._tokens.append(token)
        text = self._text()
        whole = text.rstrip(_HALF)  # half a character is not yet what it will be
        cut = self._cut(whole)
        held = max((_overlap(whole, s) for s in self._stop), default=0)
        if 0 <= cut <= len(whole) - held:
            self.done = True
            return self._take(text[:cut])
        if len(whole) < len(text):
            return ""
        return self._take(text[: len(text) - held])

    def finish(self) -> str:
        """The text still held back when no more tokens come."""
        if self.done:
            return ""
        text = self._text()
        cut = self._cut(text)
        return self._take(text if cut < 0 else text[: max(cut, self._sent)])

    def _cut(self, text: str) -> int:
        """Where the first stop string begins, or -1."""
        return min((text.find(s) for s in self._stop if s in text), default=-1)

    def _text(self) -> str:
        with self._lock:
            text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _take(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new


def tokenizer_lock(base: Base) -> Any:
    """What a thread holds while it uses a base's tokenizer.

    A fast tokenizer refuses to change its truncation while another thread reads or writes a text with it.
    """
    return base.derived.setdefault("tokenizer lock", threading.RLock())


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
