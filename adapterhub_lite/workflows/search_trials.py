"""What a search leaves on disk: its journal, read without anything heavy, for those that only look at it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterHubError, FormatError, StoreCorrupt
from ..formats.files import read_regular
from ..formats.strict_json import parse_object
from ..store.fs import FileSystem, discard
from ..training.runs.folders import LOCK, held

JOURNAL = "journal.jsonl"
KINDS = ("sweep", "tune")
OPEN, COMPLETE, PRUNED, CUT, FAILED = "", "complete", "pruned", "cut", "failed"
_LIMIT = 64 << 20


@dataclass
class Trial:
    """One adapter of a search.

    Attributes:
        parameters: what it sets, by the paths of the fields.
        state: "" while it is not ended, then complete, pruned, cut (by the budget) or failed.
        loss: of the validation part at the step that is kept, with the other `metrics` measured there.
        total: steps that it would have had.
        test: its figures on the test part, where it was published.
    """

    number: int
    parameters: dict[str, Any]
    round: int = 0
    state: str = OPEN
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    step: int = 0
    steps: int = 0
    total: int = 0
    tokens: int = 0
    seconds: float = 0.0
    test: dict[str, float] = field(default_factory=dict)
    ref: str = ""
    note: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it is to be trained, or trained on."""
        return self.state == OPEN


def read_journal(folder: Path) -> tuple[dict[str, Any], list[Trial]]:
    """What a journal says.

    Raises:
        StoreCorrupt: it is damaged.
    """
    path = folder / JOURNAL
    try:
        head, *lines = read_regular(path, _LIMIT).decode().splitlines()
        told = parse_object(head, JOURNAL, limit=_LIMIT)
        if told["kind"] not in KINDS or not isinstance(told["id"], str):
            raise ValueError("it is no search")
        return told, [Trial(**parse_object(line, JOURNAL, limit=_LIMIT)) for line in lines]
    except (FormatError, OSError, LookupError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"{path} is damaged: {error}.", "Start anew with --from-scratch.") from error


@dataclass(frozen=True)
class Kept:
    """A search on disk that no process holds."""

    folder: Path
    kind: str
    name: str
    trials: int
    ended: int
    done: bool
    bytes: int


def kept_searches(top: Path) -> list[Kept]:
    """All searches in the store at `top` that no process holds."""
    home = top / "runs"
    found = []
    for folder in sorted(home.iterdir()) if home.is_dir() else ():
        if not (folder / JOURNAL).is_file():
            continue
        with suppress(OSError):
            number = held(folder / LOCK)
            if number is None:
                continue
            os.close(number)
        head: dict[str, Any] = {}
        trials: Sequence[Trial] = ()
        with suppress(AdapterHubError):
            head, trials = read_journal(folder)
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        ended = sum(not trial.is_open for trial in trials)
        name = str((head.get("identity") or {}).get("name") or folder.name)
        kind = str(head.get("kind", "search"))
        found.append(Kept(folder, kind, name, len(trials), ended, bool(head.get("done")), size))
    return found


@dataclass(frozen=True)
class Waiting:
    """A search that has not come to its end: what its journal says, when that was written, and who works at it.

    Attributes:
        head: what it was begun with.
        time: seconds since 1970.
        running: whether a process does it now.
    """

    folder: Path
    head: dict[str, Any]
    trials: list[Trial]
    time: float
    bytes: int
    running: bool


def waiting_searches(top: Path) -> list[Waiting]:
    """The searches in the store at `top` that are not done and whose journal can be read, the latest first."""
    home = top / "runs"
    found = []
    for folder in home.iterdir() if home.is_dir() else ():
        with suppress(AdapterHubError, OSError):
            time = (folder / JOURNAL).stat().st_mtime
            head, trials = read_journal(folder)
            if head.get("done"):
                continue
            size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(Waiting(folder, head, trials, time, size, _is_running(folder)))
    return sorted(found, key=lambda one: one.time, reverse=True)


def _is_running(folder: Path) -> bool:
    try:
        number = held(folder / LOCK)
    except OSError:  # a store that can only be read: nobody searches there
        return False
    if number is not None:
        os.close(number)
    return number is None


def remove_search(folder: Path) -> bool:
    """Remove a search that no process holds; whether it is gone. The versions that it stored stay."""
    number = held(folder / LOCK)
    if number is None:
        return False
    try:
        return discard(FileSystem(), folder) and not folder.exists()
    finally:
        os.close(number)
