"""Checking a whole store, or one version of it: what is found is reported, never raised and never repaired."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import AdapterHubError
from ..formats.adapter_files import inventory
from ..formats.peft_config import parse_adapter_config
from ..formats.safetensors_header import read_header
from ..names import Ref, check_digest
from .catalog import Catalog, card_of, named
from .layout import CONFIG, MANIFEST, WEIGHTS, Layout
from .manifest import FILES, FileFact
from .reading import check_files, file_problem, load_manifest, read_file


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
    return [*_all_versions(layout, catalog), *_all_aliases(layout, catalog), *_all_objects(layout)]


def _all_versions(layout: Layout, catalog: Catalog) -> Iterator[Finding]:
    for name, path in named(layout.adapters):
        if name is None:
            yield Finding(f"adapters/{path.name}", "is not an adapter name")
            continue
        present, removed = catalog.versions(name), catalog.removed(name)
        for version in present:
            yield from _version_findings(layout, name, version)
        # Numbers are given out without a gap, and a removed version leaves a tombstone.
        for version in sorted(set(range(1, max([*present, *removed, 0]) + 1)) - {*present, *removed}):
            yield Finding(f"{name}@{version}", "is missing: its folder is gone, and nothing says that it was removed")


def _version_findings(layout: Layout, name: str, version: int) -> Iterator[Finding]:
    where = f"{name}@{version}"
    try:
        check_files(layout, name, version, load_manifest(layout, name, version))
        spec = parse_adapter_config(read_file(layout, name, version, CONFIG))
        inventory(spec, read_header(layout.version(name, version) / WEIGHTS))
        card_of(layout, name, version)
    except AdapterHubError as error:
        yield Finding(where, str(error))
        return
    extra = {path.name for path in layout.version(name, version).iterdir()} - FILES - {MANIFEST}
    if extra:
        yield Finding(where, f"holds files that are not part of it: {', '.join(sorted(extra))}")


def _all_aliases(layout: Layout, catalog: Catalog) -> Iterator[Finding]:
    for name, path in named(layout.all_aliases):
        if name is None:
            yield Finding(f"aliases/{path.name}", "is not an adapter name")
            continue
        for alias in catalog.alias_names(name):
            yield from _alias_findings(catalog, name, alias)


def _alias_findings(catalog: Catalog, name: str, alias: str) -> Iterator[Finding]:
    try:
        catalog.history(name, alias)
        move = catalog.current(name, alias)
        if move is not None and move.version is not None:
            catalog.resolve(f"{name}:{alias}")
    except AdapterHubError as error:
        yield Finding(f"{name}:{alias}", str(error))


def _all_objects(layout: Layout) -> Iterator[Finding]:
    for path in sorted(layout.objects.glob("*/*")):
        where = f"objects/{path.parent.name}/{path.name}"
        try:
            if layout.object(check_digest(path.name)) != path:
                yield Finding(where, "is in the wrong folder")
            problem = file_problem(path, FileFact(path.name, path.lstat().st_size))
        except AdapterHubError as error:
            problem = str(error)
        if problem:
            yield Finding(where, problem)
