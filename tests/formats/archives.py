"""Archives byte by byte, valid or hostile: libraries refuse to write most of the latter."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

BLOCK = 512
END = bytes(2 * BLOCK)
USTAR, GNU = b"ustar\x0000", b"ustar  \0"
FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": bytes(range(256)) * 5,
}


def head(
    name: str | bytes,
    size: int | bytes = 0,
    kind: bytes = b"0",
    magic: bytes = USTAR,
    put: Mapping[int, bytes] | None = None,
) -> bytes:
    """A tar header; `put` overwrites bytes at offsets, the checksum is that of the result."""
    raw = name if isinstance(name, bytes) else name.encode()
    block = bytearray(BLOCK)
    fields = {0: raw, 100: b"0000644\0", 124: size if isinstance(size, bytes) else b"%011o\0" % size, 156: kind}
    for at, value in {**fields, 257: magic, **(put or {})}.items():
        block[at : at + len(value)] = value
    return checked(bytes(block))


def checked(block: bytes) -> bytes:
    """The header with its checksum set."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def file(name: str | bytes, data: bytes = b"x", **fields: object) -> bytes:
    """Header, content and padding of a tar member."""
    return head(name, len(data), **fields) + data + bytes(-len(data) % BLOCK)  # type: ignore[arg-type]


def good(folder: str = "") -> bytes:
    """The members of a valid adapter, without an end."""
    return b"".join(file(folder + name, data) for name, data in FILES.items())


def pax(records: bytes | Mapping[str, str], kind: bytes = b"x") -> bytes:
    """A pax header, of records as they are or well formed."""
    body = records if isinstance(records, bytes) else b"".join(itertools.starmap(record, records.items()))
    return file("pax", body, kind=kind)


def record(key: str, value: str) -> bytes:
    """One pax record with its length."""
    rest = f" {key}={value}\n".encode()
    length = next(n for n in range(len(rest) + 1, len(rest) + 9) if n == len(str(n)) + len(rest))
    return b"%d%b" % (length, rest)


def with_tarfile(files: Mapping[str, bytes], form: int, folder: str = "") -> bytes:
    """A tar as Python writes it, with an entry for its folder."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        if folder:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            entry.size, entry.mtime, entry.uname = len(data), 1_700_000_000.5, "somebody"
            archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


def with_zipfile(files: Mapping[str, bytes], folder: str = "", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip as Python writes it."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        if folder:
            archive.mkdir(folder)
        for name, data in files.items():
            archive.writestr(f"{folder}/{name}" if folder else name, data)
    return sink.getvalue()


class Pipe(io.RawIOBase):
    """A sink that cannot seek: zipfile then writes descriptors behind the contents."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.data += bytes(data)
        return len(data)


def zip_of_a_pipe(files: Mapping[str, bytes]) -> bytes:
    """A zip whose sizes follow the contents."""
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, data in files.items():
            archive.writestr(name, data)
    return pipe.data


@dataclass
class Zipped:
    """One zip member; fields left None are what they should be."""

    name: bytes
    data: bytes = b"x"
    method: int = 0
    flags: int = 0
    mode: int = 0o100644
    size: int | None = None
    crc: int | None = None
    at: int | None = None
    version: int = 20
    disk: int = 0
    extra: bytes = b""
    local_name: bytes | None = None
    local_flags: int | None = None
    local_crc: int | None = None
    packed: bytes | None = None
    packed_size: int | None = None
    before: bytes = b""  # hidden before the local header

    def content(self) -> bytes:
        if self.packed is not None:
            return self.packed
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        return deflate.compress(self.data) + deflate.flush() if self.method == 8 else self.data

    def facts(self) -> tuple[int, int, int]:
        """Checksum and sizes."""
        crc = zlib.crc32(self.data) if self.crc is None else self.crc
        packed = len(self.content()) if self.packed_size is None else self.packed_size
        return crc, packed, len(self.data) if self.size is None else self.size


def raw_zip(*members: Zipped, comment: bytes = b"", gap: bytes = b"", end: Mapping[int, int] | None = None) -> bytes:
    """A zip of `members`; `end` overwrites fields of the end record by their place (4 is the count)."""
    body, directory = b"", b""
    for one in members:
        body += one.before
        at = len(body) if one.at is None else one.at
        crc, packed, size = one.facts()
        name = one.name if one.local_name is None else one.local_name
        flags = one.flags if one.local_flags is None else one.local_flags
        local_crc = crc if one.local_crc is None else one.local_crc
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, one.method, 0, 33, local_crc, packed, size, len(name), 0)
        body += name + one.content()
        fields = (0x0314, one.version, one.flags, one.method, 0, 33, crc, packed, size, len(one.name), len(one.extra))
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields, 0, one.disk, 0, one.mode << 16, at)
        directory += one.name + one.extra
    body += gap
    last = [b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(body), len(comment)]
    for place, value in (end or {}).items():
        last[place] = value
    return body + directory + struct.pack("<4s4H2LH", *last) + comment


def good_zip() -> list[Zipped]:
    """The members of a valid adapter."""
    return [Zipped(name.encode(), data, method=8) for name, data in FILES.items()]


def gzip_bomb(start: bytes, repeated: bytes, times: int, end: bytes = b"") -> bytes:
    """A gzip file of `start`, `repeated` many `times` and `end`, made without doing the work (nor its checksum)."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = deflate.compress(start) + deflate.flush(zlib.Z_FULL_FLUSH)
    # After a full flush a block refers to nothing before it: copies of it are as good as the original.
    again = deflate.compress(repeated) + deflate.flush(zlib.Z_FULL_FLUSH)
    return gzip.compress(b"")[:10] + first + again * times + deflate.compress(end) + deflate.flush() + bytes(8)
