"""A computation in float64 that needs no base: a softmax over classes of a bag of tokens, with dropout by row keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapterhub_lite.recipe import TrainingConfig
from adapterhub_lite.tasks.task import Example
from adapterhub_lite.training.computation import Row, Sums
from adapterhub_lite.training.loop import run_loop
from adapterhub_lite.training.member import Course, Member

TOKENS, CLASSES, WIDTH = 16, 3, 5


class StandIn:
    """A learner's tensors: an embedding [TOKENS, WIDTH] and a head [CLASSES, WIDTH]."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        chance = torch.Generator().manual_seed(seed)
        shapes = ((TOKENS, WIDTH), (CLASSES, WIDTH))
        self.tensors = [nn.Parameter(torch.randn(s, generator=chance, dtype=dtype)) for s in shapes]

    def parameters(self) -> list[nn.Parameter]:
        return self.tensors


@dataclass
class Softmax:
    """`poison` makes the loss of one learner's rows infinite, from its n-th call on."""

    learners: Sequence[StandIn]
    dropout: float = 0.0
    poison: dict[int, int] = field(default_factory=dict)
    before: Callable[[str], None] = lambda what: None
    calls: int = 0
    name = "stand-in"
    why = "tests"

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        self.before("gradients")
        self.calls += 1
        return self._sums(rows, True)

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        self.before("losses")
        with torch.no_grad():
            return self._sums(rows, False)

    def _sums(self, rows: Sequence[Row], learns: bool) -> list[Sums]:
        made = [Sums(hits=0) for _ in self.learners]
        for row in rows:
            sums, (embedding, head) = made[row.learner], self.learners[row.learner].tensors
            hidden = embedding[torch.tensor(row.example.ids)].mean(0)
            if learns and self.dropout:
                kept = torch.tensor([(row.key >> (5 * i)) % 32 >= 32 * self.dropout for i in range(WIDTH)])
                hidden = hidden * kept
            logits = head @ hidden
            loss = logits.logsumexp(0) - logits[row.example.labels[0]]
            if learns and self.calls >= self.poison.get(row.learner, self.calls + 1):
                loss = loss * float("inf")
            if learns:
                loss.backward()
            sums.total += float(loss.detach())
            sums.count += 1
            sums.tokens += len(row.example.ids)
            sums.hits += int(logits.argmax() == row.example.labels[0])
        return made


def examples(count: int, seed: int = 0) -> list[Example]:
    """Texts whose class is that of their first token."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, TOKENS, (int(torch.randint(1, 6, (1,), generator=chance)),), generator=chance).tolist()
        made.append(Example(ids, [ids[0] % CLASSES]))
    return made


def config(**changes: Any) -> TrainingConfig:
    """A short run with validation every two steps."""
    return TrainingConfig(**{"epochs": 3, "batch_size": 4, "learning_rate": 0.05, "eval_every": 2, **changes})


def members(courses: Sequence[Course], dtype: torch.dtype = torch.float64) -> tuple[list[Member], list[StandIn]]:
    """A member for each course, whose values depend on its seed alone."""
    learners = [StandIn(course.config.seed, dtype) for course in courses]
    made = [Member(i, learner, c) for i, (learner, c) in enumerate(zip(learners, courses, strict=True))]  # type: ignore[arg-type]
    return made, learners


def run(courses: Sequence[Course], on_event: Any = lambda event: None, **more: Any) -> list[Member]:
    """Train on the stand-in to the end."""
    made, learners = members(courses)
    dropout, poison = more.pop("dropout", 0.0), more.pop("poison", {})
    before = more.pop("before", lambda what: None)
    run_loop(made, Softmax(learners, dropout, poison, before), on_event, **more)  # type: ignore[arg-type]
    return made
