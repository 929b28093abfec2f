"""Deliberate mistakes: what a harness must notice."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from adapterhub_lite.store import aliases, fs, migrate, publish
from adapterhub_lite.store.layout import MOVE, Layout


def _in_place(files: fs.FileSystem, tmp: Path, path: Path, data: bytes, mode: int = fs.IMMUTABLE) -> None:
    """`replace_file` that writes over the old bytes."""
    if path.exists():
        path.chmod(0o644)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for byte in range(0, len(data), 4):
        os.write(fd, data[byte : byte + 4])
    os.fsync(fd)
    os.close(fd)


def _unlink_first(self: fs.FileSystem, source: Path, target: Path) -> None:
    """`replace` that makes room before it renames."""
    if os.path.lexists(target):
        os.unlink(target)
    os.rename(source, target)


def _published_early(files: fs.FileSystem, layout: Layout, name: str, alias: str, move: aliases.Move) -> bool:
    """`write_move` that makes the folder in its place and fills it there."""
    target = layout.move(name, alias, move.number)
    files.mkdir(target)
    fs.write_file(files, target / MOVE, aliases._dump(name, alias, move))
    files.fsync_dir(target)
    files.fsync_dir(target.parent)
    return True


def _unsealed(name: str, alias: str, data: bytes) -> aliases.Move:
    """A move read without its seal."""
    raw = aliases.parse_object(data, "the move", limit=1 << 20)
    first = aliases._first_move(raw)
    return aliases.replace(first, event=raw["event"], reason=raw["reason"], number=raw["number"])


def _written_once(files: fs.FileSystem, path: Path, chunks: Iterable[bytes], mode: int = fs.IMMUTABLE) -> None:
    """`write_chunks` that does not look how much was written."""
    fd = files.create(path, mode)
    for chunk in chunks:
        files.write(fd, memoryview(chunk))
    files.fsync(fd)
    files.close(fd)


def _locked(files: fs.FileSystem, layout: Layout) -> None:
    """`ensure_store` that makes everybody wait."""
    with (layout.root.parent / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        migrate.ensure_store(files, layout)


def _nothing(*_: Any) -> None: ...


MISTAKES: Mapping[str, Callable[[], list[Any]]] = {
    "": list,
    "written in place": lambda: [patch.object(module, "replace_file", _in_place) for module in (migrate, publish)],
    "unlinked before it is replaced": lambda: [patch.object(fs.FileSystem, "replace", _unlink_first)],
    "a move is published early": lambda: [patch.object(aliases, "write_move", _published_early)],
    "a move is read without its seal": lambda: [patch.object(aliases, "_parse", _unsealed)],
    "nothing is cleaned up": lambda: [patch.object(module, "discard", _nothing) for module in (publish, aliases)],
    "a short write is taken for a whole one": lambda: [patch.object(fs, "write_chunks", _written_once)],
    "a lock is taken": lambda: [patch.object(publish, "ensure_store", _locked)],
}


@contextmanager
def mistake(name: str) -> Iterator[None]:
    """The package with one of MISTAKES in it."""
    with ExitStack() as stack:
        for one in MISTAKES[name]():
            stack.enter_context(one)
        yield
