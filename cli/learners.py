"""What is known of each learner while it trains, and how it is shown in as much room as there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..events import Evaluated, Step
from .progress import Smoothed, best_text
from .render import counted, cut, printable, seconds, size, sparkline

_BUCKETS = 128  # figures of a trail; a power of two
_LEAST, _MOST = 8, 24  # columns of a name
_SPARK, _SHORT_SPARK = 48, 16
_STALE = 2  # steps that others are ahead of one who has left


class Trail:
    """A whole run's losses in little room: means of as many steps each, neighbours joined when there are too many."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1
        self._sum, self._count = 0.0, 0

    def push(self, value: float) -> None:
        """Add the loss of a step."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        means = [*self._means, self._sum / self._count]
        if len(means) == _BUCKETS:
            means = [(a + b) / 2 for a, b in zip(means[::2], means[1::2], strict=True)]
            self._each *= 2
        self._means, self._sum, self._count = means, 0.0, 0  # a new list: another thread may be drawing the old one

    def values(self) -> Sequence[float]:
        """The means, the oldest first."""
        return self._means


class Learner:
    """One learner: its last step, its last evaluation, the best, and the way of its loss."""

    def __init__(self, name: str) -> None:
        self.name = printable(name)
        self.step: Step | None = None
        self.smoothed = 0.0
        self.trail = Trail()
        self.evaluated: Evaluated | None = None
        self._own = Smoothed()

    def hear(self, event: Step) -> None:
        """A step was done."""
        self.smoothed = self._own.push(event.loss) if event.smoothed is None else event.smoothed
        self.trail.push(event.loss)
        self.step = event

    @property
    def is_done(self) -> bool:
        """Whether its last step is done."""
        return self.step is not None and self.step.step >= self.step.total


def ended_line(learner: Learner) -> str:
    """What remains of one who has ended: `sql: trained 300 steps: loss 1.234, 512 tokens/s`."""
    step = learner.step
    assert step is not None
    whose = f"{learner.name}: " if learner.name else ""
    done = (
        f"trained {counted(step.total, 'steps')}"
        if learner.is_done
        else f"ended after step {step.step:,} of {step.total:,}"
    )
    return f"  {whose}{done}: loss {learner.smoothed:.3f}, {step.tokens_per_second:,.0f} tokens/s"


def bar_facts(learners: Sequence[Learner]) -> tuple[int, int, list[str]]:
    """Steps done and to do, and what to say beside the bar of them all, the most important first."""
    steps = [one.step for one in learners if one.step is not None]
    going = [step for step in steps if step.step < step.total] or steps
    facts = [
        f"{max(step.step for step in steps)}/{max(step.total for step in steps)}",
        f"eta {seconds(max(step.eta for step in going))}",
        f"{sum(step.tokens_per_second for step in going):,.0f} tokens/s",
    ]
    memory = max(step.memory for step in steps)
    return (
        sum(step.step for step in steps),
        sum(step.total for step in steps),
        [*facts, *([f"memory {size(memory)}"] if memory else [])],
    )


def details(learner: Learner, width: int, left_out: Iterable[str] = ()) -> list[str]:
    """Lines below the bar of one learner; `left_out` are facts for which there was no room beside it."""
    step = learner.step
    if step is None:
        return []
    facts = [
        *left_out,
        f"loss {step.loss:.3f}",
        f"smoothed {learner.smoothed:.3f}",
        f"lr {step.learning_rate:.1e}",
        f"epoch {step.epoch:.1f}",
    ]
    lines = flowed(facts, width - 2)
    if (event := learner.evaluated) is not None:
        figures = [f"{name} {value:.3f}" for name, value in event.metrics.items()]
        best = best_text(event.best)
        lines += flowed([f"{event.split} (step {event.step})", *figures, *([best] if best else [])], width - 2)
    trail = learner.trail.values()
    if len(trail) > 1:
        ends = f" {trail[0]:.3f} to {trail[-1]:.3f}"
        room = min(_SPARK, width - 2 - len(ends))
        lines += [f"{sparkline(trail, room)}{ends}"] if room >= _LEAST else []
    return [f"  {line}"[:width] for line in lines]


def flowed(parts: Iterable[str], width: int) -> list[str]:
    """Lines with as many parts on each as fit, two columns between them."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def rows(learners: Sequence[Learner], width: int, height: int) -> list[str]:
    """A line for each of several learners, below a head; where there is no room the least important columns go."""
    furthest = max((one.step.step for one in learners if one.step is not None), default=0)
    shown = list(learners)
    if len(shown) + 1 > height:  # those that still train come first
        shown = sorted(shown, key=lambda one: one.is_done)[: max(height - 2, 1)]
    told = [_cells(one, furthest) for one in shown]
    name = min(max((len(one.name) for one in learners), default=0), _MOST)
    kept = _kept(told, min(name, max(_LEAST, width // 3)), width)
    sizes = {title: max(len(title), *(len(cells[title]) for cells in told)) for title in kept[1:]}
    first = min(name, max(width - sum(size + 2 for size in sizes.values()), 1))
    lines = ["  ".join([" " * first, *(title.rjust(sizes[title]) for title in kept[1:])])]
    for one, cells in zip(shown, told, strict=True):
        rest = [cells[title].rjust(sizes[title]) if title else cells[title] for title in kept[1:]]
        lines.append("  ".join([cut(one.name, first).ljust(first), *rest]).rstrip())
    if len(shown) < len(learners):
        lines.append(f"and {len(learners) - len(shown)} more")
    return [line[:width] for line in lines]


_COLUMNS = ("name", "step", "smoothed", "validation", "best", "lr", "loss", "tokens/s", "")
"""The most important first; the last is the way of the loss."""


def _cells(learner: Learner, furthest: int) -> Mapping[str, str]:
    step, event = learner.step, learner.evaluated
    if step is None:
        return dict.fromkeys(_COLUMNS, "")
    place = f"{step.step}/{step.total}"
    if learner.is_done or step.step + _STALE <= furthest:
        place = f"ended {step.step}"
    return {
        "name": learner.name,
        "step": place,
        "smoothed": f"{learner.smoothed:.3f}",
        "validation": _figure(event.metrics) if event else "",
        "best": _figure(event.best, at=True) if event else "",
        "lr": f"{step.learning_rate:.1e}",
        "loss": f"{step.loss:.3f}",
        "tokens/s": f"{step.tokens_per_second:,.0f}",
        "": sparkline(learner.trail.values(), _SHORT_SPARK),
    }


def _figure(told: Mapping[str, Any], at: bool = False) -> str:
    """The first figure, with its step: `0.512 (100)`."""
    value = next((value for key, value in told.items() if key != "step"), None)
    if value is None:
        return ""
    return f"{value:.3f} ({told['step']:.0f})" if at and "step" in told else f"{value:.3f}"


def _kept(told: Sequence[Mapping[str, str]], name: int, width: int) -> list[str]:
    """The columns that fit, by their importance and in that order."""
    kept, used = [_COLUMNS[0]], name
    for title in _COLUMNS[1:]:
        size = max((len(cells[title]) for cells in told), default=0)
        if size:
            used += max(size, len(title)) + 2
            if used > width:
                break
            kept.append(title)
    return kept
