"""Publishing and removing versions, each decided by one atomic step and without any lock.

A version appears by renaming a complete, durable folder onto a number that nothing has; it disappears by its tombstone.
Readers take no folder that has a tombstone, so clearing it away afterwards is not part of the promise.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import StoreError
from ..formats.card import utc_now
from ..formats.strict_json import dump
from .blobs import drop_unused, place
from .fs import FileSystem, discard, ensure_folder, new_tmp, replace_file, write_file
from .layout import CONFIG, MANIFEST, WEIGHTS, Layout
from .manifest import FileFact, Manifest, sha256
from .migrate import ensure_store
from .numbers import numbers, taken
from .reading import load_manifest

PROBE = b"Is there room for a file?\n"
STALE_SECONDS = 24 * 3600.0  # no operation works on one temporary entry for so long
_ATTEMPTS = 10_000
_LOOK = 32  # after so many taken numbers, list them
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})
_SHARED = (CONFIG, WEIGHTS)  # a card or manifest is like no other


def publish(
    fs: FileSystem,
    layout: Layout,
    name: str,
    contents: Mapping[str, bytes],
    received: Mapping[str, object] | None = None,
    after: int | None = None,
) -> tuple[int, Manifest]:
    """Make a new version of `name` with these files; return its number and manifest.

    Args:
        received: where it came from, for a version that keeps its identity.
        after: the highest number known to be taken, if one is: saves listing the others.
    """
    ensure_store(fs, layout)
    sweep_tmp(fs, layout)
    if after is None:
        after = numbers(layout, name).highest
    if not after:  # whoever published a version has made the folder durable
        ensure_folder(fs, layout.versions(name), layout.root)
    manifest = Manifest({file: FileFact.of(data) for file, data in contents.items()}, received)
    staged = new_tmp(layout.tmp)
    try:
        fs.mkdir(staged)
        for file, data in contents.items():
            if file in _SHARED:
                place(fs, layout, data, manifest.files[file].sha256, staged / file)
            else:
                write_file(fs, staged / file, data)
        write_file(fs, staged / MANIFEST, manifest.to_store())
        fs.fsync_dir(staged)
        return _claim(fs, layout, name, staged, after), manifest
    except BaseException:
        discard(fs, staged)
        raise


def try_writing(fs: FileSystem, layout: Layout) -> None:
    """Write a file and remove it: what permissions say is not what a read-only or full disk does."""
    probe = new_tmp(layout.tmp)
    try:
        write_file(fs, probe, PROBE)
    except BaseException:
        discard(fs, probe)
        raise
    fs.unlink(probe)


def remove(fs: FileSystem, layout: Layout, name: str, version: int, digest: str) -> None:
    """Remove a version: its tombstone is the decision, the rest is tidying."""
    ensure_store(fs, layout)
    _bury(fs, layout, name, version, digest)
    clear(fs, layout, name, version)


def sweep_tmp(fs: FileSystem, layout: Layout, older_than: float = STALE_SECONDS) -> None:
    """Remove temporary entries of crashed operations."""
    for entry in stale(layout, older_than):
        discard(fs, entry)


def stale(layout: Layout, older_than: float = STALE_SECONDS) -> list[Path]:
    """Temporary entries that nothing has touched for `older_than` seconds."""
    found = []
    with suppress(OSError), os.scandir(layout.tmp) as entries:
        for entry in entries:
            with suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > older_than:
                    found.append(Path(entry.path))
    return found


def clear(fs: FileSystem, layout: Layout, name: str, version: int) -> bool:
    """Move the folder of a removed version away and free its contents; whether this call moved it.

    Failing here leaves garbage for `gc`.
    """
    digests: list[str] = []
    with suppress(OSError, ValueError, LookupError):
        manifest = load_manifest(layout, name, version)
        digests = [manifest.digest, *(fact.sha256 for fact in manifest.files.values())]
    away, moved = new_tmp(layout.tmp), False
    with suppress(OSError):
        fs.rename(layout.version(name, version), away)
        moved = True
        fs.fsync_dir(layout.versions(name))
        discard(fs, away)
        drop_unused(fs, layout, digests)
    return moved


def _claim(fs: FileSystem, layout: Layout, name: str, staged: Path, after: int) -> int:
    """Rename `staged` onto the first free number, trying the next one when another writer was faster."""
    version = after
    for attempt in range(1, _ATTEMPTS):
        version = 1 + (version if attempt % _LOOK else max(version, numbers(layout, name).highest))
        if taken(layout, name, version):
            continue
        target = layout.version(name, version)
        try:
            fs.rename(staged, target)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            continue
        if _settle(fs, layout, name, version, staged):
            return version
    raise StoreError(f"No free version number for {name} after {_ATTEMPTS} attempts.", "Try again.")


def _settle(fs: FileSystem, layout: Layout, name: str, version: int, staged: Path) -> bool:
    """Make a published name durable, or take it back: what was not acknowledged should not stay.

    False if the number was used: a version that was published and removed since we looked leaves it free but its
    tombstone in place.
    """
    target = layout.version(name, version)
    try:
        if layout.tombstone(name, version).exists():
            fs.rename(target, staged)
            return False
        fs.fsync_dir(target.parent)
        return True
    except OSError:
        with suppress(OSError):
            fs.rename(target, staged)
            if numbers(layout, name).highest > version:  # another writer went on from it: leave no gap
                _bury(fs, layout, name, version, "")
        raise


def _bury(fs: FileSystem, layout: Layout, name: str, version: int, digest: str) -> None:
    told = {"digest": digest, "removed": utc_now(), "version": version}
    tombstone = dump({**told, "seal": sha256(dump(told))})
    replace_file(fs, layout.tmp, layout.tombstone(name, version), tombstone)
