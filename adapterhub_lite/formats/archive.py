"""Adapters out of .tar, .tar.gz and .zip archives, member by member: nothing is extracted, nothing written.

Hostile archives are refused at the first header that shows them, and memory holds no more than what the limits allow
of bytes that are really there. Which reader is used is told by content, never by a file's name.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..errors import FormatError, NotFound, UnsafeFile
from .archive_members import Members
from .archive_streams import GZIP, Inflated, Plain
from .archive_tar import BLOCK, is_tar, read_tar, tar_bytes
from .archive_zip import MAGICS as ZIP_MAGICS
from .archive_zip import read_zip
from .files import open_regular

__all__ = ["ArchiveKind", "archive_kind", "is_archive", "read_archive", "tar_bytes"]

ArchiveKind = Literal["tar", "gzip", "zip"]
_GZIP_MAGIC = b"\x1f\x8b"
_OTHERS = {
    b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x1f\x9d": "compress",
}  # fmt: skip
_READ = "Archives are read as .tar, .tar.gz and .zip."


def is_archive(path: str | Path) -> bool:
    """Whether a regular file is there that begins as a tar, gzip or zip archive does."""
    try:
        with open_regular(path) as raw, io.BufferedReader(raw) as file:
            return archive_kind(file.read(BLOCK)) is not None
    except (NotFound, UnsafeFile):
        return False


def archive_kind(start: bytes) -> ArchiveKind | None:
    """The kind of archive whose first 512 bytes are `start`."""
    if start.startswith(_GZIP_MAGIC):
        return "gzip"
    if start.startswith(ZIP_MAGICS):
        return "zip"
    return "tar" if is_tar(start) else None


def read_archive(path: str | Path, limits: Mapping[str, int]) -> tuple[dict[str, bytes], list[str]]:
    """The wanted members, at the top or in one common top folder, and the printable names of all others.

    `limits` names the wanted files and the most bytes that each may have.

    Raises:
        NotFound, UnsafeFile: nothing there; not a regular file.
        UnsafeFile: a member that is a link, device, sparse or encrypted, or whose name is unsafe or there twice.
        FormatError: no such archive; a damaged one; one beyond the limits; one without any wanted member.
    """
    with open_regular(path) as raw, io.BufferedReader(raw) as file:
        start = file.read(BLOCK)
        file.seek(0)
        members = Members(str(path), limits)
        kind = archive_kind(start)
        if kind == "tar":
            read_tar(Plain(file, members.what), members)
        elif kind == "gzip":
            size = os.fstat(file.fileno()).st_size
            read_tar(Inflated(file, size, GZIP, members.what), members)
        elif kind == "zip":
            read_zip(file, members)
        else:
            raise _foreign(start, members.what)
        return members.result()


def _foreign(start: bytes, what: str) -> FormatError:
    other = next((name for magic, name in _OTHERS.items() if start.startswith(magic)), None)
    return FormatError(f"{what} is packed with {other}." if other else f"{what} is not an archive.", _READ)
