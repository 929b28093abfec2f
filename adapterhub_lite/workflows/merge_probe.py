"""What a merge is verified on: prompts that no adapter was trained on, and rows of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..formats.card import Card, spread
from ..formats.files import read_regular
from ..names import Ref
from ..runtime.certificate import PROBES
from ..tasks.registry import make_task
from ..tasks.rows import Rows, read_jsonl
from ..tasks.task import Task
from .data import split_rows

_ROWS, _TOKENS = 24, 256  # prompts, and tokens of each
_LOGITS = 512 << 20  # bytes of logits that are kept of one model
_LEAST = 64  # tokens in all
_TEXT = 160  # characters of a prompt in the report
_FILE = 64 << 20
_SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Probe:
    """Prompts as token ids, and as text for the report."""

    rows: list[list[int]]
    texts: list[str]


@dataclass(frozen=True)
class Measured:
    """Rows of a version's task to measure it on, evenly over all `of_rows` that there are."""

    ref: Ref
    task: Task
    rows: Rows
    of_rows: int


def probe_of(members: Sequence[tuple[Ref, Card]], base: Any, prompts: Path | None = None) -> Probe:
    """Prompts of the versions' own held-out rows, in turn; of a file; or fixed texts where there is neither.

    Args:
        base: has `tokenizer`, `kind` and `config`.
        prompts: a text file with a prompt a line, or JSON Lines as the tasks read them.

    Raises:
        DataError: the file holds no prompts, or needs a task to be read.
    """
    if prompts is not None and prompts.suffix != ".jsonl":
        texts = _lines(prompts)
        return _limited([list(base.tokenizer(text)["input_ids"]) for text in texts], texts, base)
    if prompts is not None and not any(card.task.get("type") for _, card in members):
        raise DataError(
            f"{prompts} is JSON Lines, and no task says how to read it.", "Name a text file with a prompt a line."
        )
    lists = [_of_member(card, base, prompts) for _, card in members]
    found = [one for one in chain.from_iterable(zip_longest(*lists)) if one is not None]
    if not found:
        found = [(list(base.tokenizer(text)["input_ids"]), text) for text in PROBES]
    return _limited([ids for ids, _ in found], [text for _, text in found], base)


def measured_of(
    members: Sequence[tuple[Ref, Card]], most: int, prompts: Path | None = None
) -> tuple[list[Measured], list[str]]:
    """What each version's task is measured on, and remarks on those that cannot be."""
    found, remarks = [], []
    for ref, card in members:
        if not card.task.get("type"):
            remarks.append(f"The card of {ref} names no task, so its metric was not measured.")
            continue
        rows = read_jsonl(prompts) if prompts is not None and prompts.suffix == ".jsonl" else held_out(card)
        if rows is None:
            remarks.append(f"The test data of {ref} is not where it was, so its metric was not measured.")
        elif not most:
            remarks.append(f"The metric of {ref} was not measured, as asked for (--rows 0).")
        else:
            some = rows.at(spread(len(rows), most))
            found.append(Measured(ref, make_task(card.task), some, len(rows)))
    return found, remarks


def held_out(card: Card) -> Rows | None:
    """The test rows of a version, else its validation rows, where they still are."""
    return next((rows for split in _SPLITS if (rows := split_rows(card, split)) is not None), None)


def probe_bytes(vocabulary: int) -> int:
    """Most bytes of the logits of a probe in float32."""
    return min(_LOGITS, 4 * vocabulary * _ROWS * _TOKENS)


def _of_member(card: Card, base: Any, prompts: Path | None) -> list[tuple[list[int], str]]:
    if not card.task.get("type"):
        return []
    rows = held_out(card) if prompts is None else read_jsonl(prompts)
    if rows is None:
        return []
    task = make_task(card.task)
    texts = task.inputs(rows.at(spread(len(rows), _ROWS)))
    return [(task.encode(text, base.tokenizer, base.kind, _TOKENS), text) for text in texts]


def _limited(rows: list[list[int]], texts: list[str], base: Any) -> Probe:
    """As many prompts as there is room for the logits of."""
    left = max(_LEAST, _LOGITS // (4 * int(getattr(base.config, "vocab_size", 1) or 1)))
    kept: list[tuple[list[int], str]] = []
    for ids, text in zip(rows, texts, strict=True):
        ids = ids[: min(_TOKENS, left)]
        if ids and len(kept) < _ROWS:
            kept.append((ids, " ".join(text.split())[:_TEXT]))
            left -= len(ids)
    if not kept:
        raise DataError("No prompt to compare on has a token.", "Give others with --prompts FILE.")
    return Probe([ids for ids, _ in kept], [text for _, text in kept])


def _lines(path: Path) -> list[str]:
    try:
        text = read_regular(path.resolve(), _FILE).decode("utf-8")
    except (OSError, LookupError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", "Name a text file with a prompt a line.") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError(f"{path} holds no prompts.", "Name a text file with a prompt a line.")
    return found
