"""Operations of the store stopped and failed at their real system calls, by strace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stress.acts import ACTS
from tests.stress.commands import COMMANDS
from tests.stress.scene import scratch
from tests.stress.strace import unavailable
from tests.stress.sweep import FAULTS
from tests.stress.tally import LONG, ROWS, Row

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "strace is here")

ROOT = Path(__file__).parents[2]
SAMPLE = {"put": 5, "alias": 5, "remove": 23, "import tar": 17, "gc": 47, "migrate": 11}
EVERYTHING = {**dict.fromkeys(ACTS, 1), **dict.fromkeys(COMMANDS, 3), "read": 11, "verify": 2}
LOCKLESS = ["list many", "read", *([*ACTS, *COMMANDS] if LONG else ["put", "alias", "remove"])]


def swept(place: Path, name: str, faults: str, every: int, mistake: str = "") -> list[Row]:
    """The rows of the program `tests.stress.sweep`."""
    command = [sys.executable, "-m", "tests.stress.sweep", str(place), name, faults, str(every), mistake]
    env = {**os.environ, "AHL_CACHE": str(place / "cache")}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Row(**told) for told in json.loads(done.stdout)]


@pytest.mark.parametrize("name", [name for name in (EVERYTHING if LONG else SAMPLE) if name != "list many"])
def test_old_or_new_at_every_system_call(name: str) -> None:
    with scratch() as place:
        rows = swept(place, name, ",".join(FAULTS), (EVERYTHING if LONG else SAMPLE)[name])
    ROWS.extend(rows)
    wrong = [one for row in rows for one in row.violations]
    assert not wrong, f"{len(wrong)} violations, such as: " + "\n".join(wrong[:3])
    assert any(row.kills for row in rows)


@pytest.mark.parametrize("name", dict.fromkeys(LOCKLESS))
def test_nobody_takes_a_lock(name: str) -> None:
    """Only the index beside the store, in the user's cache, is locked by SQLite, and never waited for."""
    with scratch() as place:
        rows = swept(place, name, "LOCKS", 1)
    ROWS.extend(rows)
    assert [one for row in rows for one in row.violations] == []
