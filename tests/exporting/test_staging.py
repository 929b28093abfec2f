"""What an export that died has left beside its target."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adapterhub_lite.exporting.staging import staged_folder
from adapterhub_lite.store.fs import FileSystem

KILLED = """
import os, signal, sys
from pathlib import Path
from adapterhub_lite.exporting.staging import staged_folder
from adapterhub_lite.store.fs import FileSystem
with staged_folder(Path(sys.argv[1]), 10, FileSystem()) as staged:
    (staged / "weights").write_bytes(b"x" * 10)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_export_removes_what_a_killed_one_left(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False, timeout=120)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 1
    assert names(tmp_path)[0].startswith(".out.exporting-")
    events = []
    with staged_folder(tmp_path / "out", 10, FileSystem(), events.append) as staged:
        (staged / "file").write_text("1")
    assert names(tmp_path) == ["out"]
    assert any("did not end" in str(event) for event in events)


def test_an_export_at_work_is_left_alone(tmp_path):
    with staged_folder(tmp_path / "out", 10, FileSystem()) as first:
        (first / "file").write_text("1")
        with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", 10, FileSystem()):
            raise RuntimeError
        assert (first / "file").is_file()
    assert names(tmp_path) == ["out"]


def test_what_is_not_an_exports_is_left_alone(tmp_path):
    others = [".out.exporting-mine", ".other.exporting-0123456789abcdef", ".0123456789abcdef0123456789abcdef"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.exporting-0123456789abcdef").symlink_to(tmp_path / "elsewhere")
    with staged_folder(tmp_path / "out", 10, FileSystem()):
        pass
    assert names(tmp_path) == sorted([*others, ".out.exporting-0123456789abcdef", "elsewhere", "out"])
