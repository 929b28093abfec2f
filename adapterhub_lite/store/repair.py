"""Healing damaged files of versions with equal content that is still sound somewhere in the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterHubError
from ..formats.files import read_regular
from .blobs import share
from .catalog import Catalog
from .fs import FileSystem, replace_file
from .layout import Layout
from .manifest import FileFact
from .migrate import ensure_store
from .reading import file_problem, load_manifest


@dataclass(frozen=True, slots=True)
class Healed:
    """A file that is whole again: `where` is a reference, `source` the path inside the store it was restored from."""

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
        replace_file(fs, layout.tmp, path, read_regular(source, fact.size))
        if not file_problem(path, fact):
            with suppress(OSError):  # without it, equal content only takes more space
                share(fs, layout, path, fact.sha256)
            healed.append(Healed(where, path.name, str(source.relative_to(layout.root))))
    return healed


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
