"""Bytes out of an archive, in order and counted: as they are in the file, or inflated.

A declared size never decides how much memory is taken: only bytes that are really there are kept.
"""

from __future__ import annotations

import io
import os
import zlib
from abc import ABC, abstractmethod

from ..errors import FormatError

CHUNK = 1 << 16
# Trained weights hardly compress; what unpacks to so much more than it is was made to exhaust a machine.
MAX_RATIO = 100
FREE = 8 << 20  # bytes from which on the ratio counts
GZIP, RAW = 31, -15  # zlib's names for the two wrappings of deflate; for gzip it also checks length and checksum


class Stream(ABC):
    """A source of bytes that is read once."""

    def __init__(self, what: str) -> None:
        self.what = what

    @abstractmethod
    def some(self, size: int) -> bytes:
        """From 1 to `size` bytes (`size` > 0); none at the end."""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises FormatError when the archive ends earlier."""
        sink = io.BytesIO()
        while left := size - sink.tell():
            sink.write(self._next(left))
        return sink.getvalue()

    def skip(self, size: int) -> None:
        """Pass over `size` bytes. Raises as `read`."""
        while size:
            size -= len(self._next(size))

    def _next(self, size: int) -> bytes:
        return self.some(min(size, CHUNK)) or self._early()

    def _early(self) -> bytes:
        raise FormatError(f"{self.what} ends too early.", "It may be cut off or still being written; copy it again.")


class Plain(Stream):
    """A file from where it stands to its end."""

    def __init__(self, file: io.BufferedIOBase, what: str) -> None:
        super().__init__(what)
        self._file = file
        self._left = os.fstat(file.fileno()).st_size - file.tell()

    def some(self, size: int) -> bytes:
        """The next bytes of the file."""
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data

    def read(self, size: int) -> bytes:
        """As `Stream.read`, refused at once where the file is too short."""
        return super().read(size) if size <= self._left else self._early()

    def skip(self, size: int) -> None:
        """Seek over what is ignored."""
        if size > self._left:
            self._early()
        self._file.seek(size, os.SEEK_CUR)
        self._left -= size


class Inflated(Stream):
    """What a deflate stream of exactly `size` compressed bytes unpacks to; `wrapping` is GZIP or RAW."""

    def __init__(self, file: io.BufferedIOBase, size: int, wrapping: int, what: str) -> None:
        super().__init__(what)
        self._file = file
        self._left = size
        self._inflater = zlib.decompressobj(wrapping)
        self._eaten = self._made = 0

    def some(self, size: int) -> bytes:
        """The next unpacked bytes; the end is one only when stream and compressed bytes end together."""
        while not self._inflater.eof:
            data = self._inflater.unconsumed_tail or self._compressed()
            out = self._inflate(data, size)
            if out:
                return out
            if not data and not self._inflater.eof:
                self._early()
        if self._inflater.unused_data or self._left:
            raise FormatError(f"{self.what} goes on after the end of its compressed data.", "Pack it again.")
        return b""

    def finish(self) -> None:
        """Check that everything was read. Raises FormatError when more comes, or the end is damaged."""
        if self.some(1):
            raise FormatError(f"{self.what} unpacks to more bytes than it declares.")

    def _compressed(self) -> bytes:
        data = self._file.read(min(CHUNK, self._left))
        self._left -= len(data)
        return data

    def _inflate(self, data: bytes, size: int) -> bytes:
        try:
            out = self._inflater.decompress(data, size)
        except zlib.error as error:
            raise FormatError(f"{self.what} has damaged compressed data: {error}.", "Copy or pack it again.") from None
        self._eaten += len(data) - len(self._inflater.unconsumed_tail) - len(self._inflater.unused_data)
        self._made += len(out)
        if self._made > FREE and self._made > MAX_RATIO * self._eaten:
            message = f"{self.what} unpacks to more than {MAX_RATIO} times its size, the limit for compression."
            raise FormatError(message, "Where that is meant, pack it as a plain .tar.")
        # Deflate adds at most a few bytes to a block; streams of empty blocks would keep us busy for nothing.
        if self._eaten > 2 * self._made + 2 * CHUNK:
            raise FormatError(f"{self.what} has compressed data that unpacks to next to nothing.")
        return out
