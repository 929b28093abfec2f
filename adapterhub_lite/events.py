"""Typed progress events: the library reports, the caller renders.

Takes: facts from long work. Gives: frozen events to one listener. Never: prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """A new stage of long work begins, e.g. "train sql"."""

    title: str


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a named piece of work (download, conversion, evaluation). total 0: unknown."""

    title: str
    done: int
    total: int
    unit: str = ""


@dataclass(frozen=True)
class Step:
    """One optimiser step. `eta` in seconds, `tokens_per_second` counts real tokens without padding.

    `learner` names whose step it is where several are trained together; `smoothed` is a running mean of the loss,
    `memory` the most bytes held so far (on the device, or by the process), 0 where that is not known.
    """

    step: int
    total: int
    epoch: float
    loss: float
    learning_rate: float
    tokens_per_second: float
    eta: float
    learner: str = ""
    smoothed: float | None = None
    memory: int = 0


@dataclass(frozen=True)
class Evaluated:
    """Metrics of one evaluation; `split` is validation or test, `step` the optimiser step it was made at.

    `learner` names whose they are where several are trained together; `best` the best so far of the figure that decides
    (loss or accuracy), and its `step`.
    """

    split: str
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    learner: str = ""
    best: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """One line a person should read; `level` is info or warning."""

    text: str
    level: str = "info"


Event = Stage | Progress | Step | Evaluated | Note
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of callers that did not ask."""
