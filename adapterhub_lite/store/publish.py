"""Publishing and removing versions, each decided by one atomic step and without any lock.

A version appears by renaming a complete, durable folder onto a number that nothing has; it disappears by its tombstone.
Readers take no folder that has a tombstone, so clearing it away afterwards is not part of the promise.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import StoreError
from ..formats.card import utc_now
from ..formats.strict_json import dump
from .blobs import drop_unused, place
from .catalog import next_version, removed_versions
from .fs import FileSystem, discard, ensure_folder, new_tmp, replace_file
from .layout import MANIFEST, Layout, ensure_store
from .manifest import FileFact, Manifest
from .reading import load_manifest

STALE_SECONDS = 24 * 3600.0  # no operation works on one temporary entry for so long
_ATTEMPTS = 10_000
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


def publish(fs: FileSystem, layout: Layout, name: str, contents: Mapping[str, bytes]) -> tuple[int, str]:
    """Make a new version of `name` with these files; return its number and digest."""
    ensure_store(fs, layout)
    sweep(fs, layout, name)
    ensure_folder(fs, layout.versions(name), layout.root)
    manifest = Manifest({file: FileFact.of(data) for file, data in contents.items()})
    staged = new_tmp(layout.tmp)
    try:
        fs.mkdir(staged)
        for file, data in contents.items():
            place(fs, layout, data, manifest.files[file].sha256, staged / file)
        place(fs, layout, manifest.to_bytes(), manifest.digest, staged / MANIFEST)
        fs.fsync_dir(staged)
        return _claim(fs, layout, name, staged), manifest.digest
    except BaseException:
        discard(fs, staged)
        raise


def remove(fs: FileSystem, layout: Layout, name: str, version: int, digest: str) -> None:
    """Remove a version: its tombstone is the decision, the rest is tidying."""
    ensure_store(fs, layout)
    tombstone = dump({"digest": digest, "removed": utc_now(), "version": version})
    replace_file(fs, layout.tmp, layout.tombstone(name, version), tombstone)
    _clear(fs, layout, name, version)


def sweep(fs: FileSystem, layout: Layout, name: str) -> None:
    """Remove what crashed operations left: old temporary entries, and folders of removed versions of `name`."""
    for entry in layout.tmp.iterdir():
        with suppress(OSError):
            if time.time() - entry.lstat().st_mtime > STALE_SECONDS:
                discard(fs, entry)
    for version in removed_versions(layout, name):
        if layout.version(name, version).exists():
            _clear(fs, layout, name, version)


def _claim(fs: FileSystem, layout: Layout, name: str, staged: Path) -> int:
    """Rename `staged` onto the first free number, trying the next one when another writer was faster."""
    for _ in range(_ATTEMPTS):
        version = next_version(layout, name)
        target = layout.version(name, version)
        try:
            fs.rename(staged, target)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            continue
        # A version that was published and removed since we looked leaves the number free but its tombstone in place.
        if not layout.tombstone(name, version).exists():
            _settle(fs, target, staged)
            return version
        fs.rename(target, staged)
    raise StoreError(f"No free version number for {name} after {_ATTEMPTS} attempts.", "Try again.")


def _settle(fs: FileSystem, target: Path, staged: Path) -> None:
    """Make a published name durable, or take it back: what was not acknowledged should not stay."""
    try:
        fs.fsync_dir(target.parent)
    except OSError:
        with suppress(OSError):
            fs.rename(target, staged)
        raise


def _clear(fs: FileSystem, layout: Layout, name: str, version: int) -> None:
    """Move the folder of a removed version away and free its contents. Failing here leaves garbage for `sweep`."""
    digests: list[str] = []
    with suppress(OSError, ValueError, LookupError):
        manifest = load_manifest(layout, name, version)
        digests = [manifest.digest, *(fact.sha256 for fact in manifest.files.values())]
    away = new_tmp(layout.tmp)
    with suppress(OSError):
        fs.rename(layout.version(name, version), away)
        fs.fsync_dir(layout.versions(name))
        discard(fs, away)
        drop_unused(fs, layout, digests)
