"""A search on disk: a folder that one process holds, with a journal of what was tried and what came of it.

    <store>/runs/<kind>-<name>-<digest>/journal.jsonl   the search, then a line for each trial
                                        lock            held (flock) by the process that searches
                                        runs/           the group that is trained now (training/runs/run.py)
                                        trials/<N>/     adapter and card of a trial of `ahl tune`
                                        results.csv, results.json, plot.png

The digest is of recipe, data and what is varied, so that another search has a folder of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import NotFound, StoreError, TrainingFailed
from ..formats.strict_json import dump
from ..store.fs import FileSystem, discard, ensure_folder, new_tmp, replace_file, storing, write_file
from ..training.runs.folders import LOCK, held
from ..training.runs.run import Identity, changes
from .search_trials import JOURNAL, Trial, read_journal

TRIALS = "trials"


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
            raise StoreError(
                f"Another process does this {self.kind} of {self.identity.name}.", "Wait for it, or end it."
            )
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

        `more` is written down, too; `asked` of it are the options that go on with it.

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


def absolute(path: Path | None) -> str | None:
    """A path as it can be written down for who goes on elsewhere."""
    return None if path is None else str(Path(path).absolute())


def _has_run(folder: Path) -> bool:
    runs = folder / "runs"
    return runs.is_dir() and any(runs.iterdir())
