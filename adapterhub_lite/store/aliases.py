"""Movable names of versions: a numbered log of moves, of which the last one that was accepted says what is meant.

A move is published by renaming its complete, durable folder onto a number that nothing has, so of two processes that
move an alias at once both are in the log, in one order. A move carries the digest of the version and a seal over
itself: a damaged one is noticed instead of naming another version.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..errors import FormatError, InvalidName, StoreCorrupt, StoreError
from ..formats.card import utc_now
from ..formats.files import read_regular
from ..formats.strict_json import dump, finite_integer, parse_object
from ..names import check_alias, check_digest, check_name, check_version
from .fs import FileSystem, discard, ensure_folder, new_tmp, write_file
from .layout import FORMAT, MOVE, Layout
from .manifest import sha256

EVENTS = ("set", "promote", "rollback", "remove", "refuse")
"""What a move did; `refuse` keeps a decision and moves nothing."""

_LIMIT = 1 << 20
_SUFFIX = ".json"
_ATTEMPTS = 10_000
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class Move:
    """One move of an alias; version and digest are None where it was taken away. `time` is UTC, a label only."""

    version: int | None
    digest: str | None
    time: str
    event: str = "set"
    reason: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    number: int = 0


@dataclass(frozen=True, slots=True)
class Listed:
    """The aliases of a name as its folder lists them: the highest number of each, and those of format 1."""

    last: Mapping[str, int]
    first: frozenset[str]

    @property
    def names(self) -> list[str]:
        """Every alias that was ever set, in order."""
        return sorted({*self.last, *self.first})


def listed(layout: Layout, name: str, form: int = FORMAT) -> Listed:
    """What the folder of the aliases of `name` holds, in a store of format `form`.

    In format 1 a file is the whole truth, and moves beside it are of a migration that is not decided yet.

    Raises:
        StoreCorrupt: moves without a file in format 1, which no migration leaves.
    """
    last: dict[str, int] = {}
    first = set()
    folder = layout.aliases(name)
    try:
        entries = [] if os.path.islink(folder) else os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        entries = []
    for entry in entries:
        alias, mark, number = entry.partition("@")
        try:
            if mark:
                last[check_alias(alias)] = max(last.get(alias, 0), check_version(number))
            elif entry.endswith(_SUFFIX):
                first.add(check_alias(entry.removesuffix(_SUFFIX)))
        except InvalidName:
            continue  # not ours
    if form > 1:
        return Listed(last, frozenset(first - last.keys()))
    if last.keys() - first:
        which = f"{name}:{min(last.keys() - first)}"
        message = f"store.json says format 1, but {which} is kept as in format {FORMAT}."
        raise StoreCorrupt(message, f'Write {{"format": {FORMAT}}} into {layout.store_file} to go on.')
    return Listed({}, frozenset(first))


def names_with_aliases(layout: Layout) -> list[str]:
    """Names that have a folder of aliases, in order."""
    found = []
    for entry in sorted(os.listdir(layout.all_aliases)) if layout.all_aliases.is_dir() else []:
        try:
            found.append(check_name(entry))
        except InvalidName:
            continue
    return found


def current(layout: Layout, name: str, alias: str, found: Listed) -> Move | None:
    """The move that says what the alias names now; None if it was never set.

    Raises:
        StoreCorrupt: a move that decides it is damaged.
    """
    if alias in found.first:
        return read_first(layout, name, alias)[-1]
    for number in range(found.last.get(alias, 0), 0, -1):
        move = read_move(layout, name, alias, number)
        if move.event != "refuse":
            return move
    return None


def history(layout: Layout, name: str, alias: str, found: Listed) -> tuple[Move, ...]:
    """Every move of an alias, the latest last. Raises StoreCorrupt where one is damaged."""
    if alias in found.first:
        return read_first(layout, name, alias)
    return tuple(read_move(layout, name, alias, number) for number in range(1, found.last.get(alias, 0) + 1))


def append(fs: FileSystem, layout: Layout, name: str, alias: str, move: Move, after: int | None = None) -> Move:
    """Add a move to the log, numbered and dated; the store must be prepared.

    Args:
        after: refuse unless this is the last number so far; None: whatever it is.

    Raises:
        StoreError: somebody else has moved it since `after`.
    """
    ensure_folder(fs, layout.aliases(name), layout.root)
    for _ in range(_ATTEMPTS):
        found = listed(layout, name)
        if alias in found.first:  # a damaged file of format 1, which migration left
            discard(fs, layout.first_alias(name, alias))
        last = found.last.get(alias, 0)
        if after is not None and last != after:
            raise StoreError(f"{name}:{alias} was moved meanwhile.", f"Look at it with: ahl log {name}")
        numbered = replace(move, number=last + 1, time=utc_now())
        if write_move(fs, layout, name, alias, numbered):
            return numbered
    raise StoreError(f"No free number for a move of {name}:{alias} after {_ATTEMPTS} attempts.", "Try again.")


def write_move(fs: FileSystem, layout: Layout, name: str, alias: str, move: Move) -> bool:
    """Publish one numbered move, durably; False if its number is taken."""
    target = layout.move(name, alias, move.number)
    staged = new_tmp(layout.tmp)
    try:
        fs.mkdir(staged)
        write_file(fs, staged / MOVE, _dump(name, alias, move))
        fs.fsync_dir(staged)
        fs.rename(staged, target)
    except OSError as error:
        discard(fs, staged)
        if error.errno in _TAKEN:
            return False
        raise
    except BaseException:
        discard(fs, staged)
        raise
    fs.fsync_dir(target.parent)
    return True


def read_move(layout: Layout, name: str, alias: str, number: int) -> Move:
    """One move, checked against its seal and its place.

    Raises:
        StoreCorrupt: it is damaged.
    """
    path = layout.move(name, alias, number) / MOVE
    try:
        if os.path.islink(path.parent):
            raise FormatError("it is a symbolic link.")
        move = _parse(name, alias, read_regular(path, _LIMIT))
        if move.number != number:
            raise FormatError("it is another move.")
        return move
    except (FormatError, InvalidName, LookupError) as error:
        raise _damaged(name, alias, f"move {number}: {error}") from None


def read_first(layout: Layout, name: str, alias: str) -> tuple[Move, ...]:
    """The moves of an alias in the form of format 1, numbered from 1."""
    try:
        raw = parse_object(read_regular(layout.first_alias(name, alias), 4 << 20), "the alias file", limit=4 << 20)
        moves = raw.get("history")
        if not isinstance(moves, list) or not moves or raw.get("version") != moves[-1].get("version"):
            raise FormatError("it has no history, or does not agree with it.")
        return tuple(replace(_first_move(move), number=number) for number, move in enumerate(moves, start=1))
    except (FormatError, InvalidName, LookupError, AttributeError) as error:
        raise _damaged(name, alias, str(error)) from None


def _damaged(name: str, alias: str, what: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"The alias {name}:{alias} is damaged: {what}", f"Set it again: ahl alias {name}:{alias} VERSION"
    )


def _dump(name: str, alias: str, move: Move) -> bytes:
    told = {
        "alias": alias,
        "digest": move.digest,
        "event": move.event,
        "name": name,
        "number": move.number,
        "reason": dict(move.reason),
        "time": move.time,
        "version": move.version,
    }
    return dump({**told, "seal": sha256(dump(told))}, indent=2)


def _parse(name: str, alias: str, data: bytes) -> Move:
    raw = parse_object(data, "the move", limit=_LIMIT, integer=finite_integer)
    reason = raw.get("reason")
    if raw.get("event") not in EVENTS or not isinstance(reason, dict):
        raise FormatError("it says no event that is known.")
    first = _first_move(raw)
    move = replace(first, event=raw["event"], reason=reason, number=check_version(raw.get("number", 0)))
    if _dump(name, alias, move) != data:
        raise FormatError("it does not match its seal.")
    return move


def _first_move(raw: Any) -> Move:
    if not isinstance(raw, dict) or not isinstance(raw.get("time"), str):
        raise FormatError("a move has no time.")
    if raw.get("version") is None:
        return Move(None, None, raw["time"], "remove")
    return Move(check_version(raw["version"]), check_digest(raw.get("digest", "")), raw["time"])
