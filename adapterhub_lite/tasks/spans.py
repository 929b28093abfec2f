"""Spans of tagged words, and how well they were found, as conlleval counts them (CoNLL-2000, arXiv cs/0009008)."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[str, int, int]
"""Type, first word, and the word after the last."""
OUTSIDE = "O"
_FIRST, _INSIDE, _LAST, _ONLY = "B", "I", "E", "S"
# BILOU says L and U where BIOES says E and S.
_PREFIXES = {"B": _FIRST, "I": _INSIDE, "E": _LAST, "L": _LAST, "S": _ONLY, "U": _ONLY}


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans that the tags of a text mark, in order.

    An I- after O, or after a span of another type, begins a span, as in conlleval. Tags without a prefix mark runs of
    equal tags; "O" marks nothing.
    """
    found: list[Span] = []
    before, kind_before = OUTSIDE, ""
    for i, tag in enumerate(tags):
        part, kind = _split(tag)
        inside = part in (_INSIDE, _LAST) and before in (_FIRST, _INSIDE) and kind == kind_before
        if inside:
            found[-1] = (kind, found[-1][1], i + 1)
        elif part != OUTSIDE:
            found.append((kind, i, i + 1))
        before, kind_before = part, kind
    return found


def span_scores(answers: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of spans over all texts together, and the share of words whose tag is right.

    A span counts if type and both ends are right. Where nothing is marked a figure is 0, as conlleval has it.
    """
    right = marked = wanted = hits = words = 0
    for said, true in zip(answers, expected, strict=True):
        own, other = set(spans(said)), set(spans(true))
        right, marked, wanted = right + len(own & other), marked + len(own), wanted + len(other)
        hits, words = hits + sum(a == b for a, b in zip(said, true, strict=True)), words + len(true)
    return {
        "f1": 2 * right / (marked + wanted) if right else 0.0,
        "precision": right / marked if right else 0.0,
        "recall": right / wanted if right else 0.0,
        "accuracy": hits / words if words else 0.0,
    }


def _split(tag: str) -> tuple[str, str]:
    """Place in a span and type of one tag."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    return (_PREFIXES[prefix], kind) if dash and prefix in _PREFIXES else (_INSIDE, tag)
