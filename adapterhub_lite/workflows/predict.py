"""Answer rows of a file with a stored version: each row is kept, what the adapter says is added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..bases.quiet import quiet
from ..events import Listener, Progress, ignore
from ..names import Ref
from ..runtime.labelling import Input, Labelled
from ..runtime.predict import Prediction
from ..runtime.runtime import Runtime
from ..tasks.classify import Classify
from ..tasks.rows import Row, Rows
from ..tasks.tag import Tag
from ..tasks.task import Task

_ADDED = ("label", "score", "scores", "answer")
_TAGGED = ("words", "tags", "scores")


def predict_rows(
    runtime: Runtime, ref: str | Ref, rows: Rows, *, field: str | None = None, on_event: Listener = ignore
) -> Iterator[dict[str, Any]]:
    """Each row with `label`, `score` and `scores`, or `words`, `tags` and `scores` (as a tagger saw them), or `answer`;
    the names begin with `predicted_` where a row has one of them already, so that nothing is lost.

    Args:
        field: the column to read, instead of what the adapter's task reads (`text` where its card names no task).

    Raises:
        DataError: a row lacks a column.
        NotFound, BaseMismatch, AdapterMismatch: the adapter cannot be served.
    """
    resolved = runtime.load(ref)
    task = runtime.task(resolved)
    texts = _inputs(task, rows, field)
    names = _ADDED if task and not isinstance(task, Tag) else {*_ADDED, *_TAGGED}
    prefix = "predicted_" if any(name in row for row in rows for name in names) else ""
    title = f"answering with {resolved}"
    for start in range(0, len(texts), runtime.batch_size):
        on_event(Progress(title, start, len(texts), "rows"))
        with quiet():
            said = _answers(runtime, resolved, task, texts[start : start + runtime.batch_size])
        for row, added in zip(rows[start : start + runtime.batch_size], said, strict=True):
            yield _joined(row, added, prefix)
    on_event(Progress(title, len(texts), len(texts), "rows"))


def _inputs(task: Task | None, rows: Rows, field: str | None) -> Sequence[Input]:
    if isinstance(task, Tag) and field is None:
        return task.words(rows)
    if task and field is None:
        return task.inputs(rows)
    found = [rows.field(i, field or "text") for i in range(len(rows))]
    return [[str(w) for w in one] if isinstance(task, Tag) and isinstance(one, list) else str(one) for one in found]


def _answers(runtime: Runtime, ref: Ref, task: Task | None, inputs: Sequence[Input]) -> list[dict[str, Any]]:
    if isinstance(task, Classify | Tag) or (task is None and runtime.base.kind == "encoder"):
        return [_labelled(found) for found in runtime.label(inputs, ref)]
    texts = [str(one) for one in inputs]
    limit = int(task.config["max_new_tokens"]) if task else 64
    return [{"answer": answer} for answer in runtime.answer(texts, ref, max_new_tokens=limit)]


def _labelled(found: Labelled) -> dict[str, Any]:
    if isinstance(found, Prediction):
        return {"label": found.label, "score": found.score, "scores": found.scores}
    return {"words": [w.word for w in found], "tags": [w.tag for w in found], "scores": [w.score for w in found]}


def _joined(row: Row, added: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {**row, **{f"{prefix}{name}": value for name, value in added.items()}}
