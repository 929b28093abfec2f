"""Zip archives, read by their central directory.

A strict reader of our own: `zipfile` takes a central directory of any declared size into memory, and searches for it
where others do not. Here directory, local headers and contents must account for every byte of the file, so that no two
readers see two archives, and no bytes serve two members. Format: PKWARE APPNOTE 6.3.10, without zip64, encryption and
split archives.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import FormatError
from .archive_members import MAX_MEMBERS, SAFE_HINT, Members, shown
from .archive_streams import RAW, Inflated, Plain

MAX_DIRECTORY = 1 << 19  # bytes
MAX_COMMENT = 0xFFFF  # bytes
MAX_VERSION = 63  # of the format
_END, _ENTRY, _LOCAL = struct.Struct("<4s4H2LH"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_END_MAGIC, _ENTRY_MAGIC, _LOCAL_MAGIC, _ZIP64_LOCATOR = b"PK\5\6", b"PK\1\2", b"PK\3\4", b"PK\6\7"
_LOCATOR_SIZE = 20
MAGICS = (_LOCAL_MAGIC, _END_MAGIC)
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _DESCRIPTOR, _UTF8, _KNOWN = 0x2041, 0x0008, 0x0800, 0x080E  # flags; known also holds deflate's options
_DESCRIPTORS = (12, 16, 20, 24)  # bytes of checksum and sizes after a content: with or without a magic, 32 or 64 bits
_FIELD = struct.Struct("<2H")  # before an extra field: kind and length
_UNICODE_NAME, _NAME_AT = 0x7075, 5  # the field with a name in UTF-8, behind version and checksum
_HINT = "Pack it again, as .tar or as .zip."


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the central directory; `raw` is the name's bytes, `at` the offset of the local header."""

    raw: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    mode: int
    at: int

    @property
    def name(self) -> str:
        """Names are in UTF-8 where the flag says so, else in the code page of DOS."""
        return self.raw.decode("utf-8" if self.flags & _UTF8 else "cp437")


def read_zip(file: io.BufferedIOBase, members: Members) -> None:
    """Read a zip archive and hand the wanted files to `members`; nothing else is unpacked.

    Raises:
        UnsafeFile: encrypted members, links, unsafe names, names that differ between directory and member.
        FormatError: damage, contradictions, more than the limits.
    """
    directory, begin, count = _directory(file, members.what)
    entries: dict[str, _Entry] = {}
    for entry in _entries(directory, count, members):
        folder = _check(entry, members)
        entries[members.declare(entry.name, entry.size, folder=folder)] = entry
    contents = _contents(file, list(entries.values()), begin, members)
    for path, entry in entries.items():
        if members.wants(path) and not entry.name.endswith("/"):
            file.seek(contents[entry.at])
            members.keep(path, _content(file, entry, members))


def _directory(file: io.BufferedIOBase, what: str) -> tuple[bytes, int, int]:
    """The central directory's bytes, its offset, and how many entries it should have."""
    end_at, end = _find_end(file, what)
    _, disk, first, here, count, size, begin, _ = _END.unpack(end)
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (size, begin):
        raise _zip64(what)
    if disk or first or here != count:
        raise FormatError(f"{what} is a part of a split zip archive.", _HINT)
    if count > MAX_MEMBERS:
        raise FormatError(f"{what} has {count} members; the limit is {MAX_MEMBERS}.", SAFE_HINT)
    if begin + size != end_at:
        raise FormatError(f"{what} is damaged, or has something before or after its zip archive.", _HINT)
    if size > MAX_DIRECTORY:
        raise FormatError(f"{what} has a zip directory of {size} bytes; the limit is {MAX_DIRECTORY}.", _HINT)
    file.seek(begin)
    directory = Plain(file, what).read(size)
    if directory[-_LOCATOR_SIZE:].startswith(_ZIP64_LOCATOR):
        raise _zip64(what)
    return directory, begin, count


def _find_end(file: io.BufferedIOBase, what: str) -> tuple[int, bytes]:
    """Offset and bytes of the end record, which with its comment is the last thing in the file."""
    total = file.seek(0, os.SEEK_END)
    begin = max(total - _END.size - MAX_COMMENT, 0)
    file.seek(begin)
    tail = file.read(total - begin)
    at = tail.rfind(_END_MAGIC)  # other readers take the last one too
    end, comment = tail[at : at + _END.size], tail[at + _END.size :]
    if at < 0 or len(end) < _END.size or len(comment) != _END.unpack(end)[-1]:
        raise FormatError(f"{what} is not a whole zip archive: it does not end as one.", "Copy it again.")
    return begin + at, end


def _entries(directory: bytes, count: int, members: Members) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if len(directory) - at < _ENTRY.size:
            raise _damaged(members.what)
        magic, _, version, flags, method, _, _, crc, packed, size, name, extra, comment, disk, _, attributes, local = (
            _ENTRY.unpack_from(directory, at)
        )
        at += _ENTRY.size
        raw, fields = directory[at : at + name], directory[at + name : at + name + extra]
        at += name + extra + comment
        if magic != _ENTRY_MAGIC or disk or version > MAX_VERSION:
            raise _damaged(members.what)
        if 0xFFFFFFFF in (packed, size, local):
            raise _zip64(members.what)
        entry = _Entry(raw, flags, method, crc, packed, size, attributes >> 16, local)
        _check_encoding(entry, fields, members)
        yield entry
    if at != len(directory):
        raise _damaged(members.what)


def _check_encoding(entry: _Entry, extra: bytes, members: Members) -> None:
    """One name only: in its encoding, and the same in the extra field that some readers prefer."""
    try:
        name = entry.name
    except UnicodeDecodeError:
        members.unsafe(entry.raw.decode("latin-1"), "has a name that is not the UTF-8 it claims to be")
    at = 0
    while at + _FIELD.size <= len(extra):
        kind, length = _FIELD.unpack_from(extra, at)
        begin, at = at + _FIELD.size, at + _FIELD.size + length
        if at > len(extra):
            raise _damaged(members.what)
        if kind == _UNICODE_NAME and extra[begin + _NAME_AT : at] != entry.raw:
            members.unsafe(name, "has a second name")


def _check(entry: _Entry, members: Members) -> bool:
    """Whether an entry is a folder; anything that is neither folder nor plain file is refused."""
    kind, folder = stat.S_IFMT(entry.mode), entry.name.endswith("/")
    if entry.flags & _ENCRYPTED:
        members.unsafe(entry.name, "is encrypted")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        members.unsafe(entry.name, "is a link" if stat.S_ISLNK(entry.mode) else "is a device or another special file")
    if kind == stat.S_IFDIR and not folder:
        members.unsafe(entry.name, "is a folder with the name of a file")
    if entry.flags & ~_KNOWN or entry.method not in (_STORED, _DEFLATED):
        message = f"{members.what} uses zip's method {entry.method} with flags {entry.flags:#x}"
        raise FormatError(f"{message}; stored and deflated members are read.", _HINT)
    if entry.method == _STORED and entry.packed != entry.size:
        members.unsafe(entry.name, f"has two sizes, {entry.packed} and {entry.size}")
    return folder


def _contents(file: io.BufferedIOBase, entries: list[_Entry], begin: int, members: Members) -> dict[int, int]:
    """Where the content of each entry begins, by the offset of its local header.

    Local headers and contents must follow each other from the first byte to the directory: bytes that serve two members
    make a bomb, and bytes that serve none hide something.
    """
    found, at, last = {}, 0, 0
    for entry in sorted(entries, key=lambda entry: entry.at):
        # What is left between two members is the former's descriptor.
        if entry.at - at not in ((0, *_DESCRIPTORS) if last & _DESCRIPTOR else (0,)):
            members.unsafe(entry.name, "overlaps another member, or hides something before it")
        file.seek(entry.at)
        at = found[entry.at] = entry.at + _check_local(file, entry, members)
        at, last = at + entry.packed, entry.flags
        if at > begin:
            members.unsafe(entry.name, "overlaps the directory of the archive")
    if begin - at not in ((0, *_DESCRIPTORS) if last & _DESCRIPTOR else (0,)):
        raise FormatError(f"{members.what} is damaged, or hides something before its directory.", _HINT)
    return found


def _check_local(file: io.BufferedIOBase, entry: _Entry, members: Members) -> int:
    """The length of a local header, which must say what the directory says."""
    head = Plain(file, members.what).read(_LOCAL.size)
    magic, _, flags, method, _, _, crc, packed, size, name, extra = _LOCAL.unpack(head)
    raw = Plain(file, members.what).read(name)
    if magic != _LOCAL_MAGIC:
        raise _damaged(members.what)
    if raw != entry.raw:
        members.unsafe(entry.name, f"has another name at its content, {shown(raw.decode('latin-1'))}")
    if 0xFFFFFFFF in (packed, size):
        raise _zip64(members.what)
    later = flags & _DESCRIPTOR  # sizes and checksum follow the content
    if (flags, method) != (entry.flags, entry.method) or not (
        later or (crc, packed, size) == (entry.crc, entry.packed, entry.size)
    ):
        members.unsafe(entry.name, "is described differently at its content")
    length: int = _LOCAL.size + name + extra
    return length


def _content(file: io.BufferedIOBase, entry: _Entry, members: Members) -> bytes:
    if entry.method == _STORED:
        data = Plain(file, members.what).read(entry.size)
    else:
        stream = Inflated(file, entry.packed, RAW, members.what)
        data = stream.read(entry.size)
        stream.finish()
    if zlib.crc32(data) != entry.crc:
        raise FormatError(f"{members.what} is damaged: the checksum of a member is wrong.", "Copy or pack it again.")
    return data


def _damaged(what: str) -> FormatError:
    return FormatError(f"{what} has a damaged zip directory.", "Copy or pack it again.")


def _zip64(what: str) -> FormatError:
    return FormatError(f"{what} is a zip64 archive, which is not read.", "Pack it as .tar.")
