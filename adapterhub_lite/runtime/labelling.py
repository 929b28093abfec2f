"""Label the rows of a call: by classification heads, by label words, or some by each."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.fit import Fitted
from ..errors import Unsupported
from ..names import Ref
from ..tasks.classify import Classify
from .engine import Engine
from .forward import class_logits
from .predict import Prediction, from_logits, label_word_logits
from .prompting import check_lengths, class_ids


def label(engine: Engine, texts: Sequence[str], rows: Sequence[Ref | None]) -> list[Prediction]:
    """A prediction a row.

    Raises:
        Unsupported: a row without adapter, or whose adapter has no labels.
    """
    heads = [_has_head(engine, row) for row in rows]
    made: dict[int, Prediction] = {}
    for with_head, score in ((True, _by_heads), (False, _by_words)):
        chosen = [i for i, has in enumerate(heads) if has == with_head]
        found = score(engine, [texts[i] for i in chosen], [rows[i] for i in chosen])
        made |= dict(zip(chosen, found, strict=True))
    return [made[i] for i in range(len(texts))]


def score_words(
    engine: Engine, texts: Sequence[str], rows: Sequence[Ref | None], tasks: Sequence[Classify]
) -> list[Prediction]:
    """A prediction a row by how likely a causal base finds each label's word."""
    tokenizer, kind = engine.base.tokenizer, engine.base.kind
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


def _has_head(engine: Engine, row: Ref | None) -> bool:
    if row is None:
        raise Unsupported("The bare base has no labels.", "Name an adapter trained to classify.")
    return engine.fitted(row).head is not None


def _by_heads(engine: Engine, texts: list[str], rows: list[Ref | None]) -> list[Prediction]:
    ids = [_class_ids(engine, text, row) for text, row in zip(texts, rows, strict=True)]
    made: dict[int, Prediction] = {}
    for part in engine.parts(ids, rows):
        with engine.plan([rows[i] for i in part]) as plan:
            logits = class_logits(engine.base, engine.hooks, plan, [ids[i] for i in part])
            for i, fitted, one in zip(part, plan.rows, logits, strict=True):
                made[i] = from_logits(one, _labels(engine, rows[i], fitted))
    return [made[i] for i in range(len(texts))]


def _by_words(engine: Engine, texts: list[str], rows: list[Ref | None]) -> list[Prediction]:
    tasks = []
    for row in rows:
        task = engine.task(row) if row is not None else None
        if not isinstance(task, Classify):
            raise Unsupported(f"{row} was not trained to classify.", "Use generate(), or another adapter.")
        tasks.append(task)
    return score_words(engine, texts, rows, tasks)


def _class_ids(engine: Engine, text: str, row: Ref | None) -> list[int]:
    if row is None:
        return class_ids(engine.base, text, None, 0)
    return class_ids(engine.base, text, engine.task(row), engine.fitted(row).virtual_tokens)


def _labels(engine: Engine, ref: Ref | None, fitted: Fitted | None) -> list[str]:
    assert ref is not None
    assert fitted is not None
    assert fitted.head is not None
    task = engine.task(ref)
    if isinstance(task, Classify) and task.labels:
        return task.labels
    count = list(fitted.head.parameters())[-1].shape[0]
    return [f"LABEL_{i}" for i in range(count)]
