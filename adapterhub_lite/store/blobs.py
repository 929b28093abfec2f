"""Contents by digest: they only save space. A version is whole without them, its files are links to them or copies."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..formats.files import read_regular
from .fs import FileSystem, discard, ensure_folder, link_or_write, replace_file
from .layout import Layout


def place(fs: FileSystem, layout: Layout, data: bytes, digest: str, target: Path) -> None:
    """Put `data` at the new path `target`, sharing space with every equal content. A damaged object is replaced."""
    blob = layout.object(digest)
    if not _holds(blob, data):
        ensure_folder(fs, blob.parent, layout.root)
        replace_file(fs, layout.tmp, blob, data)
    link_or_write(fs, blob, target, data)


def drop_unused(fs: FileSystem, layout: Layout, digests: list[str]) -> None:
    """Remove those objects that no version links to. A `place` that meets this at the same time writes a copy."""
    for digest in digests:
        blob = layout.object(digest)
        with suppress(OSError):
            if os.lstat(blob).st_nlink == 1:
                discard(fs, blob)


def _holds(blob: Path, data: bytes) -> bool:
    if not blob.is_file() or blob.stat().st_size != len(data):
        return False
    try:
        return read_regular(blob, len(data)) == data
    except (OSError, ValueError, LookupError):
        return False  # unreadable, or removed meanwhile: write it anew
