"""The folders of runs in a store, as they are on disk: which there are, who holds one, how far each came."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import AdapterHubError
from ...formats.files import read_regular
from ...formats.strict_json import parse_object
from ...store.fs import FileSystem, discard

IDENTITY, LOCK, PLAIN, DIVERGED = "identity.json", "lock", "state.json", "diverged.json"
LIMIT = 1 << 28
_NAME = re.compile(r"checkpoint-([1-9][0-9]{0,8})", re.ASCII)


@dataclass(frozen=True)
class BrokenOff:
    """A run with a checkpoint that nobody goes on with now: the names it trains, steps done, bytes on disk, and who
    of them diverged.
    """

    folder: Path
    names: tuple[str, ...]
    step: int
    bytes: int
    diverged: tuple[str, ...] = ()


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Number and folder of each checkpoint of a run, the latest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def run_folders(top: Path) -> list[Path]:
    """The runs with a checkpoint in the store at `top`, the latest first."""
    folder = top / "runs"
    found = [path for path in folder.iterdir() if checkpoints(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: checkpoints(path)[0][1].stat().st_mtime, reverse=True)


def read_identity(folder: Path) -> dict[str, Any]:
    """What a run was begun with."""
    return parse_object(read_regular(folder / IDENTITY, LIMIT), IDENTITY, limit=LIMIT, depth=32)


def steps_done(folder: Path) -> int:
    """How far a run came, by its latest checkpoint; 0 where it does not say."""
    with suppress(AdapterHubError, OSError, LookupError, TypeError, ValueError):
        data = read_regular(checkpoints(folder)[0][1] / PLAIN, LIMIT)
        return max(int(one["step"]) for one in parse_object(data, PLAIN, limit=LIMIT, values=1 << 24)["learners"])
    return 0


def diverged(folder: Path) -> dict[str, str]:
    """Who of a run's learners diverged, each with what was said of it."""
    with suppress(AdapterHubError, OSError):
        told = parse_object(read_regular(folder / DIVERGED, LIMIT), DIVERGED, limit=LIMIT)
        return {name: str(text) for name, text in told.items()}
    return {}


def broken_off(top: Path) -> list[BrokenOff]:
    """All runs in the store at `top` that no process holds."""
    found = []
    for folder in run_folders(top):
        with suppress(OSError):  # a store that can only be read: nobody trains there
            number = held(folder / LOCK)
            if number is None:
                continue
            os.close(number)
        names: tuple[str, ...] = ()
        with suppress(AdapterHubError, LookupError, TypeError):
            names = tuple(str(one["name"]) for one in read_identity(folder)["learners"])
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        found.append(BrokenOff(folder, names or (folder.name,), steps_done(folder), size, tuple(diverged(folder))))
    return found


def remove_run(folder: Path, fs: FileSystem | None = None) -> bool:
    """Remove a run that no process holds; whether it is gone."""
    number = held(folder / LOCK)
    if number is None:
        return False
    try:
        return discard(fs or FileSystem(), folder) and not folder.exists()
    finally:
        os.close(number)


def held(path: Path) -> int | None:
    """An open file that this process alone holds until it closes it, or None where another one does.

    The system lets go of it when a process dies, however it does.
    """
    try:
        import fcntl
    except ImportError:  # Windows: a file that is open cannot be removed, and that is all the protection there is
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
            return None
        except OSError:  # a file system without locks
            return number
        with suppress(OSError):
            if os.fstat(number).st_ino == os.stat(path).st_ino:
                return number
        os.close(number)  # the run that held it has ended meanwhile and its folder is gone
        path.parent.mkdir(parents=True, exist_ok=True)
