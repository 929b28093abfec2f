"""Answers and metrics of an adapter, or of the bare base, on rows of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import Unsupported
from ..events import Listener, Progress, ignore
from ..names import Ref
from ..runtime.labelling import Input
from ..runtime.runtime import Runtime
from ..tasks.classify import Classify
from ..tasks.rows import Rows
from ..tasks.tag import Tag
from ..tasks.task import Task


@dataclass(frozen=True)
class Evaluation:
    """Metrics in 0..1 and the answer to each row."""

    metrics: dict[str, float]
    answers: list[str]


def evaluate(
    runtime: Runtime, task: Task, rows: Rows, adapter: str | Ref | None, on_event: Listener = ignore, title: str = ""
) -> Evaluation:
    """Let `adapter` (None: the bare base) answer `rows` and measure the answers.

    Raises:
        Unsupported: the bare base cannot do the task (an encoder has no head).
        DataError: a row lacks a field.
    """
    texts: Sequence[Input] = task.words(rows) if isinstance(task, Tag) else task.inputs(rows)
    step = runtime.batch_size
    answers: list[str] = []
    title = title or f"evaluating {adapter or 'the base'}"
    for start in range(0, len(texts), step):
        on_event(Progress(title, start, len(texts), "rows"))
        answers += _answers(runtime, task, texts[start : start + step], adapter)
    on_event(Progress(title, len(texts), len(texts), "rows"))
    return Evaluation(dict(task.metrics(rows, answers)), answers)


def _answers(runtime: Runtime, task: Task, inputs: Sequence[Input], adapter: str | Ref | None) -> list[str]:
    base = runtime.base
    if isinstance(task, Tag):
        return [" ".join(word.tag for word in row) for row in runtime.tag(inputs, adapter)]
    texts = [str(one) for one in inputs]
    if isinstance(task, Classify):
        if base.kind == "encoder":
            if adapter is None:
                raise Unsupported("The bare encoder has no head for this task.", "Name an adapter.")
            return [p.label for p in runtime.predict(texts, adapter)]
        return [p.label for p in runtime.score_words(texts, task, adapter)]
    ids = [task.encode(text, base.tokenizer, base.kind, 0) for text in texts]
    return runtime.generate_ids(ids, adapter, int(task.config["max_new_tokens"]))
