"""When to stop, and which step was best, by the figures of the validation part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RISING = frozenset({"accuracy"})


@dataclass
class Watch:
    """Remembers the best evaluation.

    Attributes:
        patience: evaluations without a better one, after which training stops; None: never.
        metric: loss (the lower the better) or accuracy.
        waited: evaluations since the best.
    """

    metric: str = "loss"
    patience: int | None = None
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def see(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take note of an evaluation, of finite numbers; returns whether it is the best so far."""
        value = metrics[self.metric]
        sign = 1 if self.metric in _RISING else -1
        if self.best is None or sign * value > sign * self.best:
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def has_enough(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def told(self) -> dict[str, float]:
        """The best so far and its step, for who watches; nothing before the first evaluation."""
        return {} if self.best is None else {self.metric: self.best, "step": self.best_step}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
