"""Figures of versions that were measured here before, so that a decision need not measure them again.

Only what this store measured itself counts: the card of a version that was trained here, and the decisions in the logs
of its aliases. What the card of an imported version says is a claim, and no evidence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import StoreError
from ..formats.card import Card
from ..names import Ref
from ..store import Store


@dataclass(frozen=True)
class Figure:
    """A metric (0..1) of one version.

    Attributes:
        digest, base: of the version, and the fingerprint (with quantisation) of the base it was measured on.
        source: "now", "card" (when it was trained) or "log" (for an earlier decision).
        time: when it was measured, UTC.
    """

    value: float
    digest: str
    base: str
    source: str
    time: str


@dataclass(frozen=True)
class Question:
    """What was measured: the metric, the rows, and how answers were judged. Figures of one question compare."""

    metric: str
    data_sha256: str
    judge: str

    def matches(self, reason: Mapping[str, Any]) -> bool:
        """Whether a decision answered this question."""
        told = (reason.get("metric"), reason.get("data_sha256"), reason.get("judge"))
        return told == (self.metric, self.data_sha256, self.judge)


def judge_of(task: Mapping[str, Any]) -> str:
    """Digest of a task's configuration without `max_length`, which is of its training."""
    told = {key: value for key, value in task.items() if key != "max_length"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def recorded(store: Store, ref: Ref, card: Card, question: Question, base: str, alias: str) -> Figure | None:
    """The figure of a resolved version on the base with this fingerprint, if it was measured here before."""
    return _of_card(store, ref, card, question, base) or _of_logs(store, ref, question, base, alias)


def own_fingerprint(card: Card) -> str | None:
    """The fingerprint of the base that a card names."""
    mark = card.base.get("fingerprint") or {}
    digest = mark.get("digest") if mark.get("weights") and mark.get("quantization") else None
    return digest or None


def _of_card(store: Store, ref: Ref, card: Card, question: Question, base: str) -> Figure | None:
    trained_here = card.origin.get("kind") == "trained" and store.received(ref) is None
    if not trained_here or own_fingerprint(card) != base or judge_of(card.task) != question.judge:
        return None
    for split, metrics in card.metrics.items():
        same_rows = (card.data.get(split) or {}).get("sha256") == question.data_sha256
        if same_rows and _is_share(metrics.get(question.metric)):
            return Figure(metrics[question.metric], str(ref.digest), base, "card", card.created)
    return None


def _of_logs(store: Store, ref: Ref, question: Question, base: str, alias: str) -> Figure | None:
    """The latest first, of this alias before others."""
    for name in dict.fromkeys([alias, *store.aliases(ref.name)]):
        with suppress(StoreError):  # another alias's log may be damaged
            for move in reversed(store.alias_history(ref.name, name)):
                if not question.matches(move.reason):
                    continue
                for value, digest, on, time in _told(move.reason):
                    if (digest, on) == (ref.digest, base):
                        return Figure(value, str(digest), base, "log", time or move.time)
    return None


def _told(reason: Mapping[str, Any]) -> Iterator[tuple[float, str, str, str]]:
    for key in ("candidate_figure", "current_figure"):
        figure = reason.get(key)
        if isinstance(figure, dict) and _is_share(figure.get("value")):
            yield figure["value"], *(str(figure.get(part) or "") for part in ("digest", "base", "time"))  # type: ignore[misc]


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
