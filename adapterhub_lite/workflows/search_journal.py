"""A search on disk: a folder that one process holds, with a journal of what was tried and what came of it.

    <store>/runs/<kind>-<name>-<digest>/journal.jsonl   the search, then a line for each trial
                                        lock            held (flock) by the process that searches
                                        runs/           the group that is trained now (training/runs.py)
                                        trials/<N>/     adapter and card of a trial of `ahl tune`
                                        results.csv, results.json, plot.png

The digest is of recipe, data and what is varied, so that another search has a folder of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import AdapterHubError, FormatError, NotFound, StoreCorrupt, StoreError, TrainingFailed
from ..formats.files import read_regular
from ..formats.strict_json import dump, parse_object
from ..store.fs import FileSystem, discard, ensure_folder, new_tmp, replace_file, storing, write_file
from ..training.run_folders import LOCK, held
from ..training.runs import Identity, changes

JOURNAL, TRIALS = "journal.jsonl", "trials"
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


class Search:
    """One search, held by this process within its block."""

    def __init__(self, top: Path, kind: str, identity: Identity, told: Mapping[str, Any]) -> None:
        """`told`: what is varied, as plain data."""
        self._top, self._fs, self.kind, self.identity = top, FileSystem(), kind, identity
        self._told = dict(told)
        digest = sha256(dump([kind, identity.key, self._told])).hexdigest()
        self.folder = top / "runs" / f"{kind}-{identity.name}-{digest[:12]}"
        self._lock: int | None = None
        self._began = False
        self.head: dict[str, Any] = {}
        self.trials: list[Trial] = []

    def __enter__(self) -> Search:
        with storing("keep the state of a search", self._top):
            ensure_folder(self._fs, self.folder, self._top)
            self._lock = held(self.folder / LOCK)
        if self._lock is None:
            raise StoreError(f"Another process does this {self.kind} of {self.identity.name}.", "Wait for it, or end it.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the folder; it goes if nothing was learnt."""
        try:
            empty = self._began and all(trial.is_open for trial in self.trials) and not _has_run(self.folder)
            if empty or not (self.folder / JOURNAL).is_file():
                discard(self._fs, self.folder)
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @property
    def id(self) -> str:
        """A random name, which the cards of its versions carry."""
        return str(self.head["id"])

    @property
    def is_done(self) -> bool:
        """Whether it came to its end."""
        return bool(self.head.get("done"))

    def check(self, resume: bool, from_scratch: bool) -> None:
        """Refuse what cannot be meant, before a base is loaded.

        Raises:
            NotFound: there is nothing to go on with.
            TrainingFailed: there is, and neither going on nor beginning anew was asked for.
            StoreCorrupt: the journal is damaged.
        """
        there = (self.folder / JOURNAL).is_file()
        if from_scratch:
            return
        if resume and not there:
            raise NotFound(
                f"There is no {self.kind} of {self.identity.name} with this recipe, data and range to go on with.",
                "Begin it without --resume.",
            )
        if there:
            self.head, self.trials = read_journal(self.folder)
        if there and not resume and not self.is_done:
            ended = sum(not trial.is_open for trial in self.trials)
            raise TrainingFailed(
                f"This {self.kind} of {self.identity.name} was broken off; {ended} adapters were done.",
                "Go on with --resume, or start anew with --from-scratch (in Python: resume=True, from_scratch=True).",
            )
        if not resume:
            self.head, self.trials = {}, []

    def begin(self, identity: Identity, **more: Any) -> None:
        """Make sure that it goes on with the same base and libraries, or write down with which it begins.

        Raises:
            TrainingFailed: they are others; says which.
        """
        bare = replace(identity, data={part: {**told, "marks": ""} for part, told in identity.data.items()})
        if self.head:
            before = Identity(**self.head["identity"])
            if found := changes(before, bare, {}):
                raise TrainingFailed(
                    f"The {self.kind} of {identity.name} was begun with something else: {'; '.join(found[:10])}.",
                    "Make it as it was to go on, or start anew with --from-scratch.",
                )
            self.head.pop("done", None)
            return
        for path in self.folder.iterdir():
            if path.name != LOCK:
                discard(self._fs, path)
        told = {"id": os.urandom(8).hex(), "kind": self.kind, "told": self._told, "identity": asdict(bare)}
        self.head, self.trials, self._began = {**told, **more}, [], True
        self.write()

    def write(self) -> None:
        """Make what is known durable."""
        lines = [self.head, *map(asdict, self.trials)]
        data = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()
        with storing("keep the state of a search", self.folder, len(data)):
            replace_file(self._fs, self.folder, self.folder / JOURNAL, data, 0o644)

    def keep(self, number: int, files: Mapping[str, bytes]) -> None:
        """Put the files of a trial beside the journal, all or none."""
        home = self.folder / TRIALS
        size = sum(map(len, files.values()))
        with storing(f"keep trial {number}", self.folder, size):
            ensure_folder(self._fs, home, self.folder)
            staged = new_tmp(self.folder)
            try:
                self._fs.mkdir(staged)
                for name, data in files.items():
                    write_file(self._fs, staged / name, data)
                discard(self._fs, home / str(number))
                self._fs.rename(staged, home / str(number))
                self._fs.fsync_dir(home)
            except BaseException:
                discard(self._fs, staged)
                raise

    def kept(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / TRIALS / str(number)

    def end(self) -> None:
        """It is done; what only going on needs is removed."""
        self.head["done"] = True
        self.write()
        discard(self._fs, self.folder / "runs")


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


def _has_run(folder: Path) -> bool:
    runs = folder / "runs"
    return runs.is_dir() and any(runs.iterdir())


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
