"""Label the rows of a call: texts by heads or label words, words by the heads of taggers; all heads in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..errors import AdapterMismatch, Unsupported
from ..names import Ref
from ..tasks.classify import Classify
from ..tasks.spans import OUTSIDE
from ..tasks.tag import Tag
from ..tasks.task import Task
from ..tasks.words import Piece, pieces, split_words
from .engine import Engine
from .forward import class_logits
from .predict import Prediction, TaggedWord, from_logits, label_word_logits
from .prompting import check_lengths, class_ids, class_limit
from .texts import tokenizer_lock

Input = str | Sequence[str]
"""A text, or its words."""
Labelled = Prediction | list[TaggedWord]


@dataclass(frozen=True)
class _Adapter:
    """What the rows of one adapter need to know of it; asked once, since it may leave its slot between batches.

    Attributes:
        virtual: virtual tokens, which need positions.
        labels: of its head; empty without one.
        tags: whether the head labels words, and not texts.
    """

    task: Task | None
    virtual: int
    labels: list[str]
    tags: bool


@dataclass
class _Words:
    """The words of a row for a tagger, as (begin, end, word), and the tags that come in for them, by index."""

    words: list[tuple[int, int, str]]
    tags: dict[int, tuple[str, float]] = field(default_factory=dict)

    def add(self, piece: Piece, logits: torch.Tensor, labels: Sequence[str]) -> None:
        """Logits [tokens, labels] of a piece of the row."""
        chosen = logits[[place for _, place in piece.first], : len(labels)]
        scores, best = chosen.float().softmax(-1).max(-1)
        named = [labels[k] for k in best.tolist()]
        words = [word for word, _ in piece.first]
        self.tags |= dict(zip(words, zip(named, scores.tolist(), strict=True), strict=True))

    def tagged(self) -> list[TaggedWord]:
        """Every word. One that has no token, and so no logits, is outside of everything, with score 0."""
        said = [self.tags.get(i, (OUTSIDE, 0.0)) for i in range(len(self.words))]
        return [TaggedWord(word, *tag, begin, end) for (begin, end, word), tag in zip(self.words, said, strict=True)]


@dataclass(frozen=True)
class _Pass:
    """What goes through the base as one row: a classifier's text, or a piece of a tagger's words."""

    row: int
    ids: list[int]
    piece: Piece | None = None


def label(
    engine: Engine, inputs: Sequence[Input], rows: Sequence[Ref | None], tags: bool | None = None
) -> list[Labelled]:
    """What each row's adapter says: a prediction for the text, or a tag for each of its words.

    Args:
        tags: refuse adapters that label texts (True), or words (False).

    Raises:
        Unsupported: a row without adapter, or whose adapter has no labels.
    """
    named = [row for row in rows if row is not None]
    if len(named) < len(rows):
        raise Unsupported("The bare base has no labels.", "Name an adapter trained to classify or tag.")
    known = {row.digest: _adapter(engine, row, tags) for row in dict.fromkeys(named)}
    adapters = [known[row.digest] for row in named]
    made: dict[int, Labelled] = {}
    for with_head, score in ((True, _by_heads), (False, _by_words)):
        chosen = [i for i, adapter in enumerate(adapters) if bool(adapter.labels) == with_head]
        found = score(engine, [inputs[i] for i in chosen], [named[i] for i in chosen], [adapters[i] for i in chosen])
        made |= dict(zip(chosen, found, strict=True))
    return [made[i] for i in range(len(inputs))]


def score_words(
    engine: Engine, texts: Sequence[str], rows: Sequence[Ref | None], tasks: Sequence[Classify]
) -> list[Prediction]:
    """A prediction a row by how likely a causal base finds each label's word."""
    tokenizer, kind = engine.base.tokenizer, engine.base.kind
    with tokenizer_lock(engine.base):
        ids = [task.encode(text, tokenizer, kind, 0) for text, task in zip(texts, tasks, strict=True)]
        words = {id(task): task.word_ids(tokenizer) for task in tasks}
    made: dict[int, Prediction] = {}
    for part in engine.parts(ids, rows):
        with engine.plan([rows[i] for i in part]) as plan:
            some, of_row = [ids[i] for i in part], [words[id(tasks[i])] for i in part]
            check_lengths(engine.base, plan, some, max(len(word) for row in of_row for word in row))
            logits = label_word_logits(engine.base, engine.hooks, plan, some, of_row)
            made |= {i: from_logits(one, tasks[i].labels) for i, one in zip(part, logits, strict=True)}
    return [made[i] for i in range(len(texts))]


def _by_heads(
    engine: Engine, inputs: Sequence[Input], rows: Sequence[Ref], adapters: Sequence[_Adapter]
) -> list[Labelled]:
    """Rows of classifiers and taggers go through the base together."""
    words = {i: _Words(_words(inputs[i])) for i, adapter in enumerate(adapters) if adapter.tags}
    with tokenizer_lock(engine.base):
        passes = [p for i, given in enumerate(inputs) for p in _passes(engine, i, given, adapters[i], words.get(i))]
    made: dict[int, Labelled] = {}
    for part in engine.parts([p.ids for p in passes], [rows[p.row] for p in passes]):
        some = [passes[k] for k in part]
        with engine.plan([rows[p.row] for p in some]) as plan:
            logits = class_logits(engine.base, engine.hooks, plan, [p.ids for p in some])
            for one, found in zip(some, logits, strict=True):
                labels = adapters[one.row].labels
                if one.piece is None:
                    made[one.row] = from_logits(found, labels)
                else:
                    words[one.row].add(one.piece, found, labels)
    made |= {i: row.tagged() for i, row in words.items()}
    return [made[i] for i in range(len(inputs))]


def _passes(engine: Engine, i: int, given: Input, adapter: _Adapter, words: _Words | None) -> list[_Pass]:
    """A row as it goes through the base; the words of a tagger may need more than one pass, or none."""
    if words is None:
        return [_Pass(i, class_ids(engine.base, _text(given), adapter.task, adapter.virtual))]
    limit = class_limit(engine.base, adapter.task, adapter.virtual)
    made = pieces([word for _, _, word in words.words], engine.base.tokenizer, limit)
    return [_Pass(i, piece.ids, piece) for piece in made]


def _text(given: Input) -> str:
    return given if isinstance(given, str) else " ".join(given)


def _words(given: Input) -> list[tuple[int, int, str]]:
    """Begin, end and text of each word."""
    if isinstance(given, str):
        return [(begin, end, given[begin:end]) for begin, end in split_words(given)]
    found, at = [], 0
    for word in given:
        found.append((at, at + len(word), word))
        at += len(word) + 1
    return found


def _by_words(
    engine: Engine, inputs: Sequence[Input], rows: Sequence[Ref], adapters: Sequence[_Adapter]
) -> list[Labelled]:
    tasks = []
    for row, adapter in zip(rows, adapters, strict=True):
        if not isinstance(adapter.task, Classify):
            raise Unsupported(f"{row} was not trained to classify.", "Use generate(), or another adapter.")
        tasks.append(adapter.task)
    return list(score_words(engine, [_text(given) for given in inputs], rows, tasks))


def _adapter(engine: Engine, row: Ref, wanted: bool | None) -> _Adapter:
    fitted, task = engine.fitted(row), engine.task(row)
    tags = fitted.head is not None and fitted.task_type == "TOKEN_CLS"
    if wanted is not None and wanted != tags:
        labels_what, call = ("texts, not words", "predict()") if wanted else ("words, not texts", "tag()")
        raise Unsupported(f"{row} labels {labels_what}.", f"Use {call}, or label() for rows of both kinds.")
    labels: list[str] = []
    if fitted.head is not None:
        count = int(list(fitted.head.parameters())[-1].shape[0])
        labels = [f"LABEL_{i}" for i in range(count)]
        if isinstance(task, Tag if tags else Classify) and task.labels:
            labels = task.labels
        if len(set(labels)) != count:
            raise AdapterMismatch(
                f"{row} has a head of {count} labels, and its card names {', '.join(labels)[:200]}.",
                "Import or train it again: a label that is guessed would be a wrong one.",
            )
    return _Adapter(task, fitted.virtual_tokens, labels, tags)
