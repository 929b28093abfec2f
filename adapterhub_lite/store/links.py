"""What must not stand in place of a folder: a link, through which a store would touch what is not its own.

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

STRANGE = "is a symbolic link or a file, where a folder should be"


def is_folder(path: Path) -> bool:
    """Whether a folder is there, and no link to one."""
    return _mode(path) == stat.S_IFDIR


def refuse_strange(layout: Layout) -> None:
    """Raise StoreCorrupt where something else stands in place of one of the folders of which a store consists."""
    for folder in (layout.adapters, layout.all_aliases, layout.objects, layout.tmp):
        if _mode(folder) not in (None, stat.S_IFDIR):
            raise StoreCorrupt(f"{folder} {STRANGE}.", "Look at it, and move it away: nothing is read through it.")


def strange(layout: Layout) -> Iterator[Path]:
    """What stands in place of the folders of names and of objects."""
    for room in (layout.adapters, layout.all_aliases, layout.objects):
        yield from (path for path in _entries(room) if not is_folder(path))


def object_files(layout: Layout) -> Iterator[Path]:
    """Everything where objects lie, not looking into links."""
    for folder in _entries(layout.objects):
        yield from _entries(folder)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if is_folder(folder) else []


def _mode(path: Path) -> int | None:
    """The type of what is there; None for nothing."""
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
