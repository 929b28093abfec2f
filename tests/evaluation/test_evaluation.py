"""Evaluation against metrics counted by hand from answers given one at a time."""

from __future__ import annotations

import pytest

from adapterhub_lite.errors import DataError, Unsupported
from adapterhub_lite.evaluation.evaluate import evaluate
from adapterhub_lite.events import Progress
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.registry import make_task
from adapterhub_lite.tasks.rows import Rows
from tests.runtime import build

LABELS = ["x", "y", "z"]


def rows(*items: dict) -> Rows:
    return Rows(tuple(items), tuple(range(1, len(items) + 1)), "some.jsonl", "0" * 64)


TEXTS = ["good film", "bad", "a long and winding text", "so so", "?", "one more", "and another", "last"]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("batch", [3, 32])
def test_accuracy_is_counted(tiny_base, family: str, batch: int):
    base = tiny_base(family)
    runtime = Runtime(base, Store(), batch_size=batch)
    task = make_task({"type": "classify", "text": "t", "label": "y", "labels": LABELS, "max_length": 64})
    ref = runtime.attach(build.lora(base, 1, labels=3), task)
    alone = [runtime.predict(text, ref)[0].label for text in TEXTS]
    data = rows(
        *({"t": text, "y": label if i % 3 else "x"} for i, (text, label) in enumerate(zip(TEXTS, alone, strict=True)))
    )
    seen = []
    found = evaluate(runtime, task, data, ref, seen.append)
    assert found.answers == alone
    right = sum(row["y"] == answer for row, answer in zip(data, alone, strict=True))
    assert found.metrics["accuracy"] == right / len(TEXTS)
    assert all(isinstance(e, Progress) for e in seen)
    assert [e.done for e in seen] == sorted(e.done for e in seen)
    assert (seen[0].done, seen[-1].done) == (0, len(TEXTS))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_exact_match_is_counted(tiny_base, family: str):
    base = tiny_base(family)
    runtime = Runtime(base, Store(), batch_size=3)
    task = make_task(
        {"type": "instruct", "prompt": "q", "completion": "a", "max_new_tokens": 5, "metrics": ["exact_match"]}
    )
    ref = runtime.attach(build.lora(base, 1), task)
    alone = [runtime.answer(text, ref, max_new_tokens=5)[0] for text in TEXTS]
    data = rows(
        *(
            {"q": text, "a": answer if i % 4 else "no"}
            for i, (text, answer) in enumerate(zip(TEXTS, alone, strict=True))
        )
    )
    found = evaluate(runtime, task, data, ref)
    assert found.answers == alone
    assert found.metrics == {"exact_match": 6 / 8}
    bare = evaluate(runtime, task, data, None)
    assert bare.answers != alone


def test_the_bare_encoder_has_no_head(tiny_base):
    base = tiny_base("bert")
    task = make_task({"type": "classify", "text": "t", "label": "y", "labels": LABELS})
    with pytest.raises(Unsupported, match="no head"):
        evaluate(Runtime(base, Store()), task, rows({"t": "a", "y": "x"}), None)


def test_a_row_without_its_field_is_named(tiny_base):
    base = tiny_base("llama")
    task = make_task({"type": "classify", "text": "t", "label": "y", "labels": LABELS})
    with pytest.raises(DataError, match="line 2: no field 't'"):
        evaluate(Runtime(base, Store()), task, rows({"t": "a", "y": "x"}, {"y": "x"}), None)
