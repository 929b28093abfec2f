"""What crashed or finished work has left behind, and its removal. Nothing that a version, alias or reader needs."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterHubError, InvalidName
from ..names import check_digest
from .catalog import Catalog, named
from .fs import FileSystem, discard
from .layout import CONFIG, WEIGHTS, Layout
from .links import is_folder, object_files
from .publish import STALE_SECONDS, clear, stale
from .reading import load_manifest

_COPY = "versions hold this content as copies of their own"


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something to remove: a path inside the store, how many bytes that frees, and why nobody needs it."""

    path: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Swept:
    """What a collection did, or would do.

    `gone` was removed; `kept` should have been and could not; `younger` temporary entries may be under way. `copied` is
    how many bytes equal configurations and weights take more than once, where there are no hard links between them.
    """

    gone: list[Leftover]
    kept: list[Leftover]
    younger: int
    copied: int


def look(layout: Layout, catalog: Catalog, older_than: float = STALE_SECONDS) -> Swept:
    """What `sweep` would do."""
    return _swept(layout, catalog, leftovers(layout, catalog, older_than), [])


def sweep(fs: FileSystem, layout: Layout, catalog: Catalog, older_than: float = STALE_SECONDS) -> Swept:
    """Remove `leftovers`; what another collection at the same time has removed first is that one's to tell."""
    found = leftovers(layout, catalog, older_than)
    mine = {path for path in stale(layout, older_than) if discard(fs, path)}
    for name, version in _removed(layout, catalog):
        if clear(fs, layout, name, version):
            mine.add(layout.version(name, version))
    mine |= {path for path in [*_unused(layout), *_converted(layout)] if discard(fs, path)}
    gone = [one for one in found if layout.root / one.path in mine]
    return _swept(layout, catalog, gone, [one for one in found if os.path.lexists(layout.root / one.path)])


def leftovers(layout: Layout, catalog: Catalog, older_than: float = STALE_SECONDS) -> list[Leftover]:
    """Everything to remove; temporary entries only when nothing touched them for `older_than` seconds."""
    unused = list(_unused(layout))
    held = set(_places(layout, catalog)) if unused else set()
    found = [
        *((path, "an unfinished operation left it") for path in stale(layout, older_than)),
        *((layout.version(name, version), "its version was removed") for name, version in _removed(layout, catalog)),
        *((path, _COPY if path.name in held else "no version holds this content") for path in unused),
        *((path, "its moves are kept one by one now") for path in _converted(layout)),
    ]
    return [Leftover(str(path.relative_to(layout.root)), _size(path), reason) for path, reason in found]


def _swept(layout: Layout, catalog: Catalog, gone: list[Leftover], kept: list[Leftover]) -> Swept:
    told = {one.path for one in (*gone, *kept)}
    younger, copied = 0, 0
    with suppress(OSError, AdapterHubError):  # only told beside what was done
        entries = os.listdir(layout.tmp) if layout.tmp.is_dir() else []
        younger = sum(str(Path(layout.tmp.name, entry)) not in told for entry in entries)
        copied = _copied(layout, catalog)
    return Swept(gone, kept, younger, copied)


def _copied(layout: Layout, catalog: Catalog) -> int:
    total = 0
    for paths in _places(layout, catalog).values():
        with suppress(OSError):
            stats = [os.lstat(path) for path in paths]
            total += sum({stat.st_ino: stat.st_size for stat in stats}.values()) - stats[0].st_size
    return total


def _places(layout: Layout, catalog: Catalog) -> dict[str, list[Path]]:
    """The configurations and weights of every version whose manifest is sound, by digest."""
    found: dict[str, list[Path]] = defaultdict(list)
    for name in catalog.names():
        for version in catalog.versions(name):
            with suppress(AdapterHubError):
                manifest = load_manifest(layout, name, version)
                for file in (CONFIG, WEIGHTS):
                    found[manifest.files[file].sha256].append(layout.version(name, version) / file)
    return found


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
