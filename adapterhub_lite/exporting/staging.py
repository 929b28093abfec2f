"""The hidden folder in which an export is made: held by a lock that ends with the process, so that a dead one is known.

It is called `.<target>.exporting-<random>`. The next export into the same place removes those whose process has died;
where a file system has no locks they are only told of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import StoreError
from ..events import Listener, Note, ignore
from ..merging.merge import check_out
from ..store.fs import FileSystem, discard, storing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = 96  # bytes of the target's name that the folder's has


@contextmanager
def staged_folder(target: Path, nbytes: int, fs: FileSystem, on_event: Listener = ignore) -> Iterator[Path]:
    """A hidden folder beside `target`, which becomes it when the block is left well.

    Raises:
        StoreError: `target` is a link, or exists and is not an empty folder; StoreFull: no space left.
    """
    check_out(target)
    _clear(fs, target, on_event)
    staged = target.parent / f"{_stem(target)}{os.urandom(8).hex()}"
    lock: int | None = None
    try:
        with storing(f"write {target}", target.parent, nbytes, "Nothing was written."):
            fs.mkdir(staged)
            lock = _held(staged)
            yield staged
            fs.fsync_dir(staged)
            fs.rename(staged, target)
    except BaseException:
        discard(fs, staged)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    with storing(f"write {target}", target.parent, nbytes, "It is there, but may not outlive a loss of power."):
        fs.fsync_dir(target.parent)


def _stem(target: Path) -> str:
    return f".{os.fsencode(target.name)[:_NAME].decode(errors='ignore')}.exporting-"


def _clear(fs: FileSystem, target: Path, on_event: Listener) -> None:
    """Remove what exports into this place have left that died, and name what cannot be told from one at work."""
    ours = re.compile(re.escape(_stem(target)) + "[0-9a-f]{16}", re.ASCII)
    with suppress(OSError):
        for folder in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
            if folder.is_symlink() or not folder.is_dir():
                continue
            lock = _opened(folder)
            if lock is None:
                continue
            try:
                state = _lock(lock)
                if state == "free":
                    discard(fs, folder)
                    on_event(Note(f"{folder} is removed: the export that made it did not end."))
                elif state == "unknown":
                    on_event(Note(f"{folder} is of an export that did not end, or is at work."))
            finally:
                os.close(lock)


def _held(folder: Path) -> int | None:
    """The new folder, locked.

    Raises:
        StoreError: another export took it for a dead one's, in the moment before it was locked.
    """
    lock = _opened(folder)
    if lock is None and not folder.is_dir():
        raise StoreError(f"{folder} is gone: another export into this place began.", "Try again.")
    if lock is not None and _lock(lock) == "held":
        os.close(lock)
        raise StoreError(f"Another export into the place of {folder} began.", "Try again.")
    return lock


def _opened(folder: Path) -> int | None:
    if fcntl is None:
        return None
    with suppress(OSError):
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return None


def _lock(fd: int) -> str:
    """free: we have it now; held: another process has it; unknown: there are no locks here."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError:
        return "unknown"
    return "free"
