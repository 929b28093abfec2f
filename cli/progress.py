"""Progress on stderr: a live display on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..events import Evaluated, Event, Listener, Note, Progress, Stage, Step
from .render import counted, metrics, printable, remark, seconds, size

_SMOOTHING = 0.9
_SHARE = 0.1
_PATIENCE = 10.0
_SETTLED = 2.0  # seconds after which a pace is one


@contextmanager
def reporting(*, terse: bool = False) -> Iterator[Listener]:
    """A listener that shows what it hears.

    Args:
        terse: for commands whose answer is what counts: nothing remains of it but warnings.
    """
    if _is_live():
        from .live import LiveReport

        with LiveReport(terse) as live:
            yield live
    else:
        yield PlainReport(terse)


def _is_live() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "")


class Smoothed:
    """A running mean of the loss that starts unbiased."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def push(self, value: float) -> float:
        """Add a value; returns the mean."""
        self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * value
        self._weight = _SMOOTHING * self._weight + 1 - _SMOOTHING
        return self._sum / self._weight


def step_facts(step: Step, loss: float) -> list[str]:
    """What to say of a training step, the most important first."""
    return [
        f"loss {loss:.3f}",
        f"eta {seconds(step.eta)}",
        f"{step.tokens_per_second:,.0f} tokens/s",
        f"lr {step.learning_rate:.1e}",
        f"epoch {step.epoch:.1f}",
        *([f"memory {size(step.memory)}"] if step.memory else []),
    ]


def amount(event: Progress) -> str:
    """`3 of 12 rows`, `4.0 MB of 92.9 MB`."""
    if event.unit == "B":
        return f"{size(event.done)} of {size(event.total)}" if event.total else size(event.done)
    return f"{event.done:,} of {counted(event.total, event.unit)}" if event.total else counted(event.done, event.unit)


class Pace:
    """How long what is told of will go on, by how it went since it was first told of."""

    def __init__(self) -> None:
        self._title, self._since, self._first = "", 0.0, 0

    def facts(self, event: Progress) -> str:
        """`3 of 12 rows, eta 2:05`; without the time where nothing can be said of it yet."""
        now = time.monotonic()
        if event.title != self._title or event.done < self._first:
            self._title, self._since, self._first = event.title, now, event.done
        ahead, behind, passed = event.total - event.done, event.done - self._first, now - self._since
        if ahead <= 0 or behind <= 0 or passed < _SETTLED:
            return amount(event)
        return f"{amount(event)}, eta {seconds(passed * ahead / behind)}"


def evaluated_line(event: Evaluated) -> str:
    """`validation: loss 0.123 (step 100)`, with a name before it where several are trained together."""
    whose = f"{printable(event.learner)} " if event.learner else ""
    best = best_text(event.best) if event.best and event.best.get("step") != event.step else ""
    return f"{whose}{event.split}: {metrics(event.metrics)} (step {event.step}){', ' if best else ''}{best}"


def best_text(best: Mapping[str, float]) -> str:
    """`best loss 0.123 (step 80)`, of the figure that decides; nothing where nothing is told."""
    figures = ", ".join(f"{name} {value:.3f}" for name, value in best.items() if name != "step")
    return f"best {figures} (step {best['step']:.0f})" if figures and "step" in best else ""


def note_line(event: Note) -> str:
    """The note, marked where it is a warning."""
    return printable(f"warning: {event.text}" if event.level == "warning" else event.text)


class PlainReport:
    """One line each tenth of the way, and now and then between: ever more rarely, so that a long run stays readable."""

    def __init__(self, terse: bool = False) -> None:
        self._terse = terse
        self._smoothed = Smoothed()
        self._pace = Pace()
        self._title = ""
        self._share = 0.0
        self._shares: dict[str, float] = {}
        self._said_at = time.monotonic()
        self._patience = _PATIENCE

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Note):
            if event.level == "warning" or not self._terse:
                remark(note_line(event))
        elif self._terse:
            return
        elif isinstance(event, Stage):
            remark(printable(event.title))
        elif isinstance(event, Evaluated):
            remark(f"  {evaluated_line(event)}")
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Progress):
            self._progress(event)

    def _step(self, event: Step) -> None:
        loss = self._smoothed.push(event.loss) if event.smoothed is None else event.smoothed
        if event.learner:
            self._step_of(event, loss)
        elif self._is_due("training", event.step / event.total):
            remark(f"  step {event.step}/{event.total}: {', '.join(step_facts(event, loss))}")

    def _step_of(self, event: Step, loss: float) -> None:
        """One of several learners: each tenth of its way."""
        share = event.step / event.total
        if share - self._shares.get(event.learner, 0.0) >= _SHARE or share >= 1.0:
            self._shares[event.learner] = share
            facts = ", ".join(step_facts(event, loss))
            remark(f"  {printable(event.learner)}: step {event.step}/{event.total}: {facts}")

    def _progress(self, event: Progress) -> None:
        facts = self._pace.facts(event)
        if event.title != self._title:
            self._begin(event.title)  # said only when it takes long
        elif time.monotonic() - self._said_at >= self._patience:
            self._wait_longer()
            remark(f"  {printable(event.title)}: {facts}")

    def _is_due(self, title: str, share: float) -> bool:
        if title != self._title:
            self._begin(title)
        if share - self._share >= _SHARE or share >= 1.0:
            self._share, self._said_at = share, time.monotonic()
            return True
        if time.monotonic() - self._said_at >= self._patience:
            self._wait_longer()
            return True
        return False

    def _begin(self, title: str) -> None:
        self._title, self._share, self._patience, self._said_at = title, 0.0, _PATIENCE, time.monotonic()

    def _wait_longer(self) -> None:
        self._said_at = time.monotonic()
        self._patience *= 1.5
