"""What the readers of archives share: which members are wanted, and which names, sizes and totals are refused.

Nothing is extracted, so no name ever becomes a path; names that could escape a folder are refused all the same, since
an archive that holds one was made to harm somebody.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import NoReturn

from ..errors import FormatError, UnsafeFile

MAX_MEMBERS = 1_000
MAX_NAME = 255  # characters, folders included
SLACK = 64 << 20  # bytes that all members together may have beyond the limits of the wanted ones
SAFE_HINT = "Only plain files and folders are read from archives; pack the adapter's folder again."

_CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
_DRIVE = re.compile("[A-Za-z]:")
_SHOWN = 80


class Members:
    """Collects the wanted members of one archive and refuses it at the first name or size that is not allowed.

    Members may lie at the top or in one common top folder; what macOS adds beside it (`__MACOSX/`, `._name`) does not
    count. Readers call `declare` for every member, and `keep` with the content of those that it wants.
    """

    def __init__(self, what: str, limits: Mapping[str, int]) -> None:
        self.what = what
        self._limits = limits
        self._left = sum(limits.values()) + SLACK
        self._names: set[str] = set()
        self._tops: set[str] = set()
        self._paths: list[str] = []
        self._kept: dict[str, bytes] = {}

    def declare(self, name: str, size: int, *, folder: bool) -> str:
        """The path under which a member is kept: its name without `./` and doubled slashes.

        Raises:
            UnsafeFile: a name that could leave a folder, hides something, or is there twice.
            FormatError: too many members, or too many bytes.
        """
        path = self._path(name, folder)
        key = unicodedata.normalize("NFC", path).casefold()
        if key in self._names:
            self.unsafe(name, "is there twice (letter case does not count)")
        self._names.add(key)
        if len(self._names) > MAX_MEMBERS:
            raise FormatError(f"{self.what} has more members than the limit of {MAX_MEMBERS}.", SAFE_HINT)
        self._place(path, folder)
        if folder and size:
            self.unsafe(name, "is a folder with content")
        if not folder and self.wants(path) and size > self._limit(path):
            message = f"{self.what}: member {shown(name)} is {size} bytes; the limit is {self._limit(path)}."
            raise FormatError(message)
        self.spend(size)
        return path

    def wants(self, path: str) -> bool:
        """Whether the content of a declared file is wanted, by all that is known so far."""
        folder, _, name = path.rpartition("/")
        return folder == self._root() and name in self._limits

    def keep(self, path: str, data: bytes) -> None:
        """Take the content of a wanted member."""
        self._kept[path] = data

    def spend(self, size: int) -> None:
        """Count bytes that the archive unpacks to. Raises FormatError when it is more than any adapter needs."""
        self._left -= size
        if self._left < 0:
            total = sum(self._limits.values()) + SLACK
            raise FormatError(f"{self.what} unpacks to more than the limit of {total} bytes.", SAFE_HINT)

    def result(self) -> tuple[dict[str, bytes], list[str]]:
        """The wanted members by their last name, and the others in a printable form, sorted.

        Raises:
            FormatError: nothing wanted was there.
        """
        root = self._root()
        if not self._kept:
            expected = f"none of {', '.join(self._limits)} at its top or in one common top folder"
            hint = "Pack one adapter's folder: tar -cf adapter.tar FOLDER"
            raise FormatError(f"{self.what} holds {expected}.", hint)
        inside = f"{root}/" if root else ""
        others = (path for path in self._paths if path not in self._kept and path not in ("/", inside))
        ignored = sorted(path.removeprefix(inside) for path in others)
        return {path.removeprefix(inside): data for path, data in self._kept.items()}, [*map(printable, ignored)]

    def unsafe(self, name: str, reason: str) -> NoReturn:
        """Refuse the archive for one member."""
        raise UnsafeFile(f"{self.what}: member {shown(name)} {reason}.", SAFE_HINT)

    def _path(self, name: str, folder: bool) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if len(name) > MAX_NAME:
            self.unsafe(name, f"has a name of {len(name)} characters; the limit is {MAX_NAME}")
        if _CONTROL.search(name):
            self.unsafe(name, "has a control character in its name")
        if "\\" in name:
            self.unsafe(name, "has a backslash in its name")
        if name.startswith("/") or any(_DRIVE.match(part) for part in parts):
            self.unsafe(name, "has an absolute path")
        if ".." in parts:
            self.unsafe(name, "has '..' in its path")
        if not name or not (parts or folder):
            self.unsafe(name, "has no name")
        if name.endswith(("/", "/.")) and not folder:
            self.unsafe(name, "is a file with the name of a folder")
        return "/".join(parts)

    def _place(self, path: str, folder: bool) -> None:
        """Remember where members lie; what was kept from a folder that is not the only one is let go."""
        full = path + "/" * folder
        top, slash, _ = full.partition("/")
        litter = full.startswith("__MACOSX/") or full.rpartition("/")[2].startswith("._")
        if path and not litter:
            self._tops.add(top if slash else "")
        self._paths.append(full)
        self._kept = {path: data for path, data in self._kept.items() if self.wants(path)}

    def _root(self) -> str:
        return next(iter(self._tops)) if len(self._tops) == 1 else ""

    def _limit(self, path: str) -> int:
        return self._limits[path.rpartition("/")[2]]


def shown(name: str) -> str:
    """A member's name for a message: escaped and short."""
    text = ascii(name)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...{text[0]}"


def printable(name: str) -> str:
    """A member's name for a list: as it is where it can be printed."""
    return name if name.isprintable() and len(name) <= _SHOWN else shown(name)
