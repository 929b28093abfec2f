"""The training loop: learners step by step beside each other, each as if it were alone."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ..errors import TrainingFailed, TrainingInterrupted
from ..events import Evaluated, Listener, Step
from .batches import row_key
from .computation import Computation, Sums
from .member import FAILED, RUNNING, Member

# Speed and remaining time are those of the last steps: the first ones are slower.
_WINDOW = 20
_SMOOTHING = 0.9


class Keeper(Protocol):
    """Writes checkpoints."""

    def after_step(self, members: Sequence[Member], evaluated: bool) -> None:
        """Write one, if it is time for it: after a step, or (`evaluated`) an evaluation or the last step."""

    def save(self, members: Sequence[Member]) -> bool:
        """Write one; whether there is one of this state."""
        ...


Referee = Callable[[Sequence[Member], bool], None]
"""Told all members, and whether any has just been measured; may `stop` some. Those that go on are unchanged by it."""


def run_loop(
    members: Sequence[Member],
    computation: Computation,
    on_event: Listener,
    keeper: Keeper | None = None,
    wish: Callable[[], int] = lambda: 0,
    referee: Referee | None = None,
) -> None:
    """Train all members to their end; those that failed say so in `failure`, the others are unchanged by it.

    Args:
        wish: the number of the signal that asked to stop, or 0.
        referee: asked before every step who is to go on.

    Raises:
        TrainingInterrupted: `wish` asked for it; the state is kept if there is a keeper.
        TrainingFailed: memory ran out.
    """
    pace = {member.index: _Pace(member) for member in members}
    while True:
        evaluated = _evaluate_due(members, computation, on_event, wish)
        if referee:
            referee(members, evaluated)
        active = [member for member in members if member.is_active]
        if number := wish():
            kept = keeper.save(members) if keeper else False
            raise TrainingInterrupted.by(number, max(member.step for member in members), kept)
        if keeper:
            keeper.after_step(members, evaluated or not active)
        if not active:
            break
        try:
            _one_step(active, computation)
        except torch.OutOfMemoryError as error:
            raise _no_memory(active[0], keeper.save(members) if keeper else False) from error
        for member in active:
            pace[member.index].tick()
            if member.status == RUNNING:
                on_event(pace[member.index].event())
    for member in members:
        if member.status != FAILED:
            member.finish()


def _one_step(active: Sequence[Member], computation: Computation) -> None:
    """Gradients of the mean loss over all supervised items of each member's step, clipped, and one update."""
    for member in active:
        member.optimizer.clear()
    # What a model draws in ways that we do not know is a function of seed and step, too.
    torch.manual_seed(row_key(active[0].config.seed, active[0].step, -1))
    sums = computation.gradients([row for member in active for row in member.rows()])
    for member in active:
        member.learn(sums[member.index])


def _evaluate_due(
    members: Sequence[Member], computation: Computation, on_event: Listener, wish: Callable[[], int]
) -> bool:
    """Measure those whose time it is, until a wish to stop; whether any was."""
    done = False
    for member in members:
        if not member.owes_evaluation or (sums := _evaluate(member, computation, wish)) is None:
            continue
        metrics = member.evaluated(sums)
        if member.status != FAILED:
            on_event(Evaluated("validation", member.step, metrics, member.course.name, member.watch.told))
        done = True
    return done


def _evaluate(member: Member, computation: Computation, wish: Callable[[], int]) -> Sums | None:
    """Sums of all validation rows with all dropout off; None if a wish to stop came before the end."""
    whole = Sums()
    for rows in member.validation_rows():
        if wish():
            return None
        found = computation.losses(rows)[member.index]
        whole.total, whole.count = whole.total + found.total, whole.count + found.count
        whole.hits = whole.hits if found.hits is None else (whole.hits or 0) + found.hits
    return whole


def failed(member: Member, kept: int) -> TrainingFailed:
    """What to raise for a member that diverged. Going on from a checkpoint helps only where the machine erred.

    Args:
        kept: the step whose state is kept; 0: none.
    """
    note = ""
    if kept:
        note = (
            f" If the machine erred, `ahl train --resume` goes on from step {min(kept, member.step)}, which is kept "
            "until `ahl gc --runs`."
        )
    return TrainingFailed(
        member.failure,
        f"Lower training.learning_rate ({member.config.learning_rate:g}) or add training.warmup, and start again "
        "(--from-scratch). Nothing was published." + note,
    )


def _no_memory(member: Member, kept: bool) -> TrainingFailed:
    return TrainingFailed(
        f"Out of memory at step {member.step + 1} with batch_size {member.config.batch_size}.",
        "Lower training.pack_tokens or set training.checkpointing: true; `ahl plan` says what fits."
        + _kept_note(kept, member.step),
    )


def _kept_note(kept: bool, step: int) -> str:
    return f" What was learnt up to step {step} is kept: `ahl train --resume` goes on from there." if kept else ""


class _Pace:
    """How fast a member is, and its progress as an event."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._before = member.history.seconds
        self._started = time.perf_counter()
        self._recent = deque([(self._started, member.history.tokens)], maxlen=_WINDOW + 1)
        self._smoothed = 0.0
        self._weight = 0.0
        for loss in member.history.losses:
            self._push(loss)

    def tick(self) -> None:
        """A step is done."""
        history, now = self._member.history, time.perf_counter()
        history.seconds = self._before + now - self._started
        self._recent.append((now, history.tokens))
        if self._member.status == RUNNING:
            self._push(history.losses[-1])

    def event(self) -> Step:
        """The step that was done."""
        member = self._member
        done, total = member.step, member.order.total
        seconds = self._recent[-1][0] - self._recent[0][0]
        speed = (self._recent[-1][1] - self._recent[0][1]) / max(seconds, 1e-9)
        eta = (total - done) * seconds / max(len(self._recent) - 1, 1)
        rate = member.rate(done - 1)
        return Step(
            done, total, done / member.order.steps_per_epoch, member.history.losses[-1], rate, speed, eta,
            learner=member.course.name, smoothed=self._smoothed / self._weight, memory=_memory(),
        )  # fmt: skip

    def _push(self, loss: float) -> None:
        self._smoothed = _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * loss
        self._weight = _SMOOTHING * self._weight + 1 - _SMOOTHING


def _memory() -> int:
    """The most bytes that the device, or this process on a CPU, has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
