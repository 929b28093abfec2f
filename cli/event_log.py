"""Progress for machines: one JSON object a line, in a file or on stdout.

Every line has `event`, `time` (UTC, ISO 8601 with milliseconds) and `seconds` (since the log was opened), then the
fields of its kind, all of them in every line of that kind; what is not known is null, "" or 0, as `FIELDS` says. Lines
of one run begin with `begin` and end with `end`, if the process could still write one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import Unsupported
from ..events import Evaluated, Event, Note, Progress, Stage, Step
from .render import Unwritten, put, remark

STDOUT = "-"
VERSION = 1
KINDS: dict[type, str] = {Stage: "stage", Progress: "progress", Step: "step", Evaluated: "evaluated", Note: "note"}
FIELDS: dict[str, dict[str, str]] = {
    "begin": {
        "version": "of this format",
        "recipes": "names of the adapters to be, in order",
        "resume": "whether a run that was broken off goes on",
    },
    "stage": {"title": "what begins"},
    "progress": {"title": "of what", "done": "units", "total": "units, 0: not known", "unit": "rows, B, ..."},
    "step": {
        "step": "optimiser steps done",
        "total": "steps to do in all",
        "epoch": "passes over the training part",
        "loss": "mean of this step's supervised items, nats",
        "learning_rate": "of this step",
        "tokens_per_second": "real tokens, without padding, over the last 20 steps",
        "eta": "seconds to the last step",
        "learner": 'whose, with --together, sweep and tune; else ""',
        "smoothed": "running mean of the loss, or null",
        "memory": "most bytes held so far, on the device or by the process; 0: not known",
    },
    "evaluated": {
        "split": "validation or test",
        "step": "optimiser steps done",
        "metrics": "object of figures",
        "learner": 'whose, with --together, sweep and tune; else ""',
        "best": "the best so far of the figure that decides, and its step; empty for a test part",
    },
    "note": {"text": "for a person", "level": "info or warning"},
    "end": {
        "status": "stored, failed or interrupted",
        "adapters": "what was stored, as --json tells it",
        "error": "type, message and hint; or null",
    },
}
"""What the lines of each kind hold."""


class EventLog:
    """Writes events as lines, each at once. What cannot be written is said once, and ends no training.

    Raises:
        Unsupported: the file cannot be opened.
    """

    def __init__(self, target: str) -> None:
        self._file = None if target == STDOUT else _opened(Path(target))
        self._target = target
        self._started = time.monotonic()
        self._is_broken = False

    def close(self) -> None:
        """Nothing more will be written."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self.write(KINDS[type(event)], vars(event))

    def write(self, kind: str, told: Mapping[str, Any]) -> None:
        """Write one line of a kind."""
        if self._is_broken:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        passed = round(time.monotonic() - self._started, 4)
        line = json.dumps({"event": kind, "time": now, "seconds": passed, **_plain(told)}) + "\n"
        try:
            if self._file is None:
                put(line)
            else:
                self._file.write(line.encode())
        except (OSError, Unwritten) as error:
            self._is_broken = True
            remark(f"warning: the log {self._target} takes nothing more: {error.strerror or error}")


def _opened(path: Path) -> Any:
    """The file, to append to; what a crash left of a line is ended first."""
    try:
        file = path.open("ab", buffering=0)
        if os.fstat(file.fileno()).st_size:
            with path.open("rb") as before:
                before.seek(-1, os.SEEK_END)
                if before.read(1) != b"\n":
                    file.write(b"\n")
    except OSError as error:
        raise Unsupported(f"The log {path} cannot be written: {error.strerror}.", "Name another file.") from error
    return file


def _plain(value: Any) -> Any:
    """Without what JSON has no numbers for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
