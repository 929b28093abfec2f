"""A merge stopped and failed at its real system calls, by strace; a program, so that forks stay small.

    python -m tests.merging.system_calls BASE ADAPTER PLACE EVERY      prints [faults, problems] as JSON

Each `EVERY`-th call that names or holds a file of the merge is killed, or says that the disk is full; the same merge is
then made again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from adapterhub_lite.errors import StoreError
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.plan import MergePlan
from tests.merging.peft_merges import files_of, plan_of
from tests.stress.strace import calls, disturb


def merged(plan: MergePlan, base: Path, out: Path) -> str:
    """How a merge ends: "" for well."""
    try:
        with staged_merge(plan, base, out):
            pass
    except StoreError as error:
        return f"refused: {error}"
    return ""


def main(base: Path, adapter: Path, place: Path, every: int) -> None:
    """Try all faults."""
    plan, problems, faults = plan_of(base, (adapter, 1.0)), [], 0
    merged(plan, base, place / "whole" / "out")
    expected = files_of(place / "whole" / "out")
    world = place / "world"
    world.mkdir()
    found = [call for call in calls(lambda: merged(plan, base, world / "out"), world) if call.changes]
    for how in ("signal=KILL", "error=ENOSPC"):
        for call in found[::every]:
            shutil.rmtree(world)
            world.mkdir()
            end = disturb(lambda: merged(plan, base, world / "out"), call, how)
            faults += end.disturbed
            problems += [f"{how} at {call.line}: {one}" for one in _problems(plan, base, world, expected, end.note)]
    print(json.dumps([faults, problems]))


def _problems(plan: MergePlan, base: Path, world: Path, expected: dict[str, bytes], note: str) -> list[str]:
    out, found = world / "out", []
    if note and not note.startswith("refused"):
        found.append(note)
    if out.exists():
        found += ["out is not whole"] if files_of(out) != expected else []
        shutil.rmtree(out)
    again = merged(plan, base, out)
    if again or files_of(out) != expected:
        found.append(f"not whole when made again: {again}")
    return found + [f"{path.name} is left" for path in world.iterdir() if path != out]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))  # type: ignore[misc]
