"""The version numbers of a name, as its folder lists them."""

from __future__ import annotations

import os
from bisect import bisect_left
from dataclasses import dataclass

from .layout import TOMBSTONE, Layout


@dataclass(frozen=True, slots=True)
class Numbers:
    """Versions that exist and versions that were removed, each oldest first."""

    present: tuple[int, ...]
    removed: tuple[int, ...]

    @property
    def highest(self) -> int:
        """The highest number ever used; 0 where there is none."""
        return max(self.present[-1] if self.present else 0, self.removed[-1] if self.removed else 0)

    def has(self, version: int) -> bool:
        """Whether a version exists."""
        place = bisect_left(self.present, version)
        return place < len(self.present) and self.present[place] == version


def numbers(layout: Layout, name: str) -> Numbers:
    """What the folder of `name` holds; nothing where it is absent or a link."""
    folder = layout.versions(name)
    try:
        entries = [] if os.path.islink(folder) else os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return Numbers((), ())
    folders = {int(entry) for entry in entries if is_number(entry)}
    removed = {int(entry[: -len(TOMBSTONE)]) for entry in entries if _is_tombstone(entry)}
    return Numbers(tuple(sorted(folders - removed)), tuple(sorted(removed)))


def taken(layout: Layout, name: str, version: int) -> bool:
    """Whether a number is or was a version."""
    return os.path.lexists(layout.version(name, version)) or os.path.lexists(layout.tombstone(name, version))


def is_number(text: str) -> bool:
    """Whether a file name is that of a version: 1, 2, 3 and so on, in ASCII."""
    return text.isascii() and text.isdigit() and text[0] != "0" and len(text) <= 9


def _is_tombstone(text: str) -> bool:
    return text.endswith(TOMBSTONE) and is_number(text[: -len(TOMBSTONE)])
