"""Links in place of folders: a store has none, since through one it would read, write or remove what is not its own.

A store that came from elsewhere may have been made to do so: `tmp` as a link to somebody's documents would be swept.
The folder of the store itself may be a link, which its owner made.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import StoreCorrupt
from .layout import Layout

HINT = "Nothing in a store may be a link. Remove it, or copy what it leads to here (cp -L)."


def is_folder(path: Path) -> bool:
    """Whether a folder is there, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def refuse_links(layout: Layout) -> None:
    """Raise StoreCorrupt where one of the folders of which a store consists is a link."""
    for folder in (layout.adapters, layout.all_aliases, layout.objects, layout.tmp):
        if os.path.islink(folder):
            raise StoreCorrupt(f"{folder} is a symbolic link.", HINT)


def links(layout: Layout) -> Iterator[Path]:
    """Links where the folders of names and of objects should be."""
    for room in (layout.adapters, layout.all_aliases, layout.objects):
        yield from (path for path in _entries(room) if path.is_symlink())


def object_files(layout: Layout) -> Iterator[Path]:
    """Everything where objects lie, not looking into links."""
    for folder in _entries(layout.objects):
        yield from _entries(folder)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if is_folder(folder) else []
