"""Figures that this store measured when it made a version, so that they are not measured again.

As in `figures`, what the card of an imported version says is a claim, and no evidence.
"""

from __future__ import annotations

from ..formats.card import Card
from ..names import Ref
from ..store import Store
from .data import split_task
from .figures import Figure, Question, judge_of, own_fingerprint

_MADE_HERE = ("trained", "combined", "converted")


def own_metrics(store: Store, ref: Ref, card: Card, part: str, base: str) -> dict[str, float] | None:
    """The metrics of a resolved version on a split of its card, or on part of one, if they were measured here.

    Args:
        part: as `part_name` has it.
        base: the fingerprint (with quantisation) of the base that they must have been measured on.
    """
    if card.origin.get("kind") not in _MADE_HERE or own_fingerprint(card) != base:
        return None
    found = card.metrics.get(part)
    if not found or store.received(ref) is not None:
        return None
    return dict(found)


def figure_of_made(store: Store, ref: Ref, card: Card, question: Question, base: str) -> Figure | None:
    """The answer to a question of promoting, where it was measured when the version was made of others.

    Only what the version answered in its own task counts: it was asked the rows of its parents in theirs.
    """
    if judge_of(card.task) != question.judge:
        return None
    for split, told in card.data.items():
        if told.get("sha256") != question.data_sha256 or judge_of(split_task(card, split)) != question.judge:
            continue
        value = (own_metrics(store, ref, card, split, base) or {}).get(question.metric)
        if value is not None and 0 <= value <= 1:
            return Figure(value, str(ref.digest), base, "card", card.created)
    return None
