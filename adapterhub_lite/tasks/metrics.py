"""Metrics: each scores answers in 0..1. A text metric takes (answer, reference, row)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .sql_execution import sql_execution


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are equal."""
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(expected)


def macro_f1(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Mean over the expected labels of the harmonic mean of precision and recall."""
    scores = []
    for label in sorted(set(expected)):
        both = sum(a == e == label for a, e in zip(answers, expected, strict=True))
        scores.append(2 * both / (sum(a == label for a in answers) + sum(e == label for e in expected)))
    return sum(scores) / len(scores)


def exact_match(answer: str, reference: str, row: Mapping[str, Any]) -> float:
    """1 if the texts are equal but for white space."""
    return float(" ".join(answer.split()) == " ".join(reference.split()))


METRICS: dict[str, Callable[[str, str, Mapping[str, Any]], float]] = {
    "exact_match": exact_match,
    "sql_execution": sql_execution,
}
