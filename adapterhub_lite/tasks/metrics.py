"""Metrics: each scores answers in 0..1. A text metric takes (answer, reference, row)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .sql_execution import sql_execution

# Scripts that put no space between words: each character counts as one.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


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


def rouge_l(answer: str, reference: str, row: Mapping[str, Any]) -> float:
    """How much of two texts is common, word by word in the same order: the harmonic mean of the shares of both.

    ROUGE-L (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004) without stems, by which instruction
    tuning is measured (Super-NaturalInstructions, arXiv 2204.07705). Case and punctuation do not count; where neither
    text has a word the texts are compared as they are.
    """
    ours, theirs = (_WORD.findall(text.casefold()) for text in (answer, reference))
    if not ours and not theirs:
        return exact_match(answer, reference, row)
    return 2 * _longest_common(ours, theirs) / (len(ours) + len(theirs))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Words of the longest common subsequence, by bits: a zero for each (Hyyro, "Bit-parallel LCS-length computation
    revisited", 2004).
    """
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(first)) - 1
    open_ = every
    for word in second:
        met = open_ & places.get(word, 0)
        open_ = ((open_ + met) | (open_ - met)) & every
    return len(first) - open_.bit_count()


METRICS: dict[str, Callable[[str, str, Mapping[str, Any]], float]] = {
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "sql_execution": sql_execution,
}
