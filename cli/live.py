"""The live display of progress on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from ..events import Evaluated, Event, Note, Progress, Stage, Step
from .progress import Smoothed, amount, evaluated_line, note_line, step_facts
from .render import counted, metrics, printable

_BAR = 20
_AROUND = _BAR + 6  # spinner, bar and the gaps between


class LiveReport:
    """Bars for what is going on; a line remains of each stage, note and evaluation."""

    def __init__(self, terse: bool = False, console: Console | None = None) -> None:
        self._terse = terse
        self._console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # printed lines go above the bars, but never into a file's place,
        )
        self._tasks: dict[str, TaskID] = {}
        self._smoothed = Smoothed()
        self._evaluated: list[str] = []

    def __enter__(self) -> LiveReport:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Progress):
            self._update(printable(event.title), event.done, event.total, amount(event))
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Note):
            if event.level == "warning" or not self._terse:
                self._line(note_line(event), "yellow" if event.level == "warning" else None)
        elif isinstance(event, Evaluated):
            self._evaluated = [f"{event.split} {metrics(event.metrics)}"]
            self._line(f"  {evaluated_line(event)}")
        elif isinstance(event, Stage):
            self._stage(printable(event.title))

    def _stage(self, title: str) -> None:
        for name in list(self._tasks):
            self._drop(name)
        if not self._terse:
            self._line(title, "bold")
        self._update(title if self._terse else "working", 0, 0, "")

    def _step(self, event: Step) -> None:
        loss = self._smoothed.push(event.loss)
        count = f"{event.step}/{event.total}"
        facts = self._fitting("training", count, [*step_facts(event, loss), *self._evaluated])
        self._update("training", event.step, event.total, facts)
        if event.step == event.total:
            self._line(
                f"  trained {counted(event.total, 'steps')}: loss {loss:.3f}, {event.tokens_per_second:,.0f} tokens/s"
            )

    def _fitting(self, title: str, first: str, facts: list[str]) -> str:
        """As many facts as the terminal has room for."""
        room = self._console.width - len(title) - _AROUND
        for fact in facts:
            if len(first) + len(fact) + 2 > room:
                break
            first = f"{first}  {fact}"
        return first

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
            self._bars.refresh()  # or the next printed line would show it once more

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)
