"""Answer rows of a file with a stored version: each row is kept, what the adapter says is added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..bases.quiet import quiet
from ..events import Listener, Progress, ignore
from ..names import Ref
from ..runtime.runtime import Runtime
from ..tasks.classify import Classify
from ..tasks.rows import Row, Rows
from ..tasks.task import Task

_ADDED = ("label", "score", "scores", "answer")


def predict_rows(
    runtime: Runtime, ref: str | Ref, rows: Rows, *, field: str | None = None, on_event: Listener = ignore
) -> Iterator[dict[str, Any]]:
    """Each row with `label`, `score` and `scores`, or with `answer`; the names begin with `predicted_` where a row has
    one of them already, so that nothing is lost.

    Args:
        field: the column to read, instead of what the adapter's task reads (`text` where its card names no task).

    Raises:
        DataError: a row lacks a column.
        NotFound, BaseMismatch, AdapterMismatch: the adapter cannot be served.
    """
    resolved = runtime.load(ref)
    task = runtime.task(resolved)
    if task and field is None:
        texts = task.inputs(rows)
    else:
        texts = [str(rows.field(i, field or "text")) for i in range(len(rows))]
    prefix = "predicted_" if any(name in row for row in rows for name in _ADDED) else ""
    title = f"answering with {resolved}"
    for start in range(0, len(texts), runtime.batch_size):
        on_event(Progress(title, start, len(texts), "rows"))
        with quiet():
            said = _answers(runtime, resolved, task, texts[start : start + runtime.batch_size])
        for row, added in zip(rows[start : start + runtime.batch_size], said, strict=True):
            yield _joined(row, added, prefix)
    on_event(Progress(title, len(texts), len(texts), "rows"))


def _answers(runtime: Runtime, ref: Ref, task: Task | None, texts: Sequence[str]) -> list[dict[str, Any]]:
    if isinstance(task, Classify) or (task is None and runtime.base.kind == "encoder"):
        made = runtime.predict(texts, ref)
        return [{"label": p.label, "score": p.score, "scores": p.scores} for p in made]
    limit = int(task.config["max_new_tokens"]) if task else 64
    return [{"answer": answer} for answer in runtime.answer(texts, ref, max_new_tokens=limit)]


def _joined(row: Row, added: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {**row, **{f"{prefix}{name}": value for name, value in added.items()}}
