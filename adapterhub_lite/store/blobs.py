"""Contents by digest: they only save space. A version is whole without them, and its files are links to them.

An object is a second name of a file that a version has, made when those bytes are durable already. On a file system
without hard links there are none.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..formats.files import read_regular
from .fs import NO_LINKS, FileSystem, discard, new_tmp, write_file
from .layout import Layout
from .manifest import FileFact
from .reading import file_problem


def place(fs: FileSystem, layout: Layout, data: bytes, digest: str, target: Path) -> None:
    """Put `data` at the new path `target`, durably, sharing space with equal content.

    A damaged object is replaced by what is written here. An object may vanish at any time.
    """
    blob = layout.object(digest)
    if not os.path.islink(blob.parent) and _holds(blob, data):
        try:
            fs.link(blob, target)
            return
        except OSError as error:
            if error.errno not in NO_LINKS and not isinstance(error, FileNotFoundError):
                raise
    write_file(fs, target, data)
    share(fs, layout, target, digest)


def share(fs: FileSystem, layout: Layout, source: Path, digest: str) -> None:
    """Make the durable file `source` the object of its content, in place of a damaged one.

    Nothing on a file system without hard links, or where the folder of the object is not the store's own.
    """
    blob = layout.object(digest)
    if os.path.islink(blob.parent):
        return
    for folder in (layout.objects, blob.parent):  # not synced: nothing that must last depends on them
        with suppress(FileExistsError):
            fs.mkdir(folder)
    staged = new_tmp(layout.tmp)
    try:
        fs.link(source, staged)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return
    try:
        fs.replace(staged, blob)
    except BaseException:
        discard(fs, staged)
        raise


def drop_unused(fs: FileSystem, layout: Layout, digests: list[str]) -> None:
    """Remove those objects that no version links to. A `place` that meets this at the same time writes a copy."""
    for digest in digests:
        blob = layout.object(digest)
        with suppress(OSError):
            if not os.path.islink(blob.parent) and os.lstat(blob).st_nlink == 1:
                discard(fs, blob)


def drop_damaged(fs: FileSystem, layout: Layout, fact: FileFact) -> None:
    """Remove the object of a content where it is something else by now."""
    blob = layout.object(fact.sha256)
    if os.path.lexists(blob) and not os.path.islink(blob.parent) and file_problem(blob, fact):
        discard(fs, blob)


def _holds(blob: Path, data: bytes) -> bool:
    try:
        if os.lstat(blob).st_size != len(data):
            return False
        return read_regular(blob, len(data)) == data
    except (OSError, ValueError, LookupError):
        return False  # absent, unreadable, or removed meanwhile: write it anew
