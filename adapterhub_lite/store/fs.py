"""Every change that the package makes to a store, as single system calls that tests record and fail.

Order is what makes a store sound: the bytes of a file are durable (fsync) before it gets its name, its name (fsync of
the folder) before anything refers to it. A failed fsync fails the operation: after it the kernel may call lost pages
clean.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import AdapterHubError, StoreError, StoreFull

IMMUTABLE = 0o444
MUTABLE = 0o644
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
NO_LINKS = frozenset(
    getattr(errno, name)
    for name in ("EPERM", "EXDEV", "EMLINK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP")
    if hasattr(errno, name)
)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | sum(getattr(os, f, 0) for f in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))


class FileSystem:
    """One system call a method. Nothing else in the store changes the disk."""

    def create(self, path: Path, mode: int) -> int:
        """Open a new file for writing; it must not exist. The umask applies to `mode`."""
        return os.open(path, _CREATE, mode)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of `data` and return how many bytes."""
        return os.write(fd, data)

    def copy_range(self, source: int, target: int, offset: int, count: int) -> int:
        """Append at most `count` bytes of the open file `source`, from `offset` on, to `target`; how many it were.

        The system copies them, without copying where the file system can share them. OSError where it cannot do so.
        """
        if not hasattr(os, "copy_file_range"):
            raise OSError(errno.ENOSYS, "no copy_file_range here")
        return os.copy_file_range(source, target, count, offset)

    def begin_sync(self, fd: int, offset: int, count: int) -> None:
        """Let the disk begin with some bytes of an open file; a hint, after which nothing is durable yet."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)

    def fsync(self, fd: int) -> None:
        """Make the bytes of an open file durable."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close an open file."""
        os.close(fd)

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a folder durable."""
        if os.name == "nt":
            return  # Windows cannot open folders; NTFS journals names itself
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: Path) -> None:
        """Make a folder; it must not exist."""
        os.mkdir(path)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; the target must not exist."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: Path, target: Path) -> None:
        """Move a folder; the target must be absent or an empty folder."""
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Move a file over another one, at once."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Take a name from a file."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


@contextmanager
def storing(what: str, where: Path, needed: int = 0, hint: str = "Nothing was published.") -> Iterator[None]:
    """Turn an OSError inside into StoreFull (with `needed` bytes) or StoreError; `what` completes "could not ..."."""
    try:
        yield
    except AdapterHubError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            free = _free(where)
            message = f"Could not {what}: no space left; about {needed} bytes are needed, {free} are free at {where}."
            raise StoreFull(message, "Free some space and try again; nothing was published.") from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"Could not {what}: {reason} ({error.filename or where}).", hint) from error


def write_file(fs: FileSystem, path: Path, data: bytes, mode: int = IMMUTABLE) -> None:
    """Write a new file and make its bytes durable; its name is durable after `fsync_dir` of its folder."""
    write_chunks(fs, path, (data,), mode)


def write_chunks(fs: FileSystem, path: Path, chunks: Iterable[bytes | memoryview], mode: int = IMMUTABLE) -> None:
    """`write_file` for bytes that come in parts."""
    fd = fs.create(path, mode)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[fs.write(fd, view) :]
        fs.fsync(fd)
    finally:
        fs.close(fd)


def replace_file(fs: FileSystem, tmp: Path, path: Path, data: bytes, mode: int = IMMUTABLE) -> None:
    """Put `data` at `path`, durably and at once, by way of the folder `tmp` on the same file system."""
    staged = new_tmp(tmp)
    try:
        write_file(fs, staged, data, mode)
        fs.replace(staged, path)
    except BaseException:
        discard(fs, staged)
        raise
    fs.fsync_dir(path.parent)


def ensure_folder(fs: FileSystem, path: Path, top: Path) -> None:
    """Make `path` and its parents below the existing folder `top`, durably.

    Folders that exist are synced too: whoever made them may have died before doing so.

    Raises:
        StoreError: there is something else; nothing is written through a link.
    """
    if path == top:
        return
    ensure_folder(fs, path.parent, top)
    try:
        fs.mkdir(path)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            message = f"{path} is a symbolic link or a file, where a folder should be."
            raise StoreError(message, "Look at it, and move it away.") from None
    fs.fsync_dir(path.parent)


def new_tmp(tmp: Path) -> Path:
    """A name in `tmp` that nobody else has."""
    return tmp / f".{os.urandom(16).hex()}"


def discard(fs: FileSystem, path: Path) -> bool:
    """Remove a file or folder nobody refers to; whether this call did. What cannot be removed stays, as garbage."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                discard(fs, child)
            fs.rmdir(path)
        else:
            fs.unlink(path)
        return True
    return False


def _free(where: Path) -> str:
    import shutil

    with suppress(OSError):
        return str(shutil.disk_usage(where).free)
    return "an unknown number"
