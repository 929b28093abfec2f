"""No space left: on a disk that a preloaded library makes small, and on one that is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stress.acts import ACTS
from tests.stress.scene import scratch
from tests.stress.tally import LONG, ROWS, Row

ROOT = Path(__file__).parents[2]
SAMPLE = ["put", "import tar", "migrate"]
NAMES = [name for name in ACTS if name not in ("read", "verify")] if LONG else SAMPLE


def program(how: str, place: Path, name: str, every: int, mistake: str = "") -> list[str]:
    return [sys.executable, "-m", "tests.stress.small_disk", how, str(place), name, str(every), mistake]


def told(command: list[str], **env: str) -> Row:
    done = subprocess.run(command, env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Row(**json.loads(done.stdout))


def judged(command: list[str], **env: str) -> None:
    row = told(command, **env)
    ROWS.append(row)
    assert not row.violations, f"{len(row.violations)} violations, such as: " + "\n".join(row.violations[:3])
    assert row.faults > (row.operation != "gc")  # which writes nothing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["short", "room"])
def test_few_bytes_at_once_and_few_in_all(library: str, how: str, name: str) -> None:
    with scratch() as place:
        judged(program(how, place, name, 7 if LONG else 211), LD_PRELOAD=library)


def namespace() -> list[str]:
    """A command in which a file system can be mounted; [] where none may be."""
    for ways in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if shutil.which("unshare"):
            tried = subprocess.run([*ways, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
            if tried.returncode == 0:
                return ways
    return []


WAY = namespace()


@pytest.mark.skipif(not WAY, reason="no file system may be mounted here (unshare --mount)")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["pages", "files"])
def test_a_file_system_that_is_full(tmp_path: Path, how: str, name: str) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mounting = 'mount -t tmpfs -o size=2m,nr_inodes=600 none "$1" && shift && exec "$@"'
    judged([*WAY, "sh", "-c", mounting, "sh", str(place), *program(how, place, name, 1)])
