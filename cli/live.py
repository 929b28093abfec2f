"""The live display of progress on a terminal.

Who trains only hands over events; a thread draws, a few times a second, what was last heard. So an event costs
microseconds, however many there are, and the display moves while a step takes long.
"""

from __future__ import annotations

import sys
from threading import Lock
from types import TracebackType

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ..events import Evaluated, Event, Note, Progress, Stage, Step
from .learners import Learner, bar_facts, details, ended_line, flowed, rows
from .progress import Pace, evaluated_line, note_line
from .render import printable

_BAR = 20
_AROUND = _BAR + 6  # spinner, bar and the gaps between
_TIMES = 6  # a second that it is drawn; 2 ms each
_BESIDE = 6  # lines of the terminal that are not for learners


class LiveReport:
    """Bars for what is going on; a line remains of each stage, note and evaluation."""

    def __init__(self, terse: bool = False, console: Console | None = None) -> None:
        self._terse = terse
        self._pace = Pace()
        self._console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            auto_refresh=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._learners: dict[str, Learner] = {}
        self._training: TaskID | None = None
        # Guards what both threads change. Nothing is printed within: that waits for a drawing, which waits for this.
        self._lock = Lock()
        self._live = Live(
            console=self._console,
            refresh_per_second=_TIMES,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # printed lines go above the bars, but never into a file's place,
            get_renderable=self._picture,
        )

    def __enter__(self) -> LiveReport:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_training()
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Progress):
            self._end_training()
            self._update(printable(event.title), event.done, event.total, self._pace.facts(event))
        elif isinstance(event, Note):
            if event.level == "warning" or not self._terse:
                self._line(note_line(event), "yellow" if event.level == "warning" else None)
        elif isinstance(event, Evaluated):
            if event.learner in self._learners:
                self._learners[event.learner].evaluated = event
            self._line(f"  {evaluated_line(event)}")
        elif isinstance(event, Stage):
            self._stage(printable(event.title))

    def _stage(self, title: str) -> None:
        self._end_training()
        for name in list(self._tasks):
            self._drop(name)
        if not self._terse:
            self._line(title, "bold")
        self._update(title if self._terse else "working", 0, 0, "")

    def _step(self, event: Step) -> None:
        learner = self._learners.get(event.learner)
        if learner is None:
            self._drop("working")
            learner = self._learners[event.learner] = Learner(event.learner)
        learner.hear(event)
        if learner.is_done:
            self._line(ended_line(learner))

    def _end_training(self) -> None:
        """Training is over, or broken off: a line remains of those that came to no end."""
        with self._lock:
            learners, self._learners = self._learners, {}
            if self._training is not None:
                self._bars.remove_task(self._training)
                self._training = None
        for learner in learners.values():
            if not learner.is_done:
                self._line(ended_line(learner))
        if learners and not self._tasks:
            self._update("working", 0, 0, "")

    def _picture(self) -> ConsoleRenderable:
        """What is drawn; called by the thread that draws, too."""
        with self._lock:
            lines = self._lines()
            return Group(self._bars.get_renderable(), *(Text(line, no_wrap=True, overflow="crop") for line in lines))

    def _lines(self) -> list[str]:
        """Bring the bar of training up to date; what is said below it."""
        learners = [one for one in list(self._learners.values()) if one.step is not None]
        if not learners:
            return []
        width, height = self._console.size
        together = len(learners) > 1 or bool(learners[0].name)
        title = f"training {len(learners)} adapters" if len(learners) > 1 else "training"
        done, total, facts = bar_facts(learners)
        beside, left_out = _fitting(facts, width - len(title) - _AROUND)
        self._show_training(title, done, total, "  ".join(beside))
        if together:
            return [*flowed(left_out, width), *rows(learners, width, height - _BESIDE)]
        return details(learners[0], width, left_out)

    def _show_training(self, title: str, done: int, total: int, facts: str) -> None:
        if self._training is None:
            self._training = self._bars.add_task(title, total=total, facts=facts)
        self._bars.update(self._training, description=title, completed=done, total=total, facts=facts)

    def _update(self, title: str, done: int, total: int, facts: str) -> None:
        if total and done >= total:
            self._drop(title)
            if not self._tasks:
                self._update("working", 0, 0, "")
            return
        if title not in self._tasks:
            self._drop("working")
            self._tasks[title] = self._bars.add_task(title, total=total or None, facts=facts)
        self._bars.update(self._tasks[title], completed=done, total=total or None, facts=facts)

    def _drop(self, title: str) -> None:
        task = self._tasks.pop(title, None)
        if task is not None:
            self._bars.remove_task(task)
            self._live.refresh()  # or the next printed line would show it once more

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)


def _fitting(facts: list[str], room: int) -> tuple[list[str], list[str]]:
    """As many facts as there is room for, the first in any case, and the others."""
    used = len(facts[0])
    for index, fact in enumerate(facts[1:], 1):
        used += len(fact) + 2
        if used > room:
            return facts[:index], facts[index:]
    return facts, []
