"""Who else hears of a training run beside the terminal: a log, TensorBoard, and a picture at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterHubError
from ..events import Event, Listener
from .event_log import STDOUT, VERSION, EventLog
from .guard import UsageProblem, problem
from .render import printable, remark
from .tensorboard import Board, check_tensorboard

if TYPE_CHECKING:
    from ..names import Ref
    from ..store import Store

Reports = Callable[[Sequence[Mapping[str, Any]]], None]


@dataclass(frozen=True)
class Watch:
    """What was asked for: `log` a file or "-" for stdout, `tensorboard` a folder, `plot` a picture's file."""

    log: str | None = None
    tensorboard: Path | None = None
    plot: Path | None = None

    @property
    def takes_stdout(self) -> bool:
        """Whether stdout is the log's."""
        return self.log == STDOUT

    def check(self, as_json: bool) -> None:
        """Refuse before anything is loaded what could not be written at the end of hours.

        Raises:
            UsageProblem, Unsupported, NotFound
        """
        if self.takes_stdout and as_json:
            raise UsageProblem("--json and --log - both write on stdout.", "Give the log a file, or leave --json out.")
        if self.tensorboard is not None:
            check_tensorboard(self.tensorboard)
        if self.plot is not None:
            from ..workflows.curves import check_target

            check_target(self.plot)

    def words(self) -> list[str]:
        """The options again."""
        told = (("--log", self.log), ("--tensorboard", self.tensorboard), ("--plot", self.plot))
        return [word for option, value in told if value is not None for word in (option, str(value))]

    @contextmanager
    def listening(self, show: Listener, names: Sequence[str], resume: bool) -> Iterator[tuple[Listener, Reports]]:
        """A listener for all, and what to call with the reports of what was stored.

        The log's last line says how it ended, also where an error ends it.
        """
        with ExitStack() as stack:
            log = self._log(stack, names, resume)
            heard: list[Listener] = [show, *([log] if log else []), *self._board(stack, names, resume)]

            def hear(event: Event) -> None:
                for one in heard:
                    one(event)

            def stored(reports: Sequence[Mapping[str, Any]]) -> None:
                if log is not None:
                    log.write("end", {"status": "stored", "adapters": list(reports), "error": None})

            try:
                yield (hear if len(heard) > 1 else show), stored
            except BaseException as error:
                if log is not None:
                    log.write("end", {"status": _status(error), "adapters": [], "error": _told(error)})
                raise

    def draw(self, store: Store, refs: Sequence[Ref]) -> None:
        """Draw the curves of what was trained, if asked to. What is stored is stored: a failure is only said."""
        if self.plot is not None:
            from .curves import write_picture

            try:
                write_picture([(str(ref), store.card(ref)) for ref in refs], self.plot)
            except (AdapterHubError, OSError) as error:
                remark(f"warning: {printable(self.plot)} was not written: {printable(error)}")

    def _log(self, stack: ExitStack, names: Sequence[str], resume: bool) -> EventLog | None:
        if self.log is None:
            return None
        log = EventLog(self.log)
        stack.callback(log.close)
        log.write("begin", {"version": VERSION, "recipes": list(names), "resume": resume})
        return log

    def _board(self, stack: ExitStack, names: Sequence[str], resume: bool) -> list[Board]:
        if self.tensorboard is None:
            return []
        board = Board(self.tensorboard, names[0], resume)
        stack.callback(board.close)
        return [board]


def _status(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _told(error: BaseException) -> dict[str, Any]:
    if isinstance(error, AdapterHubError):
        return problem(error)
    return {"type": type(error).__name__, "message": str(error), "hint": ""}
