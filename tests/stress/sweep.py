"""One operation under strace, stopped or failed at each of its system calls; a program, so that forks stay small.

    python -m tests.stress.sweep PLACE ACT FAULTS EVERY [CARELESS]    prints one JSON list

FAULTS are KILL, ENOSPC, EIO, EINTR and FULL (from then on every such call says ENOSPC), with commas; LOCKS only looks
whether any lock is taken. EVERY takes each n-th point only; CARELESS names a deliberate mistake of `careless.py`, which
must be noticed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from adapterhub_lite.errors import StoreFull
from adapterhub_lite.places import cache_root
from adapterhub_lite.store import Store
from tests.stress import careless
from tests.stress.acts import ACTS, Act
from tests.stress.scene import Scene, failed
from tests.stress.strace import Call, End, Hangs, calls, disturb, watch
from tests.stress.tally import Row

FAULTS = ("KILL", "ENOSPC", "EIO", "EINTR", "FULL")
_CLEANING = frozenset({"unlink", "unlinkat", "rmdir"})
_FILLING = frozenset({"write", "mkdir", "mkdirat", "link", "linkat"})


def points(found: Sequence[Call], fault: str) -> list[Call]:
    """The calls at which a fault is tried: a full disk refuses changes, the rest may happen anywhere."""
    if fault == "FULL":
        return [call for call in found if call.name in _FILLING]
    return [call for call in found if call.changes or fault != "ENOSPC"]


def run(scene: Scene, world: Path, mistake: str) -> str:
    """How an operation ends, in a word and what is wrong with it; "" for well."""
    with careless.mistake(mistake):
        try:
            scene.act.run(Store(world / "store"))
        except StoreFull as error:
            return f"full: {failed(error)}"
        except Exception as error:
            return f"refused: {failed(error)}"
    return ""


def sweep(scene: Scene, found: Sequence[Call], fault: str, every: int, mistake: str = "") -> Row:
    """Try a fault at each `every`-th of its points, beginning with another one for each operation."""
    start, before, row = time.monotonic(), scene.states, Row("system calls", scene.name)
    chosen = points(found, fault)
    how = "signal=KILL" if fault == "KILL" else f"error={'ENOSPC' if fault == 'FULL' else fault}"
    for call in chosen[len(chosen) % every :: every]:
        world = scene.world()
        try:
            end = disturb(lambda world=world: run(scene, world, mistake), call, how, lasting=fault == "FULL")
            wrong = judged(scene, world, call, end)
        except Hangs as error:
            wrong = [f"it hangs: {error}"]
        row.violations += [f"{scene.name}, {fault} at {call.line}: {one}" for one in wrong]
        row.kills, row.faults = row.kills + (fault == "KILL"), row.faults + (fault != "KILL")
    row.states, row.seconds = scene.states - before, time.monotonic() - start
    return row


def judged(scene: Scene, world: Path, call: Call, end: End) -> list[str]:
    """What is wrong with how it ended and with what it left."""
    kind, _, wrong = end.note.partition(": ")
    if not end.disturbed:
        return ["the fault did not happen"]
    if end.killed:
        return scene.problems(world)
    if not kind:
        return scene.done(world)
    found = [wrong] if wrong or kind not in ("full", "refused") else []
    if kind == "full" and "ENOSPC" not in end.trace:
        found.append("it says that the disk is full")
    if call.changes and call.name not in _CLEANING:
        found += scene.left(world)
    return found + scene.problems(world, [0] if scene.act.takes_back else None)


def locks(scene: Scene, cache: Path, mistake: str) -> Row:
    """Nobody waits for a lock, and only the index in the user's cache knows any."""
    world, row = scene.world(), Row("locks", scene.name, states=1)
    end = watch(lambda: run(scene, world, mistake), ["trace=flock,fcntl,semop,semtimedop", "signal=none"], ("-y",))
    taken = [line for line in end.trace.splitlines() if "SETLK" in line or line.startswith(("flock", "sem"))]
    row.violations += [line for line in taken if "SETLKW" in line or str(cache) not in line]
    row.violations += [end.note] if end.note else []
    return row


def _act(name: str) -> Act:
    if name in ACTS:
        return ACTS[name]
    from tests.stress.commands import COMMANDS  # which takes longer to import than an operation takes

    return COMMANDS[name]


def main(place: str, name: str, faults: str, every: str, mistake: str = "") -> None:
    scene = Scene(Path(place) / "scene", name, _act(name))
    if faults == "LOCKS":
        print(json.dumps([asdict(locks(scene, cache_root(), mistake))]))
        return
    world = scene.world()
    found = calls(lambda: run(scene, world, mistake), world)
    print(json.dumps([asdict(sweep(scene, found, fault, int(every), mistake)) for fault in faults.split(",")]))


if __name__ == "__main__":
    main(*sys.argv[1:])
