"""Opening files of unknown origin: regular files only, links never followed, sizes limited before reading."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from ..errors import FormatError, NotFound, UnsafeFile

# O_NONBLOCK: opening a fifo must not hang; it is then refused by its type.
_FLAGS = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def open_regular(path: str | Path) -> io.FileIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        NotFound: nothing is there.
        UnsafeFile: a link, folder, fifo or device.
    """
    path = Path(path)
    _refuse_link(path)
    try:
        fd = os.open(path, _FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{path} does not exist.", "Check the path.") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _link(path) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnsafeFile(f"{path} is not a regular file.", "Only regular files are read.")
    return os.fdopen(fd, "rb", buffering=0)


def read_regular(path: str | Path, limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        NotFound, UnsafeFile: as `open_regular`.
        FormatError: the file is larger than `limit`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FormatError(f"{path} is {size} bytes; the limit is {limit}.")
        return read_exactly(file, size, path)


def read_exactly(file: io.FileIO, size: int, path: str | Path) -> bytes:
    """Read `size` bytes from here on; a file that ends earlier is a FormatError."""
    parts, left = [], size
    while left:
        part = file.read(left)
        if not part:
            raise FormatError(f"{path} ended {left} bytes early; it may be still being written.", "Try again.")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _refuse_link(path: Path) -> None:
    # Only for systems without O_NOFOLLOW; elsewhere the open itself refuses, without a race.
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise _link(path)


def _link(path: Path) -> UnsafeFile:
    return UnsafeFile(f"{path} is a symbolic link.", "Copy the real files into a folder (cp -L) and use that.")
