"""One operation on disks that are too small for it; a program, so that a library can be preloaded or a disk mounted.

    python -m tests.stress.small_disk short PLACE ACT EVERY     writes take 1, 7, ... bytes at once (small_disk.c)
    python -m tests.stress.small_disk room PLACE ACT EVERY      the disk has room for 0, EVERY, 2 * EVERY, ... bytes
    python -m tests.stress.small_disk pages PLACE ACT 1         PLACE is a small file system, left with 0, 1, ... pages
    python -m tests.stress.small_disk files PLACE ACT 1         and with room for 0, 1, ... more files

A fifth argument names a deliberate mistake of `careless.py`, which must be noticed. Prints one JSON row.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from adapterhub_lite.errors import StoreFull
from adapterhub_lite.store import Store
from tests.stress import careless
from tests.stress.scene import Scene, failed
from tests.stress.strace import alone
from tests.stress.tally import Row

PAGE = 4096
_PLENTY = 1 << 40
_mistake = [""]


def _short(scene: Scene, row: Row, every: int) -> None:
    """Writes that take less than they are given are gone on with: everything is as ever."""
    for most in (1, 7, 100, 511):
        world = scene.world()
        note = alone(lambda most=most, world=world: _limited(scene, world, most, -1))
        found = [note] if note else scene.problems(world, [scene.last])
        row.violations += [f"{scene.name}, {most} bytes at once: {one}" for one in found]
        row.faults += 1


def _room(scene: Scene, row: Row, every: int) -> None:
    """With too little room it says so, and with enough it does not."""
    world = scene.world()
    note = alone(lambda: _limited(scene, world, -1, _PLENTY) or f"used {_PLENTY - _library().ahl_room()}")
    used = int(note.removeprefix("used "))
    for room in [*range(0, used, every), used]:
        world = scene.world()
        note = alone(lambda room=room, world=world: _limited(scene, world, -1, room))
        _judge(scene, row, world, note, f"room for {room} of {used} bytes", enough=room == used)


def _limited(scene: Scene, world: Path, most: int, room: int) -> str:
    _library().ahl_disk(ctypes.c_long(most), ctypes.c_long(room))
    return _run(scene, world)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.ahl_room.restype = ctypes.c_long
    return library


def _run(scene: Scene, world: Path) -> str:
    try:
        with careless.mistake(_mistake[0]):
            scene.act.run(Store(world / "store"))
    except StoreFull as error:
        return f"full: {failed(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _judge(scene: Scene, row: Row, world: Path, note: str, how: str, enough: bool) -> None:
    row.faults += 1
    kind, _, wrong = note.partition(": ")
    found = [wrong] if wrong else []
    if kind not in ("", "full") or (enough and kind):
        found.append(f"ends with {note}")
    found += scene.done(world) if not kind else scene.left(world)
    if kind:
        found += scene.problems(world, [0] if scene.act.takes_back else None)
    row.violations += [f"{scene.name}, {how}: {one}" for one in found]


def _pages(scene: Scene, row: Row, every: int) -> None:
    _really(scene, row, _pages_left)


def _files(scene: Scene, row: Row, every: int) -> None:
    _really(scene, row, _files_left)


def _really(scene: Scene, row: Row, left: object) -> None:
    """On a file system of its own, with a little more space each time until the operation is done."""
    for space in itertools.count():
        world = scene.world()
        with left(world.parents[1] / "ballast", space):  # type: ignore[operator]
            note = _run(scene, world)
        _judge(scene, row, world, note, f"{space} left", enough=space > 40)
        if not note:
            return


@contextmanager
def _pages_left(ballast: Path, space: int) -> Iterator[None]:
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            file.truncate(max(0, file.tell() - space * PAGE))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def _files_left(ballast: Path, space: int) -> Iterator[None]:
    ballast.mkdir()
    made = 0
    try:
        for made in itertools.count():
            (ballast / str(made)).touch()
    except OSError:
        for number in range(max(0, made - space), made):
            (ballast / str(number)).unlink()
    try:
        yield
    finally:
        shutil.rmtree(ballast)


HOW = {"short": _short, "room": _room, "pages": _pages, "files": _files}


def main(how: str, place: str, name: str, every: str, mistake: str = "") -> None:
    _mistake[0] = mistake
    start, scene = time.monotonic(), Scene(Path(place) / "scene", name)
    row = Row("disk full" if how != "short" else "short writes", name)
    HOW[how](scene, row, int(every))
    row.states, row.seconds = scene.states, time.monotonic() - start
    print(json.dumps(asdict(row)))


if __name__ == "__main__":
    os.umask(0o022)
    main(*sys.argv[1:])
