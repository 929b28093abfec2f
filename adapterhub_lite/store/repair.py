"""Healing damaged files of versions with equal content that is still sound somewhere in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterHubError
from ..formats.files import read_regular
from .blobs import drop_damaged, share
from .catalog import Catalog
from .fs import FileSystem, replace_file
from .layout import CARD, Layout
from .manifest import FileFact
from .migrate import ensure_store
from .reading import corrupt, file_problem, load_manifest

IMPORTED = "what was imported"


@dataclass(frozen=True, slots=True)
class Healed:
    """A file that is whole again: `where` is a reference, `source` the path inside the store it was restored from, or
    `IMPORTED`.
    """

    where: str
    file: str
    source: str


def repair(fs: FileSystem, layout: Layout, catalog: Catalog) -> list[Healed]:
    """Replace each damaged or missing file of a version by sound content of the same digest, where there is any.

    Only bytes whose sha256 is the one in the manifest are used. What cannot be healed is left to `verify`.
    """
    files = list(_files(layout, catalog))
    sound: dict[str, Path] = {}
    damaged = []
    for where, path, fact in files:
        if file_problem(path, fact):
            damaged.append((where, path, fact))
        else:
            sound.setdefault(fact.sha256, path)
    if damaged:
        ensure_store(fs, layout)  # for tmp/, which a copy of a store may lack
    healed = []
    for where, path, fact in damaged:
        source = sound.get(fact.sha256) or _object(layout, fact)
        if source is None:
            continue
        if _restore(fs, layout, path, read_regular(source, fact.size), fact):
            healed.append(Healed(where, path.name, str(source.relative_to(layout.root))))
    return healed


def heal(
    fs: FileSystem, layout: Layout, catalog: Catalog, name: str, version: int, contents: Mapping[str, bytes]
) -> list[Healed]:
    """Replace each damaged or missing file of a version by what `contents` has for it; returns what was healed.

    `contents` are files of the same digest, such as those of an export of this version. Versions share equal content,
    and so its damage: others that have it are healed too.

    Raises:
        NotFound, StoreCorrupt: there is no such version; its manifest is damaged, or a file is not sound even now.
    """
    manifest = load_manifest(layout, name, version)
    folder = layout.version(name, version)
    good = {fact.sha256: contents[file] for file, fact in manifest.files.items() if file_problem(folder / file, fact)}
    if not good:
        return []
    ensure_store(fs, layout)
    healed = []
    # Its own files last: cut short, the next import begins anew.
    for where, path, fact in sorted(_files(layout, catalog), key=lambda one: one[1].parent == folder):
        if fact.sha256 in good and file_problem(path, fact):
            if not _restore(fs, layout, path, good[fact.sha256], fact):
                raise corrupt(name, version, f"{path.name} is not what was just written.")
            healed.append(Healed(where, path.name, IMPORTED))
    return healed


def _restore(fs: FileSystem, layout: Layout, path: Path, data: bytes, fact: FileFact) -> bool:
    """Put `data` in place of a damaged file, at once; whether the file is sound now."""
    drop_damaged(fs, layout, fact)  # first: cut short, nothing would look at it again
    replace_file(fs, layout.tmp, path, data)
    if file_problem(path, fact):
        return False
    if path.name != CARD:
        with suppress(OSError):  # without it, equal content only takes more space
            share(fs, layout, path, fact.sha256)
    return True


def _files(layout: Layout, catalog: Catalog) -> Iterator[tuple[str, Path, FileFact]]:
    for name in catalog.names():
        for version in catalog.versions(name):
            with suppress(AdapterHubError):  # a damaged manifest says nothing; verify reports it
                manifest = load_manifest(layout, name, version)
                for file, fact in manifest.files.items():
                    yield f"{name}@{version}", layout.version(name, version) / file, fact


def _object(layout: Layout, fact: FileFact) -> Path | None:
    path = layout.object(fact.sha256)
    return None if file_problem(path, fact) else path
