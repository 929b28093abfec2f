"""Tar archives, read block by block, and written.

A strict reader of our own: `tarfile` takes extended headers of any declared size into memory, falls back to other
encodings and forgives damage, and what it does with contradictions differs between readers and releases. Here an
archive that two readers could take for two things is refused. Formats: POSIX.1-2001 pax (which holds ustar) and GNU
tar's long names, https://www.gnu.org/software/tar/manual/html_node/Standard.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import FormatError, UnsafeFile, Unsupported
from .archive_members import Members, shown
from .archive_streams import CHUNK, Stream

BLOCK, RECORD = 512, 10_240
MAX_EXTENDED = 64 << 10  # bytes of one pax header or long name
MAX_RECORDS = 100  # of one pax header
MAX_PADDING = 1 << 20  # zeros after the end; tar fills its last record, of 10 KiB unless told otherwise
MAX_OCTAL = 8**11 - 1  # bytes; a larger size does not fit the digits of a header
MAGIC_AT = 257
USTAR, GNU = b"ustar\x0000", b"ustar  \0"

_FILES, _FOLDER, _LONG_NAME, _PAX, _GLOBAL = (b"0", b"\0"), b"5", b"L", b"x", b"g"
_REFUSED = {
    b"1": "is a hard link", b"2": "is a symbolic link", b"3": "is a device", b"4": "is a device", b"6": "is a fifo",
    b"K": "is a link", b"S": "is a sparse file",
}  # fmt: skip
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*", re.ASCII)
_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))  # mode, ids, time, device
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=\n\0]+)=")


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    size: int
    kind: bytes


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so is a tar archive."""
    return start[MAGIC_AT : MAGIC_AT + 8] in (USTAR, GNU)


def read_tar(stream: Stream, members: Members) -> None:
    """Read a tar archive up to its end and hand the wanted files to `members`.

    Raises:
        UnsafeFile: links, devices, sparse files, unsafe names.
        FormatError: damage, contradictions, more than the limits.
    """
    waiting: dict[str, str] = {}  # what a pax header or a long name says of the next member
    before: set[str] = set()  # which extended headers stand before the next member
    while (header := _next_header(stream)) is not None:
        if header.kind not in (_PAX, _GLOBAL, _LONG_NAME):
            _read_member(stream, header, waiting, members)
            waiting, before = {}, set()
            continue
        group = "all" if header.kind == _GLOBAL else "next"
        if group in before:
            # Readers disagree on which of them holds.
            raise FormatError(f"{members.what} has two extended headers for one member.")
        before.add(group)
        body = _extended(stream, header.size, members)
        if header.kind == _LONG_NAME:
            waiting = {"path": _text(body, members.what)}
        elif header.kind == _PAX:
            waiting = _pax(body, members)
        elif {"path", "size"} & set(_pax(body, members)):
            members.unsafe(header.name, "renames or resizes all members")
    if before:
        raise FormatError(f"{members.what} ends after an extended header.")
    _check_end(stream)


def tar_bytes(files: Mapping[str, bytes]) -> Iterator[bytes]:
    """A ustar archive of `files` (name -> content) in chunks: the same bytes for the same files, whatever their order.

    Sorted by name; mode 0644, no owner, time 0. Contents are passed on as they are, never copied.

    Raises:
        Unsupported: at once, for a name that does not fit a header or a file of 8 GiB or more.
        UnsafeFile: at once, for a name that `read_archive` would refuse.
    """
    members = Members("the archive", {})
    for name, data in files.items():
        members.declare(name, 0, folder=False)
        if not name.isascii() or len(name) > 100:
            raise Unsupported(f"{shown(name)} is not a name for a tar archive.", "Use at most 100 ASCII characters.")
        if len(data) > MAX_OCTAL:
            message = f"{shown(name)} is {len(data)} bytes; the limit in a tar archive is {MAX_OCTAL}."
            raise Unsupported(message, "Export to a folder.")
    return _chunks(dict(sorted(files.items())))


def _chunks(files: dict[str, bytes]) -> Iterator[bytes]:
    written = 0
    for name, data in files.items():
        yield _ustar_header(name, len(data))
        yield data
        yield bytes(-len(data) % BLOCK)
        written += BLOCK + len(data) + -len(data) % BLOCK
    yield bytes(2 * BLOCK + -(written + 2 * BLOCK) % RECORD)


def _ustar_header(name: str, size: int) -> bytes:
    fields = [name.encode("ascii").ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, b"%011o\0" % size, b"0" * 11]
    fields += [b"\0", b" " * 8, b"0", bytes(100), USTAR, bytes(64), b"0000000\0" * 2]
    block = b"".join(fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _next_header(stream: Stream) -> _Header | None:
    """The next header block, or None for the block of zeros that ends an archive."""
    block = stream.read(BLOCK)
    if not block.strip(b"\0"):
        return None
    if not is_tar(block):
        raise FormatError(f"{stream.what} is not a tar archive, or damaged: a header without its magic.")
    if _octal(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise FormatError(f"{stream.what} is damaged: the checksum of a header is wrong.", "Copy or pack it again.")
    if any(_octal(block[begin:end]) is None and block[begin] not in (0x80, 0xFF) for begin, end in _NUMBERS):
        raise FormatError(f"{stream.what} is damaged: a field of a header is not a number.")
    name, prefix = _text(block[:100], stream.what), block[345:500]
    if prefix.strip(b"\0") and block[MAGIC_AT : MAGIC_AT + 8] == GNU:
        # GNU tar keeps times of incremental backups there; other readers take them for a folder.
        raise FormatError(f"{stream.what} is an incremental backup of GNU tar.", "Pack the adapter's folder again.")
    folder = _text(prefix, stream.what)
    return _Header(f"{folder}/{name}" if folder else name, _size(block[124:136], stream.what), block[156:157])


def _octal(field: bytes) -> int | None:
    match = _OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else None


def _size(field: bytes, what: str) -> int:
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if size is None or size >= 1 << 63:
        raise FormatError(f"{what} declares a member of a negative or absurd size.")
    return size


def _text(field: bytes, what: str) -> str:
    """Text up to the first NUL, after which nothing may hide. Bytes that are not UTF-8 are kept as surrogates."""
    text, _, rest = field.partition(b"\0")
    if rest.strip(b"\0"):
        raise UnsafeFile(f"{what}: member {shown(text.decode('latin-1'))} hides something behind a NUL in its name.")
    return text.decode("utf-8", "surrogateescape")


def _read_member(stream: Stream, header: _Header, told: Mapping[str, str], members: Members) -> None:
    name = told.get("path", header.name)
    folder = header.kind == _FOLDER or (header.kind == b"\0" and header.name.endswith("/"))  # the latter is V7's way
    if header.kind in _REFUSED:
        members.unsafe(name, _REFUSED[header.kind])
    if not folder and header.kind not in _FILES:
        members.unsafe(name, f"is of the unknown type {header.kind.decode('latin-1')!a}")
    size = int(told.get("size", header.size))
    if size != header.size and size <= MAX_OCTAL:
        members.unsafe(name, f"has two sizes, {header.size} and {size}")
    path = members.declare(name, size, folder=folder)
    if folder:
        return
    if members.wants(path):
        members.keep(path, stream.read(size))
    else:
        stream.skip(size)
    stream.skip(-size % BLOCK)


def _extended(stream: Stream, size: int, members: Members) -> bytes:
    """The body of an extended header; what fills its last block must be zeros, since some readers read it too."""
    if size > MAX_EXTENDED:
        raise FormatError(f"{members.what} has an extended header of {size} bytes; the limit is {MAX_EXTENDED}.")
    members.spend(size)
    body = stream.read(size + -size % BLOCK)
    if body[size:].strip(b"\0"):
        raise FormatError(f"{members.what} hides something behind an extended header.")
    return body[:size]


def _pax(body: bytes, members: Members) -> dict[str, str]:
    """What a pax header says of path and size, from records `<length> <key>=<value>\\n`; other keys change nothing."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        if len(found) == MAX_RECORDS:
            raise FormatError(f"{members.what} has a pax header of more records than the limit of {MAX_RECORDS}.")
        match = _RECORD.match(body, at)
        end = at + int(match[1]) if match else 0
        if match is None or body[end - 1 : end] != b"\n" or match[2] in found:
            raise FormatError(f"{members.what} has a damaged pax header.", "Copy or pack it again.")
        found[match[2]] = body[match.end() : end - 1]
        at = end
    if any(key.startswith(b"GNU.sparse.") for key in found):
        members.unsafe(_pax_name(found), _REFUSED[b"S"])
    if b"linkpath" in found:
        members.unsafe(_pax_name(found), _REFUSED[b"K"])
    if not re.fullmatch(rb"[0-9]{1,18}", found.get(b"size", b"0")):
        raise FormatError(f"{members.what} declares a member of a negative or absurd size.")
    told = {key: found.get(key.encode()) for key in ("path", "size")}
    return {key: value.decode("utf-8", "surrogateescape") for key, value in told.items() if value is not None}


def _pax_name(found: Mapping[bytes, bytes]) -> str:
    return found.get(b"path", b"(named in the next header)").decode("utf-8", "surrogateescape")


def _check_end(stream: Stream) -> None:
    """After the first block of zeros there must be a second, and nothing but zeros, up to the end of the file."""
    padding = stream.read(BLOCK)
    total = 2 * BLOCK
    while padding:
        if padding.strip(b"\0"):
            raise FormatError(f"{stream.what} goes on after its end, perhaps with another archive.", "Pack it again.")
        if total > MAX_PADDING:
            raise FormatError(f"{stream.what} has more than the limit of {MAX_PADDING} bytes of zeros at its end.")
        padding = stream.some(CHUNK)
        total += len(padding)
