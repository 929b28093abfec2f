"""Who goes on in a search: at evaluations, by what others had there, and by the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..training.member import STOPPED, Member
from .search_draw import worse_than_median
from .search_space import Space
from .search_trials import CUT, OPEN, PRUNED, Trial

HALVING, MEDIAN, NONE = "halving", "median", "none"
PRUNERS = (HALVING, MEDIAN, NONE)
RUNGS = (0.25, 0.5)
"""Shares of all steps at which the worse half ends."""


class Clock:
    """The budget of a search in seconds; None: without end."""

    def __init__(self, budget: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._begun, self.budget = now, now(), budget

    @property
    def now(self) -> float:
        """Seconds since the search began, or went on."""
        return self._now() - self._begun

    @property
    def left(self) -> float:
        """Seconds."""
        return math.inf if self.budget is None else self.budget - self.now


@dataclass
class _Seen:
    """When a member was last measured, by the clock."""

    at: float
    count: int = 0


class Judge:
    """Asked before every step of a group (`loop.Referee`); `states` says whom it ended, by number of the trial.

    Attributes:
        totals: steps that each trial would have.

    Args:
        trials: of the group, in the order of its members.
        others: all other trials of the search.
    """

    def __init__(
        self, trials: Sequence[Trial], others: Sequence[Trial], space: Space, pruner: str, clock: Clock
    ) -> None:
        self._trials, self._others, self._space = list(trials), list(others), space
        self._pruner, self._clock = pruner, clock
        self._seen: dict[int, _Seen] = {}
        self.states: dict[int, str] = {}
        self.totals: dict[int, int] = {}

    def __call__(self, members: Sequence[Member], evaluated: bool) -> None:
        """End those that have lost, or cannot be measured once more in time."""
        if not self.totals:
            self._meet(members)
        fresh = [member for member in members if self._is_fresh(member)]
        for member in self._losers(members, fresh):
            self._end(member, PRUNED)
        for member in members:
            if member.is_active and self._is_late(member):
                self._end(member, CUT)
        for member in fresh:
            seen = self._seen[member.index]
            seen.at, seen.count = self._clock.now, len(member.history.evaluations)

    def _meet(self, members: Sequence[Member]) -> None:
        """Before the first step; those that had lost when the run was broken off are known by having stopped."""
        for member in members:
            number = self._trials[member.index].number
            self.totals[number] = member.order.total
            if member.status == STOPPED and not member.watch.has_enough:
                self.states[number] = PRUNED

    def _end(self, member: Member, state: str) -> None:
        if member.is_active:
            member.stop()
            self.states[self._trials[member.index].number] = state

    def _is_fresh(self, member: Member) -> bool:
        """Whether it has been measured since it was last asked."""
        seen = self._seen.setdefault(member.index, _Seen(self._clock.now, len(member.history.evaluations)))
        return len(member.history.evaluations) > seen.count

    def _is_late(self, member: Member) -> bool:
        """At an evaluation: whether the time until the next, as long as that to this, is not left.

        Between evaluations: whether none is left at all, and something is known of it.
        """
        seen = self._seen[member.index]
        if not member.history.evaluations:
            return False
        if len(member.history.evaluations) > seen.count:
            return self._clock.left < self._clock.now - seen.at
        return self._clock.left <= 0

    def _losers(self, members: Sequence[Member], fresh: Sequence[Member]) -> list[Member]:
        if self._pruner == MEDIAN:
            return [member for member in fresh if member.is_active and self._is_behind(member)]
        if self._pruner == HALVING:
            return [member for member in fresh if member.is_active and self._is_in_worse_half(member, members)]
        return []

    def _is_behind(self, member: Member) -> bool:
        values = {i: one["loss"] for i, one in enumerate(member.history.evaluations)}
        return worse_than_median(self._space, [one for one in self._others if one.state != OPEN], values)

    def _is_in_worse_half(self, member: Member, members: Sequence[Member]) -> bool:
        """Successive halving (Jamieson and Talwalkar, AISTATS 2016), with those of earlier rounds beside (ASHA, Li et
        al., MLSys 2020): at a rung the better half of all that came so far goes on.
        """
        evaluations = member.history.evaluations
        before = evaluations[-2]["step"] if len(evaluations) > 1 else 0
        total = member.order.total
        for share in RUNGS:
            if not before < share * total <= evaluations[-1]["step"]:
                continue
            own = loss_at(evaluations, total, share)
            peers = [loss_at(one.history.evaluations, one.order.total, share) for one in members if one is not member]
            peers += [loss_at(one.evaluations, one.total, share) for one in self._others]
            known = [value for value in peers if value is not None]
            better = sum(value < (own or 0.0) for value in known)
            if better >= math.ceil((len(known) + 1) / 2):
                return True
        return False


def loss_at(evaluations: Sequence[Mapping[str, float]], total: int, share: float) -> float | None:
    """The least loss up to the first evaluation at or after this share of all steps; None if there was none."""
    least = math.inf
    for one in evaluations:
        least = min(least, one["loss"])
        if one["step"] >= share * total:
            return least
    return None
