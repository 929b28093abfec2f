"""Checking a whole store, or one version of it: what is found is reported, never raised and never repaired."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

from ..errors import AdapterHubError
from ..formats.adapter_files import inventory
from ..formats.peft_config import parse_adapter_config
from ..formats.safetensors_header import read_header
from ..names import Ref, check_digest
from .catalog import Catalog, card_of, named
from .layout import CONFIG, MANIFEST, WEIGHTS, Layout
from .links import STRANGE, object_files, strange
from .manifest import FILES, FileFact
from .numbers import taken
from .reading import check_files, file_problem, load_manifest, read_file

_GAP = 100  # missing numbers in a row that are reported one by one


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong: `where` is a reference, an alias or a path inside the store."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def verify(layout: Layout, ref: str | Ref | None = None) -> list[Finding]:
    """Check one version, or every version, alias and object. Reads everything anew, whatever is remembered."""
    catalog = Catalog(layout)
    try:
        if ref is not None:
            found = catalog.resolve(ref)
            return list(_version_findings(layout, found.name, int(found.version or 0)))
        if catalog.format() is None:
            return []
    except AdapterHubError as error:
        return [Finding(str(ref or "store.json"), str(error))]
    everything = (_all_strange(layout), _all_versions(layout, catalog), _all_aliases(layout, catalog))
    return [*chain.from_iterable(everything), *_all_objects(layout)]


def _all_strange(layout: Layout) -> Iterator[Finding]:
    for path in strange(layout):
        yield Finding(f"{path.parent.name}/{path.name}", STRANGE)


def _all_versions(layout: Layout, catalog: Catalog) -> Iterator[Finding]:
    for name, path in named(layout.adapters):
        if name is None:
            yield Finding(f"adapters/{path.name}", "is not an adapter name")
            continue
        present, removed = catalog.versions(name), catalog.removed(name)
        for version in present:
            yield from _version_findings(layout, name, version)
        yield from _missing(layout, name, sorted({0, *present, *removed}))


def _missing(layout: Layout, name: str, known: list[int]) -> Iterator[Finding]:
    """Numbers are given out without a gap, and a removed version leaves a tombstone."""
    problem = "is missing: its folder is gone, and nothing says that it was removed"
    for before, after in pairwise(known):
        for version in range(before + 1, min(after, before + 1 + _GAP)):
            if not taken(layout, name, version):  # as by a writer that was faster than the listing
                yield Finding(f"{name}@{version}", problem)
        if after - before - 1 > _GAP:
            yield Finding(f"{name}@{before + 1 + _GAP} to {name}@{after - 1}", problem)


def _version_findings(layout: Layout, name: str, version: int) -> Iterator[Finding]:
    where = f"{name}@{version}"
    try:
        check_files(layout, name, version, load_manifest(layout, name, version))
        spec = parse_adapter_config(read_file(layout, name, version, CONFIG))
        inventory(spec, read_header(layout.version(name, version) / WEIGHTS))
        card_of(layout, name, version)
        extra = {path.name for path in layout.version(name, version).iterdir()} - FILES - {MANIFEST}
    except (AdapterHubError, OSError) as error:
        if not layout.tombstone(name, version).exists():  # removed while it was looked at
            yield Finding(where, str(error))
        return
    if extra:
        yield Finding(where, f"holds files that are not part of it: {', '.join(sorted(extra))}")


def _all_aliases(layout: Layout, catalog: Catalog) -> Iterator[Finding]:
    for name, path in named(layout.all_aliases):
        if name is None:
            yield Finding(f"aliases/{path.name}", "is not an adapter name")
            continue
        try:
            there = catalog.alias_names(name)
        except AdapterHubError as error:
            yield Finding(f"aliases/{name}", str(error))
            continue
        for alias in there:
            if found := list(_alias_findings(catalog, name, alias)):
                # Once more: it may have moved while it was looked at, and what it named before be gone.
                yield from (one for one in _alias_findings(Catalog(layout), name, alias) if one in found)


def _alias_findings(catalog: Catalog, name: str, alias: str) -> Iterator[Finding]:
    try:
        catalog.history(name, alias)
        move = catalog.current(name, alias)
        if move is not None and move.version is not None:
            catalog.resolve(f"{name}:{alias}")
    except AdapterHubError as error:
        yield Finding(f"{name}:{alias}", str(error))


def _all_objects(layout: Layout) -> Iterator[Finding]:
    for path in object_files(layout):
        where = f"objects/{path.parent.name}/{path.name}"
        try:
            if layout.object(check_digest(path.name)) != path:
                yield Finding(where, "is in the wrong folder")
            problem = file_problem(path, FileFact(path.name, path.lstat().st_size))
        except (AdapterHubError, OSError) as error:
            problem = str(error)
        if problem and os.path.lexists(path):  # nobody's: it may go at any time
            yield Finding(where, problem)
