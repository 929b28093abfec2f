"""What a store holds and what a reference means, read from its folders, which are the truth.

What was read is remembered while the folder it was read from does not change: a lookup is then one or two `stat` calls.
A folder that changed so recently that a second change could carry the same time is read again.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import FormatError, InvalidName, NotFound, StoreCorrupt
from ..formats.card import Card
from ..names import Ref, check_name
from . import aliases
from .aliases import Listed, Move
from .layout import CARD, FORMAT, Layout
from .manifest import Manifest
from .migrate import read_format
from .numbers import Numbers, numbers
from .reading import load_manifest, read_file

Mark = tuple[int, int, int, int]
"""Device, inode, and times of change of a folder or file, in nanoseconds."""

_T = TypeVar("_T")
SETTLED = 2_000_000_000  # nanoseconds; the coarsest clock of a file system in use (FAT)
_LIST = "See what there is with: ahl list"
_KEPT = 4096  # names remembered
_COMPARED = 2000  # names compared with one that is not there


def mark_of(path: str | Path) -> Mark | None:
    """What changes when a folder does; None where there is none, or where it changed just now."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    recent = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < SETTLED
    return None if recent else (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass
class _Name:
    """What is remembered of one name."""

    mark: Mark | None
    numbers: Numbers
    digests: dict[int, str] = field(default_factory=dict)


@dataclass
class _Aliases:
    mark: Mark | None
    listed: Listed
    current: dict[str, Move | None] = field(default_factory=dict)


class Catalog:
    """Numbers, aliases and digests of one store. Several threads may use it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # As texts: a lookup is a few microseconds, and joining paths would be half of them.
        self._store_file = str(layout.store_file)
        self._adapters = f"{layout.adapters}{os.sep}"
        self._all_aliases = f"{layout.all_aliases}{os.sep}"
        self._format: tuple[Mark, int] | None = None
        self._names: dict[str, _Name] = {}
        self._aliases: dict[str, _Aliases] = {}

    def format(self) -> int | None:
        """As `migrate.read_format`."""
        mark = mark_of(self._store_file)
        if mark is None or self._format is None or self._format[0] != mark:
            found = read_format(self._layout)
            self._format = (mark, found) if mark is not None and found is not None else None
            return found
        return self._format[1]

    def names(self) -> list[str]:
        """Names with at least one version, in order."""
        if self.format() is None or not self._layout.adapters.is_dir():
            return []
        return [name for name in sorted(os.listdir(self._layout.adapters)) if is_name(name) and self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """The versions of a name that exist, oldest first."""
        return list(self._name(name).numbers.present)

    def removed(self, name: str) -> list[int]:
        """The versions of a name that were removed, oldest first."""
        return list(self._name(name).numbers.removed)

    def alias_names(self, name: str) -> list[str]:
        """Every alias that was ever set, in order."""
        return self._listed(name).listed.names

    def current(self, name: str, alias: str) -> Move | None:
        """The move that says what an alias names; None if it was never set. Raises StoreCorrupt."""
        found = self._listed(name)
        if alias not in found.current:
            found.current[alias] = self._told(name, alias, aliases.current)
        return found.current[alias]

    def aliases(self, name: str) -> dict[str, int]:
        """The versions that the aliases of `name` point to. Raises StoreCorrupt."""
        moves = {alias: self.current(name, alias) for alias in self.alias_names(name)}
        return {alias: move.version for alias, move in moves.items() if move and move.version is not None}

    def history(self, name: str, alias: str) -> tuple[Move, ...]:
        """Every move of an alias, the latest last. Raises StoreCorrupt where one is damaged."""
        return self._told(name, alias, aliases.history)

    def resolve(self, ref: str | Ref) -> Ref:
        """Bind a reference to a version and its digest.

        Raises:
            InvalidName: not a reference.
            NotFound: with the nearest names, or the versions and aliases there are.
            StoreCorrupt: the version or alias is damaged, or is not the one that the reference was resolved to.
        """
        ref = Ref.parse(ref)
        self.format()
        known = self._name(ref.name)
        present = known.numbers.present
        if not present:
            raise self._no_name(ref.name)
        expected = ref.digest
        if ref.version is not None:
            version = ref.version
        elif ref.alias is not None:
            version, expected = self._follow(ref)
        else:
            version = present[-1]
        if version != present[-1] and not known.numbers.has(version):
            raise self._no_version(ref, version)
        digest = known.digests.get(version)
        return self._bind(ref, version, expected, digest)

    def digest(self, name: str, version: int) -> str:
        """The identity of a version, as it was when it was read first. Raises NotFound, StoreCorrupt."""
        known = self._name(name).digests
        if version not in known:
            known[version] = load_manifest(self._layout, name, version).digest
        return known[version]

    def forget(self, name: str) -> None:
        """Read a name anew: this process has changed it."""
        self._names.pop(name, None)
        self._aliases.pop(name, None)

    def _name(self, name: str) -> _Name:
        mark = mark_of(self._adapters + check_name(name))
        known = self._names.get(name)
        if known is None or mark is None or known.mark != mark:
            known = _Name(mark, numbers(self._layout, name))
            _remember(self._names, name, known)
        return known

    def _listed(self, name: str) -> _Aliases:
        mark = mark_of(self._all_aliases + check_name(name))
        known = self._aliases.get(name)
        if known is None or mark is None or known.mark != mark:
            known = _Aliases(mark, self._list_aliases(name))
            _remember(self._aliases, name, known)
        return known

    def _list_aliases(self, name: str) -> Listed:
        form = self.format() or FORMAT
        try:
            return aliases.listed(self._layout, name, form)
        except StoreCorrupt:
            if read_format(self._layout) == form:
                raise
            return aliases.listed(self._layout, name)  # migrated since the format was read

    def _told(self, name: str, alias: str, read: Callable[[Layout, str, str, Listed], _T]) -> _T:
        """What `read` makes of the listing; of a new one where a migration has taken a file away meanwhile."""
        found = self._listed(name)
        try:
            return read(self._layout, name, alias, found.listed)
        except StoreCorrupt:
            if alias not in found.listed.first or os.path.lexists(self._layout.first_alias(name, alias)):
                raise
            self._aliases.pop(name, None)
            return read(self._layout, name, alias, self._listed(name).listed)

    def _follow(self, ref: Ref) -> tuple[int, str | None]:
        move = self.current(ref.name, str(ref.alias))
        if move is None or move.version is None:
            raise NotFound(f"{ref.name} has no alias {ref.alias}. {self._present(ref.name)}", _LIST)
        return move.version, move.digest

    def _bind(self, ref: Ref, version: int, expected: str | None, digest: str | None) -> Ref:
        try:
            digest = digest or self.digest(ref.name, version)
        except NotFound:
            raise self._no_version(ref, version) from None
        if expected is not None and expected != digest:
            message = f"{ref.name}@{version} is {digest[:12]}, but {ref} stands for {expected[:12]}."
            raise StoreCorrupt(message, "Find what is damaged with: ahl verify")
        return ref.resolved(version, digest)

    def _no_name(self, name: str) -> NotFound:
        near = [other for other in _near(name, self._layout.adapters) if self.versions(other)]
        hint = f"Did you mean {', '.join(near)}? {_LIST}" if near else _LIST
        return NotFound(f"There is no adapter {name} in {self._layout.root}.", hint)

    def _no_version(self, ref: Ref, version: int) -> NotFound:
        if self._layout.tombstone(ref.name, version).exists():
            return NotFound(f"{ref.name}@{version} was removed. {self._present(ref.name)}", _LIST)
        return NotFound(f"There is no {ref.name}@{version}. {self._present(ref.name)}", _LIST)

    def _present(self, name: str) -> str:
        told = ", ".join(map(str, self.versions(name)[-8:]))
        pointing = ", ".join(f"{alias} -> {number}" for alias, number in self.aliases(name).items())
        return f"Versions: {told or 'none'}. Aliases: {pointing or 'none'}."


def card_of(layout: Layout, name: str, version: int, manifest: Manifest | None = None) -> Card:
    """The checked card of a version, as its maker wrote it."""
    try:
        return Card.from_bytes(read_file(layout, name, version, CARD, manifest))
    except FormatError as error:
        raise StoreCorrupt(f"{name}@{version}: {error.message}", error.hint) from None


def named(folder: Path) -> Iterator[tuple[str | None, Path]]:
    """Every entry of a folder with its name, or None where that is not an adapter name."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        yield (path.name if is_name(path.name) else None), path


def _near(name: str, folder: Path) -> list[str]:
    """Names that look like this one; in a large store only among those with the same beginning."""
    there = [other for other in (os.listdir(folder) if folder.is_dir() else ()) if is_name(other)]
    if len(there) > _COMPARED:
        there = [other for other in there if other[:2] == name[:2]][:_COMPARED]
    return difflib.get_close_matches(name, there, n=3)


def is_name(text: str) -> bool:
    """Whether a file name is that of an adapter."""
    try:
        return bool(check_name(text))
    except InvalidName:
        return False


def _remember(kept: dict[str, Any], name: str, value: Any) -> None:
    if len(kept) >= _KEPT and name not in kept:
        kept.clear()
    kept[name] = value
