"""What this process opened, changed and reached while something ran, told by Python's audit events; and trees of files.

A hook cannot be taken away again, so it is added with the first watch and does nothing outside of one.
https://docs.python.org/3/library/audit_events.html
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 2,
    "sqlite3.connect": 1, "os.setxattr": 1, "os.removexattr": 1,
}  # fmt: skip
_REACHING = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
_RUNNING = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class",
    "ctypes.dlopen", "webbrowser.open", "pty.spawn",
)  # fmt: skip
_HASHED = 1 << 20


@dataclass
class Watch:
    """What happened. Paths are absolute and not resolved: as they were named."""

    opened: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def strays(self, writable: Iterable[Path], readable: Iterable[Path]) -> list[str]:
        """Everything that happened elsewhere than where it may."""
        writing, reading = _inside(writable), _inside([*writable, *readable, *_libraries()])
        return [
            *(f"changed {path}" for path in self.changed if not (writing(path) or "/__pycache__/" in path)),
            *(f"opened {path}" for path in self.opened if not reading(path)),
            *(f"reached {what}" for what in self.reached),
            *(f"ran {what}" for what in self.ran),
        ]


_watches: list[Watch] = []
_hooked: list[bool] = []


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch this process."""
    if not _hooked:
        sys.addaudithook(_heard)
        _hooked.append(True)
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watches:
        if event == "open":
            _note_open(watch, *arguments)
        elif event in _CHANGING:
            watch.changed += [path for value in arguments[: _CHANGING[event]] if (path := _path(value))]
        elif event in _REACHING:
            watch.reached.append(f"{event} {arguments[-1]!r}"[:200])
        elif event in _RUNNING:
            watch.ran.append(f"{event} {arguments[:2]!r}"[:200])


def _note_open(watch: Watch, name: Any, mode: str | None, flags: int) -> None:
    path = _path(name)
    if path:
        writes = bool(flags & _WRITING) or bool(mode and set(mode) & set("wax+"))
        (watch.changed if writes else watch.opened).append(path)


def _path(value: Any) -> str:
    if isinstance(value, int) or value is None:
        return ""
    return os.path.abspath(os.fsdecode(value))


def _inside(folders: Iterable[Path]) -> Any:
    roots = [os.path.abspath(folder) for folder in folders]
    return lambda path: any(path == root or path.startswith(root + os.sep) for root in roots)


def _libraries() -> list[Path]:
    return [ROOT, *(Path(folder) for folder in {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)})]


# --- trees -------------------------------------------------------------------------------------------------------

Tree = dict[str, tuple[Any, ...]]


def tree(folder: Path, besides: Iterable[Path] = ()) -> Tree:
    """Everything below a folder: mode, size, time of change and content. Nothing is followed or waited for."""
    skipped = {os.fspath(path) for path in besides}
    found: Tree = {}
    waiting = [os.fspath(folder)]
    cut = len(waiting[0]) + 1
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.path not in skipped:
                    found[entry.path[cut:]] = _facts(entry)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    return found


def changes(before: Tree, after: Tree) -> list[str]:
    """Paths that differ between two trees."""
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


def _facts(entry: os.DirEntry[str]) -> tuple[Any, ...]:
    told = entry.stat(follow_symlinks=False)
    what: Any = None
    if entry.is_symlink():
        what = os.readlink(entry.path)
    elif entry.is_file(follow_symlinks=False):
        with open(entry.path, "rb", buffering=0) as file:
            what = hashlib.sha256(file.read(_HASHED)).hexdigest()
    return (told.st_mode, told.st_size if not entry.is_dir(follow_symlinks=False) else 0, told.st_mtime_ns, what)
