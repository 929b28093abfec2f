"""The folder in which a merge is made: claimed by one process, gone on with by the next, removed when it is done.

Beside `out` lies `.<out>.merging-<digest>`, whose digest is that of everything that decides the result. In it is the
checkpoint in the making and a journal of the shards that are durable. Whoever works in it holds a lock on the folder
(flock), which ends with the process. A merge that died is gone on with by the same merge; another one leaves it alone
until it has put its own result in `out`, and then removes it: what it would become has lost its place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import FormatError, NotFound, StoreError, UnsafeFile
from ..events import Listener, Note, ignore
from ..formats.files import read_regular
from ..formats.strict_json import dump, parse_object
from ..store.fs import MUTABLE, FileSystem, discard, replace_file

try:
    import fcntl
except ImportError:  # Windows: nothing tells two merges into one folder apart before the last of them fails
    fcntl = None  # type: ignore[assignment]

_WHAT = "a merge of adapterhub-lite"
_JOURNAL, _CHECKPOINT = "journal", "checkpoint"
_LIMIT = 16 << 20
_SCRATCH = re.compile(r"\.[0-9a-f]{32}", re.ASCII)  # a journal that was being written
_NAME = 96  # bytes of `out`'s name that the folder's has
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF})
_HELD = "Another process is merging into {}."


class Work:
    """The folder of one merge, while its lock is held.

    Attributes:
        checkpoint: what becomes `out`.
        shards: file name -> mark of a shard that is durable.
    """

    def __init__(self, fs: FileSystem, folder: Path, out: Path, identity: str) -> None:
        self._fs, self.folder, self._out, self._identity = fs, folder, out, identity
        self.checkpoint = folder / _CHECKPOINT
        self.shards: dict[str, list[int]] = {}

    def begin(self) -> None:
        """Read the journal, and clear away what it does not vouch for.

        Raises:
            StoreError: the folder is not of this merge.
        """
        found = _journal(self.folder)
        if found is None:
            known = (_CHECKPOINT, _JOURNAL)  # a journal may not have become durable; the name alone is ours
            if any(p.name not in known and not _SCRATCH.fullmatch(p.name) for p in self.folder.iterdir()):
                raise StoreError(f"{self.folder} is no folder of a merge.", "Look at it, and move it away.")
        elif (found["identity"], found["out"]) != (self._identity, self._out.name):
            raise StoreError(f"{self.folder} is of another merge.", "Look at it, and move it away.")
        else:
            self.shards = {
                file: mark for file, mark in found["shards"].items() if mark == _mark(self.checkpoint / file)
            }
        for path in self.folder.iterdir():
            if _SCRATCH.fullmatch(path.name):
                discard(self._fs, path)
        self._write()
        if not _is_folder(self.checkpoint):
            self._fs.mkdir(self.checkpoint)
        for path in self.checkpoint.iterdir():
            if path.name not in self.shards and not discard(self._fs, path):
                raise StoreError(f"{path} is in the way of a merge.", "Look at it, and move it away.")

    def drop(self, file: str) -> None:
        """Forget and remove a shard that is not what it should be."""
        del self.shards[file]
        self._write()
        self._fs.unlink(self.checkpoint / file)

    def note(self, file: str) -> None:
        """Write down that a shard is durable, name and all."""
        self._fs.fsync_dir(self.checkpoint)
        mark = _mark(self.checkpoint / file)
        assert mark is not None
        self.shards[file] = mark
        self._write()

    def publish(self) -> None:
        """Move the checkpoint to `out`, which is absent or an empty folder."""
        self._fs.fsync_dir(self.checkpoint)
        self._fs.rename(self.checkpoint, self._out)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        _remove(self._fs, self.folder)

    def _write(self) -> None:
        told = {"format": 1, "identity": self._identity, "out": self._out.name, "shards": self.shards, "what": _WHAT}
        replace_file(self._fs, self.folder, self.folder / _JOURNAL, dump(told), MUTABLE)


@contextmanager
def claimed(fs: FileSystem, out: Path, identity: str) -> Iterator[Work]:
    """The folder of a merge into `out`, made or found, and held until the block is left.

    Raises:
        StoreError: another process has it, or something else is in its place.
    """
    folder = out.parent / f"{_stem(out)}{hashlib.sha256(f'{identity} {out.name}'.encode()).hexdigest()[:16]}"
    lock = _made_and_locked(fs, folder, out)
    try:
        work = Work(fs, folder, out, identity)
        empty = not any(folder.iterdir())
        try:
            work.begin()
        except OSError:
            if empty:  # nobody has worked in it, and nothing would tell later whose it is
                work.remove()
            raise
        yield work
    finally:
        if lock is not None:
            os.close(lock)


def others(out: Path, own: Path) -> list[Path]:
    """Folders of merges into `out` that died.

    Raises:
        StoreError: one of them is at work.
    """
    found = []
    for folder in _others(out, own):
        lock = _locked(folder)
        if lock is not None:
            os.close(lock)
        elif fcntl is not None and _is_folder(folder):
            raise StoreError(_HELD.format(out), "Wait until it is done, or merge into another folder.")
        found.append(folder)
    return found


def tell_others(out: Path, own: Path, on_event: Listener = ignore) -> None:
    """Say what merges that died have left."""
    for folder in others(out, own):
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        on_event(Note(f"{folder} is of another merge into {out.name} that did not end ({size / 1e6:,.0f} MB)."))


def remove_others(fs: FileSystem, out: Path, own: Path, on_event: Listener = ignore) -> None:
    """Remove what merges that died have left, now that the place of their result is taken."""
    for folder in _others(out, own):
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            _remove(fs, folder)
            on_event(Note(f"{folder} is removed: {out.name} is there now."))
        finally:
            os.close(lock)


def _others(out: Path, own: Path) -> list[Path]:
    stem = _stem(out)
    near = [p for p in out.parent.iterdir() if p.name.startswith(stem) and p != own and _is_folder(p)]
    return sorted(p for p in near if (found := _journal(p)) is not None and found["out"] == out.name)


def _stem(out: Path) -> str:
    return f".{out.name.encode()[:_NAME].decode(errors='ignore')}.merging-"


def _remove(fs: FileSystem, folder: Path) -> None:
    """The journal goes last: without it the folder would be nobody's."""
    discard(fs, folder / _CHECKPOINT)
    for path in [*(p for p in folder.iterdir() if _SCRATCH.fullmatch(p.name)), folder / _JOURNAL]:
        discard(fs, path)
    with suppress(OSError):  # something that is not ours is in it
        fs.rmdir(folder)


def _made_and_locked(fs: FileSystem, folder: Path, out: Path) -> int | None:
    for _ in range(3):
        with suppress(FileExistsError):
            fs.mkdir(folder)
            fs.fsync_dir(folder.parent)
        if not _is_folder(folder) and os.path.lexists(folder):
            raise StoreError(f"{folder} is a symbolic link or a file.", "Look at it, and move it away.")
        if fcntl is None:
            return None
        lock = _locked(folder)
        if lock is not None:
            return lock
        if _is_folder(folder):
            break
    raise StoreError(_HELD.format(out), "Wait until it is done, or merge into another folder.")


def _locked(folder: Path) -> int | None:
    """An open, locked folder; None where another process has it, or it is gone."""
    if fcntl is None:
        return None
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        with _where_there_are_locks():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.lstat(folder)):  # else whoever had it has removed it meanwhile
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


@contextmanager
def _where_there_are_locks() -> Iterator[None]:
    """Some network file systems have no locks, or none on folders: the last rename decides there."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _journal(folder: Path) -> dict[str, Any] | None:
    """What a folder's journal says; None where there is none, or it is not ours."""
    try:
        found = parse_object(read_regular(folder / _JOURNAL, _LIMIT), _JOURNAL, limit=_LIMIT)
    except (NotFound, FormatError, UnsafeFile):
        return None
    texts = all(isinstance(found.get(key), str) for key in ("identity", "out"))
    shards = found.get("shards")
    plain = isinstance(shards, dict) and all(Path(file).name == file for file in shards)
    return found if (found.get("what"), found.get("format")) == (_WHAT, 1) and texts and plain else None


def _mark(path: Path) -> list[int] | None:
    """What changes when a file is written to or replaced; None where no regular file is."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
