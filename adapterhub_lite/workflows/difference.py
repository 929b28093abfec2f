"""What differs between two stored versions, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..adapters.compare import Comparison


@dataclass(frozen=True)
class Side:
    """One of the two versions."""

    ref: str
    digest: str
    created: str
    type: str


@dataclass(frozen=True)
class Change:
    """A fact that differs: dotted path, and its value on both sides (None: not said)."""

    path: str
    a: Any
    b: Any


@dataclass(frozen=True)
class DataChange:
    """One split: its source, sha256 and rows on both sides; the same when the digests are."""

    split: str
    same: bool
    a: dict[str, Any] | None
    b: dict[str, Any] | None


@dataclass(frozen=True)
class MetricChange:
    """One metric of one split. The difference says something of the adapters only where the rows are the same."""

    split: str
    name: str
    a: float | None
    b: float | None
    same_data: bool

    @property
    def delta(self) -> float | None:
        """b - a."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True)
class ChangedAnswer:
    """A row (index in its split) that the two answer differently; prompt and reference where the data is at hand."""

    row: int
    a: str
    b: str
    prompt: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Answers:
    """Answers to rows of one split: recorded when the versions were made, or given now (`live`).

    `note` says why none could be compared.
    """

    split: str
    live: bool
    compared: int
    changed: tuple[ChangedAnswer, ...]
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """All that is known to differ between two versions.

    Attributes:
        same: the very same bytes, cards included.
        same_weights, same_config: the same tensors, the same configuration, byte for byte.
        recipe_note, weights_note: why there is no comparison, where there is none.
        outputs_refused: why no answers were given now although they were asked for; "" otherwise.
        made: adapter, task, seed, parents, origin, libraries and duration, as the cards have them.
    """

    a: Side
    b: Side
    same: bool
    same_weights: bool
    same_config: bool
    recipe: tuple[Change, ...]
    recipe_note: str
    base: tuple[Change, ...]
    data: tuple[DataChange, ...]
    metrics: tuple[MetricChange, ...]
    made: tuple[Change, ...]
    weights: Comparison | None
    weights_note: str
    answers: tuple[Answers, ...]
    outputs_refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        plain = asdict(replace(self, weights=None))
        metrics = [{**asdict(one), "delta": one.delta} for one in self.metrics]
        return {**plain, "metrics": metrics, "weights": self.weights.to_dict() if self.weights else None}
