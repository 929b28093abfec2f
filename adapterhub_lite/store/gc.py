"""What crashed or finished work has left behind, and its removal. Nothing that a version, alias or reader needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidName
from ..names import check_digest
from .catalog import Catalog, named
from .fs import FileSystem, discard
from .layout import Layout
from .links import is_folder, object_files
from .publish import STALE_SECONDS, clear, stale


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something to remove: a path inside the store, how many bytes that frees, and why nobody needs it."""

    path: str
    bytes: int
    reason: str


def leftovers(layout: Layout, catalog: Catalog, older_than: float = STALE_SECONDS) -> list[Leftover]:
    """Everything to remove; temporary entries only when nothing touched them for `older_than` seconds."""
    found = [
        *((path, "an unfinished operation left it") for path in stale(layout, older_than)),
        *((layout.version(name, version), "its version was removed") for name, version in _removed(layout, catalog)),
        *((path, "no version holds this content") for path in _unused(layout)),
        *((path, "its moves are kept one by one now") for path in _converted(layout)),
    ]
    return [Leftover(str(path.relative_to(layout.root)), _size(path), reason) for path, reason in found]


def collect(fs: FileSystem, layout: Layout, catalog: Catalog, older_than: float = STALE_SECONDS) -> list[Leftover]:
    """Remove `leftovers`; returns what is gone."""
    found = leftovers(layout, catalog, older_than)
    for path in stale(layout, older_than):
        discard(fs, path)
    for name, version in _removed(layout, catalog):
        clear(fs, layout, name, version)
    for path in [*_unused(layout), *_converted(layout)]:
        discard(fs, path)
    return [one for one in found if not os.path.lexists(layout.root / one.path)]


def _removed(layout: Layout, catalog: Catalog) -> Iterator[tuple[str, int]]:
    for name, _ in named(layout.adapters):
        for version in catalog.removed(name) if name else ():
            if layout.version(name or "", version).exists():
                yield name or "", version


def _unused(layout: Layout) -> Iterator[Path]:
    """Objects that are the last name of their content. A `put` that is about to share one writes a copy instead."""
    for path in object_files(layout):
        with suppress(OSError, InvalidName):
            check_digest(path.name)
            if os.lstat(path).st_nlink == 1:
                yield path


def _converted(layout: Layout) -> Iterator[Path]:
    """Aliases in the form of format 1 whose moves exist: a migration was cut short after its decision."""
    for folder in sorted(layout.all_aliases.iterdir()) if layout.all_aliases.is_dir() else ():
        for path in sorted(folder.glob("*.json")) if is_folder(folder) else ():
            if (folder / f"{path.name.removesuffix('.json')}@1").exists():
                yield path


def _size(path: Path) -> int:
    """Bytes that removing `path` frees: of files that have no other name."""
    files = [path] if not path.is_dir() or path.is_symlink() else list(path.rglob("*"))
    total = 0
    for file in files:
        with suppress(OSError):
            stat = os.lstat(file)
            total += stat.st_size if stat.st_nlink == 1 and not file.is_dir() else 0
    return total
