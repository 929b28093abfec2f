"""Movable names of versions, each one small file that is replaced at once.

The file carries the digest of the version, so that a damaged alias is noticed instead of naming another version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import FormatError, InvalidName, StoreCorrupt
from ..formats.card import utc_now
from ..formats.files import read_regular
from ..formats.strict_json import dump, parse_object
from ..names import check_alias, check_digest, check_version
from .fs import FileSystem, ensure_folder, replace_file
from .layout import Layout, ensure_store

_LIMIT = 4 << 20
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Move:
    """One move of an alias; version and digest are None where it was taken away. `time` is UTC."""

    version: int | None
    digest: str | None
    time: str


@dataclass(frozen=True, slots=True)
class Alias:
    """Where an alias points, and all its moves, the latest last."""

    history: tuple[Move, ...]

    @property
    def version(self) -> int | None:
        """The version it names now."""
        return self.history[-1].version

    @property
    def digest(self) -> str | None:
        """The digest of that version when the alias was set."""
        return self.history[-1].digest


def read_alias(layout: Layout, name: str, alias: str) -> Alias | None:
    """The alias, or None if it was never set.

    Raises:
        StoreCorrupt: its file is damaged.
    """
    path = layout.alias(name, alias)
    if not path.exists():
        return None
    try:
        return _parse(read_regular(path, _LIMIT))
    except (FormatError, InvalidName) as error:
        message = f"The alias {name}:{alias} is damaged: {error}"
        raise StoreCorrupt(message, f"Set it again: remove {path} and name its version anew.") from None


def alias_names(layout: Layout, name: str) -> list[str]:
    """Every alias that has a file, in order, damaged or taken away ones too."""
    folder = layout.aliases(name)
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [file.removesuffix(_SUFFIX) for file in files if _is_alias(file)]


def aliases_of(layout: Layout, name: str) -> dict[str, int]:
    """The versions that the aliases of `name` point to."""
    found = {alias: read_alias(layout, name, alias) for alias in alias_names(layout, name)}
    return {alias: record.version for alias, record in found.items() if record and record.version is not None}


def move_alias(fs: FileSystem, layout: Layout, name: str, alias: str, version: int | None, digest: str | None) -> None:
    """Point an alias at a version, or at nothing. Of two at once the later wins, whole."""
    ensure_store(fs, layout)
    before = read_alias(layout, name, alias)
    history = (before.history if before else ()) + (Move(version, digest, utc_now()),)
    ensure_folder(fs, layout.aliases(name), layout.root)
    replace_file(fs, layout.tmp, layout.alias(name, alias), _dump(history))


def _is_alias(file: str) -> bool:
    try:
        return file.endswith(_SUFFIX) and bool(check_alias(file.removesuffix(_SUFFIX)))
    except InvalidName:
        return False


def _dump(history: tuple[Move, ...]) -> bytes:
    moves = [{"digest": move.digest, "time": move.time, "version": move.version} for move in history]
    return dump({"history": moves, "version": history[-1].version}, indent=2)


def _parse(data: bytes) -> Alias:
    raw = parse_object(data, "the alias file", limit=_LIMIT)
    moves = raw.get("history")
    if not isinstance(moves, list) or not moves:
        raise FormatError("it has no history.")
    alias = Alias(tuple(map(_move, moves)))
    if _dump(alias.history) != data:
        raise FormatError("it is not in its canonical form.")
    return alias


def _move(raw: Any) -> Move:
    if not isinstance(raw, dict) or not isinstance(raw.get("time"), str):
        raise FormatError("a move has no time.")
    if raw.get("version") is None:
        return Move(None, None, raw["time"])
    return Move(check_version(raw["version"]), check_digest(raw.get("digest", "")), raw["time"])
