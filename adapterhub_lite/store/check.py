"""Checking a whole store, or one version of it: what is found is reported, never raised and never repaired."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterHubError
from ..formats.adapter_files import inventory
from ..formats.peft_config import parse_adapter_config
from ..formats.safetensors_header import read_header
from ..names import Ref, check_digest, check_name
from .aliases import alias_names, read_alias
from .catalog import card_of, resolve, versions
from .layout import CONFIG, MANIFEST, WEIGHTS, Layout, check_format
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
    """Check one version, or every version, alias and object."""
    try:
        if ref is not None:
            found = resolve(layout, ref)
            return list(_version_findings(layout, found.name, int(found.version or 0)))
        if not check_format(layout):
            return []
    except AdapterHubError as error:
        return [Finding(str(ref or "store.json"), str(error))]
    return [*_all_versions(layout), *_all_aliases(layout), *_all_objects(layout)]


def _all_versions(layout: Layout) -> Iterator[Finding]:
    for name, path in _named(layout.adapters):
        if name is None:
            yield Finding(f"adapters/{path.name}", "is not an adapter name")
            continue
        for version in versions(layout, name):
            yield from _version_findings(layout, name, version)


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


def _all_aliases(layout: Layout) -> Iterator[Finding]:
    for name, path in _named(layout.all_aliases):
        if name is None:
            yield Finding(f"aliases/{path.name}", "is not an adapter name")
            continue
        for alias in alias_names(layout, name):
            yield from _alias_findings(layout, name, alias)


def _alias_findings(layout: Layout, name: str, alias: str) -> Iterator[Finding]:
    try:
        record = read_alias(layout, name, alias)
        if record is not None and record.version is not None:
            resolve(layout, f"{name}:{alias}")
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


def _named(folder: Path) -> Iterator[tuple[str | None, Path]]:
    """Every entry of a folder with its name, or None where that is not an adapter name."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            yield check_name(path.name), path
        except AdapterHubError:
            yield None, path
