"""Versions as PEFT folders, or as one file that another store imports with the same digest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import StoreError
from .fs import MUTABLE, FileSystem, discard, new_tmp, write_chunks, write_file
from .layout import CARD, CONFIG, MANIFEST, WEIGHTS, Layout
from .reading import load_manifest, read_file

ARCHIVE = ".tar"
_ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


def export(fs: FileSystem, layout: Layout, name: str, version: int, target: Path) -> Path:
    """Write a version, whole or not at all: one tar file where `target` ends in .tar, else a folder.

    Raises:
        StoreError: the target is a link, inside the store, or there already (an empty folder may be); it lies in a
            folder that is not there, or its name is that of another kind of archive.
        StoreCorrupt: the version is damaged.
    """
    _check_path(target)
    # The parent is resolved, the last part is not: a link there must be seen, not followed.
    target = target.resolve() if target.name == ".." else target.absolute().parent.resolve() / target.name
    single = target.name.endswith(ARCHIVE)
    _check_target(layout, target, single)
    files = contents(layout, name, version)
    staged = new_tmp(target.parent)
    try:
        if single:
            _write_archive(fs, staged, f"{name}-{version}", files)
            fs.link(staged, target)  # refuses what was made there meanwhile
            discard(fs, staged)
        else:
            _write_folder(fs, staged, files)
            fs.rename(staged, target)
    except BaseException:
        discard(fs, staged)
        raise
    fs.fsync_dir(target.parent)
    return target


def contents(layout: Layout, name: str, version: int) -> dict[str, bytes]:
    """The verified files of a version, with the manifest as the store wrote it that made the version."""
    files = {file: read_file(layout, name, version, file) for file in (CONFIG, WEIGHTS, CARD)}
    return {**files, MANIFEST: load_manifest(layout, name, version).original.to_bytes()}


def _write_folder(fs: FileSystem, staged: Path, files: Mapping[str, bytes]) -> None:
    fs.mkdir(staged)
    for file, data in files.items():
        write_file(fs, staged / file, data, MUTABLE)
    fs.fsync_dir(staged)


def _write_archive(fs: FileSystem, staged: Path, folder: str, files: Mapping[str, bytes]) -> None:
    from ..formats.archive import tar_bytes

    write_chunks(fs, staged, tar_bytes({f"{folder}/{file}": data for file, data in files.items()}), MUTABLE)


def _check_path(target: Path) -> None:
    try:
        sound = b"\0" not in os.fsencode(target)
    except UnicodeEncodeError:
        sound = False
    if not sound:
        raise StoreError(f"{ascii(str(target))[:200]} is not a path.", "Name a file or folder that does not exist yet.")


def _check_target(layout: Layout, target: Path, single: bool) -> None:
    hint = f"Name a {'file' if single else 'folder'} that does not exist yet."
    if not single and target.name.lower().endswith(_ARCHIVES):
        hint = "Name a file that ends in .tar, in small letters, or a folder; `ahl import` reads both."
        raise StoreError(f"{target.name} would be another kind of archive than is written.", hint)
    if target.is_symlink():
        raise StoreError(f"{target} is a symbolic link.", hint)
    if target.is_relative_to(layout.root.resolve()):
        raise StoreError(f"{target} is inside the store.", hint)
    if target.exists() and (single or not target.is_dir()):
        raise StoreError(f"{target} exists.", hint)
    if target.exists() and any(target.iterdir()):
        raise StoreError(f"{target} exists and is not an empty folder.", hint)
    if not target.parent.is_dir():
        if target.parent.exists():
            raise StoreError(f"{target.parent} is a file, where a folder should be.", hint)
        raise StoreError(f"There is no folder {target.parent}.", "Make the folder first.")
