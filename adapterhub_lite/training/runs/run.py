"""Runs that are under way or were broken off: a folder each, held by one process, that knows what it was begun with.

    <store>/runs/<name>-<digest>/identity.json    recipe, data, base and libraries of each learner
                                 lock             held (flock) by the process that trains; the system frees it
                                 checkpoint-<N>/  see checkpoint.py

The digest is of recipes and data, so that a changed recipe begins a run of its own and the broken-off one stays.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import AdapterHubError, NotFound, StoreCorrupt, StoreError, TrainingFailed
from ...events import Listener, ignore
from ...formats.files import read_regular
from ...formats.strict_json import dump
from ...store.fs import FileSystem, discard, ensure_folder, replace_file, storing
from ...tasks.rows import Rows
from .checkpoint import Checkpoints
from .folders import DIVERGED, IDENTITY, LIMIT, LOCK, checkpoints, held, read_identity, run_folders, steps_done

_MARKED = 1_000_000  # rows of a part whose digests are kept, to say which line was changed
_WITHOUT_EFFECT = (
    "checkpoint_every", "pack_tokens", "checkpointing", "recompute_mlp", "offload", "table_on_host", "working_copies"
)  # fmt: skip
_SHOWN = 10  # changes


@dataclass(frozen=True)
class Identity:
    """What one learner's run is made of. Only with all of it the same does going on give the same adapter.

    Attributes:
        data: part -> source, sha256, rows, and a digest (CRC-32, 8 hexadecimal digits) of each row.
        base: name, quantization, dtype, device and the fingerprint's parts; empty until it is loaded.
        start: reference and digest of the version it starts from, or "".
        source: the recipe's file, for who asks how to go on.
    """

    name: str
    recipe: dict[str, Any]
    data: dict[str, dict[str, Any]]
    base: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    start: str = ""
    source: str = ""

    @property
    def key(self) -> str:
        """Digest of what is known before the base is loaded."""
        digests = {part: told["sha256"] for part, told in self.data.items()}
        return sha256(dump([self.name, _effective(self.recipe), digests])).hexdigest()


def data_identity(rows: Rows) -> dict[str, Any]:
    """What a run remembers of one part of its data."""
    marks = ""
    if len(rows) <= _MARKED:
        marks = "".join(f"{zlib.crc32(repr(sorted(row.items())).encode('utf-8', 'replace')):08x}" for row in rows)
    return {"source": rows.source, "sha256": rows.sha256, "rows": len(rows), "marks": marks}


def changes(before: Identity, now: Identity, parts: Mapping[str, Rows]) -> list[str]:
    """What differs between two identities, each by its name; `parts` are the rows there are now."""
    found = [*_recipe_changes(_effective(before.recipe), _effective(now.recipe))]
    for part in sorted(before.data.keys() | now.data.keys()):
        old, new = before.data.get(part), now.data.get(part)
        if old is None or new is None:
            found.append(f"data.{part} was {'not there' if old is None else 'there'}")
        elif old["sha256"] != new["sha256"]:
            found.append(f"data.{part} ({new['source']}): {_data_change(old, new, parts[part])}")
    if before.base and now.base:
        found += [
            f"base: {key} was {_short(before.base.get(key))}, is {_short(now.base.get(key))}"
            for key in sorted(before.base.keys() | now.base.keys())
            if before.base.get(key) != now.base.get(key)
        ]
    if before.libraries and now.libraries:
        found += [
            f"library {key} was {before.libraries.get(key)}, is {now.libraries.get(key)}"
            for key in sorted(before.libraries.keys() | now.libraries.keys())
            if before.libraries.get(key) != now.libraries.get(key)
        ]
    if before.start != now.start:
        found.append(f"start_from was {before.start or 'nothing'}, is {now.start or 'nothing'}")
    return found


class Run:
    """One run's folder, held by this process within its block.

    Args:
        root: the folder of all runs; made if need be.
        learners: what is trained together, in order.
    """

    def __init__(
        self, top: Path, learners: Sequence[Identity], fs: FileSystem | None = None, on_event: Listener = ignore
    ) -> None:
        self._top, self._fs, self._on_event = top, fs or FileSystem(), on_event
        self.learners = list(learners)
        digest = sha256("".join(one.key for one in learners).encode()).hexdigest()
        self.folder = top / "runs" / f"{learners[0].name}-{digest[:12]}"
        self._lock: int | None = None
        self.done = False

    def __enter__(self) -> Run:
        with storing("keep the state of a run", self._top):
            ensure_folder(self._fs, self.folder, self._top)
            self._lock = held(self.folder / LOCK)
        if self._lock is None:
            raise StoreError(
                f"Another process trains {self._names} from the same recipe and data.",
                "Wait for it, or end it.",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the folder; it goes if the run is done, or if nothing is kept in it."""
        try:
            if self.done or not checkpoints(self.folder):
                discard(self._fs, self.folder)
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @property
    def is_broken_off(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(checkpoints(self.folder)) and (self.folder / IDENTITY).is_file()

    def check(self, resume: bool, from_scratch: bool, parts: Sequence[Mapping[str, Rows]]) -> None:
        """Refuse what cannot be meant, before anything is loaded.

        Raises:
            NotFound: there is nothing to go on from; with what changed since there was.
            TrainingFailed: there is, and neither was asked for.
        """
        if from_scratch or self.is_broken_off:
            if self.is_broken_off and not resume and not from_scratch:
                done = steps_done(self.folder)
                raise TrainingFailed(
                    f"A run of {self._names} with this recipe and data was broken off after step {done}.",
                    "Go on with --resume, or start anew with --from-scratch (in Python: resume=True, "
                    "from_scratch=True).",
                )
            return
        if resume:
            raise self._nothing(parts)

    def begin(
        self,
        learners: Sequence[Identity],
        parts: Sequence[Mapping[str, Rows]],
        resume: bool,
        computed: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Checkpoints:
        """The checkpoints of this run: of the one that was broken off, to go on from, or of a new one.

        `computed` says how a new one is computed, so that going on rounds as it does.

        Raises:
            TrainingFailed: base or libraries are not those it was begun with; says which and how they differ.
            StoreCorrupt: what is kept of it is damaged.
        """
        if resume:
            self._compare(learners, parts)
        else:
            for _, path in checkpoints(self.folder):
                discard(self._fs, path)
            learning = [asdict(one) for one in learners]
            told = dump({"learners": learning, "id": os.urandom(8).hex(), "computed": dict(computed or {})})
            with storing("keep the state of a run", self.folder, len(told)):
                replace_file(self._fs, self.folder, self.folder / IDENTITY, told)
        discard(self._fs, self.folder / DIVERGED)
        digest = sha256(read_regular(self.folder / IDENTITY, LIMIT)).hexdigest()
        return Checkpoints(self.folder, digest, fs=self._fs, on_event=self._on_event, **settings)

    def note_diverged(self, told: Mapping[str, str]) -> None:
        """Write down who diverged, and how, for whoever lists runs; a run that goes on forgets it."""
        if told and checkpoints(self.folder):
            with suppress(StoreError, OSError):  # what went wrong is said all the same
                replace_file(self._fs, self.folder, self.folder / DIVERGED, dump(dict(told)))

    @property
    def id(self) -> str:
        """A random name of this run, which the cards of its versions carry."""
        return str(read_identity(self.folder)["id"])

    @property
    def computed(self) -> dict[str, Any]:
        """How this run was begun to be computed; empty where it does not say."""
        told = read_identity(self.folder).get("computed")
        return told if isinstance(told, dict) else {}

    @property
    def _names(self) -> str:
        return ", ".join(one.name for one in self.learners)

    def _compare(self, learners: Sequence[Identity], parts: Sequence[Mapping[str, Rows]]) -> None:
        before = _identities(self.folder)
        if len(before) != len(learners):
            raise _damaged(self.folder)
        found = [
            text
            for old, new, rows in zip(before, learners, parts, strict=True)
            for text in _named(changes(old, new, rows), new.name, len(learners))
        ]
        if found:
            raise _changed(self._names, found)

    def _nothing(self, parts: Sequence[Mapping[str, Rows]]) -> AdapterHubError:
        """Why there is nothing to go on from: what differs from the latest run of these names, where there is one."""
        for folder in run_folders(self._top):
            with suppress(AdapterHubError, OSError):
                before = _identities(folder)
                if folder == self.folder or [one.name for one in before] != [one.name for one in self.learners]:
                    continue
                pairs = zip(before, self.learners, parts, strict=True)
                found = [
                    text for old, new, rows in pairs for text in _named(changes(old, new, rows), new.name, len(before))
                ]
                if found:
                    return _changed(self._names, found)
        return NotFound(f"There is no run of {self._names} to go on with.", "Train it without --resume.")


def _identities(folder: Path) -> list[Identity]:
    try:
        found = [Identity(**one) for one in read_identity(folder)["learners"]]
    except (TypeError, KeyError) as error:
        raise _damaged(folder) from error
    if not all(map(_is_whole, found)):
        raise _damaged(folder)
    return found


def _is_whole(one: Identity) -> bool:
    """Whether the parts of what was read are of their kinds."""
    parts = (one.recipe, one.data, one.base, one.libraries)
    if not all(isinstance(part, dict) for part in parts) or not isinstance(one.recipe.get("training"), dict):
        return False
    kinds = {"sha256": str, "marks": str, "rows": int}
    return all(
        isinstance(told, dict) and all(type(told.get(key)) is kind for key, kind in kinds.items())
        for told in one.data.values()
    )


def _damaged(folder: Path) -> StoreCorrupt:
    return StoreCorrupt(f"{folder / IDENTITY} is damaged.", "Start anew with --from-scratch.")


def _changed(names: str, found: list[str]) -> TrainingFailed:
    listed = "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    return TrainingFailed(
        f"The run of {names} was begun with something else: {listed}.",
        "Make it as it was to go on, or start anew with --from-scratch.",
    )


def _named(found: list[str], name: str, learners: int) -> list[str]:
    return [f"{name}: {text}" for text in found] if learners > 1 else found


def _effective(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what does not change the result: where data lies (its digest says what it is), checkpoints."""
    told = {key: value for key, value in recipe.items() if key not in ("data", "name")}
    told["training"] = {k: v for k, v in recipe["training"].items() if k not in _WITHOUT_EFFECT}
    return told


def _recipe_changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from _recipe_changes(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif before != now:
        yield f"{path} was {_short(before)}, is {_short(now)}"


def _data_change(old: Mapping[str, Any], new: Mapping[str, Any], rows: Rows) -> str:
    counts = f"{old['rows']} rows, now {new['rows']}" if old["rows"] != new["rows"] else f"{new['rows']} rows"
    size, common = 8, min(len(old["marks"]), len(new["marks"]))
    first = next((i for i in range(0, common, size) if old["marks"][i : i + size] != new["marks"][i : i + size]), None)
    if first is not None:
        return f"{counts}; line {rows.lines[first // size]} is the first that differs"
    return f"{counts}; the rows that both have are equal" if common else counts


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
