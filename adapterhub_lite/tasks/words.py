"""Texts as words, and words as tokens: how a tagger sees both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

# With the typographic quotes of several languages, written as escapes since they look alike.
_BEFORE = "\"'`([{<\u00ab\u2018\u201c\u201e"
_AFTER = "\"'`)]}>\u00bb\u2019\u201d.,;:!?\u2026"
_RUN = re.compile(r"(.)\1*", re.DOTALL)


def split_words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end.

    A text is split at white space; quotes, brackets and the marks that end a sentence or a part of it are words of
    their own at the ends of a word, as they are in the data that taggers learn from. `U.S.` loses its last dot.
    """
    found = []
    for match in re.finditer(r"\S+", text):
        chunk, at = match[0], match.start()
        begin = len(chunk) - len(chunk.lstrip(_BEFORE))
        end = max(begin, len(chunk.rstrip(_AFTER)))
        found += [(at + run.start(), at + run.end()) for run in _RUN.finditer(chunk, 0, begin)]
        found += [(at + begin, at + end)] if end > begin else []
        found += [(at + run.start(), at + run.end()) for run in _RUN.finditer(chunk, end)]
    return found


@dataclass(frozen=True)
class Piece:
    """Some words of a text, in the model's tokens.

    Attributes:
        ids: token ids with the tokenizer's special ones around them.
        first: for each word of the piece its index in the text, and where in `ids` its first token is.
    """

    ids: list[int]
    first: list[tuple[int, int]]


def pieces(words: Sequence[str], tokenizer: Any, max_length: int) -> list[Piece]:
    """The words in pieces of at most `max_length` tokens, cut between words: nothing is lost of a long text.

    Words become tokens one by one, as fast tokenizers do with `is_split_into_words` (those of RoBERTa's and GPT-2's
    kind with `add_prefix_space`). Of a word longer than a piece the first tokens are kept. A word without tokens (a
    lone control character, say) is in no piece.

    Raises:
        DataError: `max_length` leaves no room for a token.
    """
    before, after = _specials(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise DataError(f"max_length {max_length} leaves no room for a word.", "Raise training.max_length.")
    made: list[Piece] = []
    ids: list[int] = []
    first: list[tuple[int, int]] = []
    for index, tokens in enumerate(_tokens(words, tokenizer)):
        if not tokens:
            continue
        if ids and len(ids) + len(tokens) > room:
            made.append(Piece([*before, *ids, *after], first))
            ids, first = [], []
        first.append((index, len(before) + len(ids)))
        ids += tokens[:room]
    return [*made, Piece([*before, *ids, *after], first)] if ids else made


def _tokens(words: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each word."""
    if not words:
        return iter(())
    space = " " if _tells_space(tokenizer) else ""
    given = [space + word.strip() if word.strip() else "" for word in words]
    return iter(tokenizer(given, add_special_tokens=False)["input_ids"])


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    begin = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:begin], whole[begin + len(bare) :]


def _tells_space(tokenizer: Any) -> bool:
    """Whether a word has other tokens after a space than at the begin of a text."""
    step = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if step is None:
        return False
    told = json.loads(step.__getstate__())  # its part of a tokenizer.json
    return any(one.get("type") == "ByteLevel" for one in (told, *(told.get("pretokenizers") or ())))
