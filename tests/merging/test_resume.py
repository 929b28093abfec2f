"""Merges that die: nothing or everything is there, and the same merge goes on from what is durable."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_lite.errors import MergeFailed, StoreError, StoreFull
from adapterhub_lite.events import Event, Note
from adapterhub_lite.merging import journal
from adapterhub_lite.merging import merge as merging
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.plan import MergePlan
from adapterhub_lite.store.fs import FileSystem
from tests.merging.peft_merges import files_of, plan_of, saved, sharded
from tests.store.faulty import Crash, Failing, Recording, Unsynced
from tests.store.power_loss import Disk, write_tree
from tests.stress.strace import unavailable

ROOT = Path(__file__).parents[2]
FAULTS = [
    pytest.param(Crash(), {}, id="killed"),
    pytest.param(Crash(), {"torn": True}, id="killed half way"),
    pytest.param(OSError(errno.ENOSPC, "full"), {"lasting": True}, id="full"),
    pytest.param(OSError(errno.EIO, "broken"), {}, id="broken"),
    pytest.param(OSError(errno.EIO, "broken"), {"late": True}, id="broken late"),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """A checkpoint in several files, an adapter, and what their merge is."""
    place = tmp_path_factory.mktemp("scene")
    base = sharded("llama", place / "base", "40KB")
    adapter = saved(place / "one", base, "llama", "lora", r=2)
    run(plan_of(base, (adapter, 1.0)), base, place / "out")
    return base, adapter, files_of(place / "out")


def run(plan: MergePlan, base: Path, out: Path, fs: FileSystem | None = None, **options) -> list[Event]:
    events: list[Event] = []
    with staged_merge(plan, base, out, fs=fs or Unsynced(), on_event=events.append, **options):
        pass
    return events


def notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def hidden(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.startswith(".")]


def faults(plan: MergePlan, base: Path, place: Path, error: BaseException, **how) -> Iterator[Path]:
    """Folders after a merge that failed at its 1st, 2nd, ... operation."""
    for at in range(1, 500):
        folder = place / str(at)
        folder.mkdir(parents=True)
        fs = Failing(at, error, **how)
        try:
            run(plan, base, folder / "out", fs)
        except (Crash, OSError):
            yield folder
        else:
            if fs.count < at:
                return
            yield folder
        shutil.rmtree(folder)
    raise AssertionError("never completed")


@pytest.mark.parametrize(("error", "how"), FAULTS)
def test_a_fault_at_any_operation_then_the_same_merge_again(tmp_path, scene, error, how):
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))
    taken_over = set()
    for folder in faults(plan, base, tmp_path, error, **how):
        out = folder / "out"
        if out.exists():
            assert files_of(out) == expected
            shutil.rmtree(out)
        told = notes(run(plan, base, out))
        assert files_of(out) == expected
        assert hidden(folder) == []
        taken_over |= {line.split()[0] for line in told if "taken over" in line}
    assert {"1", "2"} <= taken_over


def test_what_is_taken_over_is_not_written_again(tmp_path, scene):
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))
    first = _died(plan, base, tmp_path / "out", "model-00003")
    before = {p.name: p.stat() for p in first.glob("*.safetensors")}
    assert len(before) >= 2
    fs = Recording()
    (told,) = notes(run(plan, base, tmp_path / "out", fs))
    assert f"2 of {len(plan.shards)} shards were done" in told
    after = {p.name: p.stat() for p in (tmp_path / "out").glob("*.safetensors")}
    kept = [name for name in before if before[name].st_ino == after[name].st_ino]
    assert len(kept) == 2
    assert not {entry[1].name for entry in fs.log if entry[0] == "create"} & set(kept)
    assert files_of(tmp_path / "out") == expected


class Killed(Unsynced):
    """Dies when a file of this name is begun."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.name, self.error = name, error

    def create(self, path: Path, mode: int) -> int:
        if path.name.startswith(self.name):
            raise self.error
        return super().create(path, mode)


def _died(plan: MergePlan, base: Path, out: Path, at: str, error: BaseException | None = None) -> Path:
    """The checkpoint in the making of a merge that died before a file."""
    with pytest.raises((Crash, StoreError, KeyboardInterrupt)):
        run(plan, base, out, Killed(at, error or Crash()))
    (folder,) = hidden(out.parent)
    return folder / "checkpoint"


@pytest.mark.parametrize("change", ["value", "time", "size", "link", "gone"])
def test_a_shard_that_was_touched_is_made_again(tmp_path, scene, change):
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))
    shard = sorted(_died(plan, base, tmp_path / "out", "model-00003").glob("*.safetensors"))[0]
    data = shard.read_bytes()
    if change == "value":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "time":
        os.utime(shard, ns=(1, 1))
    elif change == "size":
        shard.write_bytes(data[:-4])
    else:
        shard.unlink()
        if change == "link":
            (tmp_path / "elsewhere").write_bytes(data)
            shard.symlink_to(tmp_path / "elsewhere")
    assert "1 of" in notes(run(plan, base, tmp_path / "out"))[0]
    assert files_of(tmp_path / "out") == expected
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert change != "link" or (tmp_path / "elsewhere").read_bytes() == data


def test_a_journal_that_vouches_for_wrong_bytes_is_not_believed(tmp_path, scene, monkeypatch):
    """As where another version of this package wrote them: a sample of each tensor is made again."""
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))
    other = plan_of(base, (adapter, 0.5))
    with monkeypatch.context() as patched:
        patched.setattr(merging, "plan_digest", lambda _: "the same")
        _died(other, base, tmp_path / "out", "config.json")
        run(plan, base, tmp_path / "out")
    got = files_of(tmp_path / "out")
    assert {n: d for n, d in got.items() if n.endswith(".safetensors")} == {
        n: d for n, d in expected.items() if n.endswith(".safetensors")
    }


def test_another_merge_leaves_it_alone_and_says_so(tmp_path, scene):
    base, adapter, expected = scene
    plan, other = plan_of(base, (adapter, 1.0)), plan_of(base, (adapter, 0.5))
    place = _died(other, base, tmp_path / "out", "model-00003").parent
    before = files_of(place)
    seen: list[str] = []
    with staged_merge(plan, base, tmp_path / "out", fs=Unsynced(), on_event=lambda e: seen.extend(notes([e]))):
        assert files_of(place) == before
    assert files_of(tmp_path / "out") == expected
    assert "is of another merge into out that did not end" in seen[0]
    assert "is removed" in seen[1]
    assert hidden(tmp_path) == []


def test_what_is_not_a_merges_is_never_touched(tmp_path, scene):
    base, adapter, _ = scene
    plan, other = plan_of(base, (adapter, 1.0)), plan_of(base, (adapter, 0.5))
    own = _died(other, base, tmp_path / "out", "model-00003").parent
    (own / "mine.txt").write_text("x")
    strange = tmp_path / ".out.merging-0123456789abcdef"
    (strange / "checkpoint").mkdir(parents=True)
    (strange / "checkpoint" / "thing").write_text("y")
    near = tmp_path / ".output.merging-0123456789abcdef"
    near.mkdir()
    run(plan, base, tmp_path / "out")
    assert (own / "mine.txt").read_text() == "x"
    assert (strange / "checkpoint" / "thing").read_text() == "y"
    assert near.is_dir()


def test_something_else_in_the_place_of_the_folder(tmp_path, scene):
    base, adapter, _ = scene
    plan = plan_of(base, (adapter, 1.0))
    folder = _died(plan, base, tmp_path / "out", "model-00003").parent
    for make in (
        lambda: folder.write_text("a file"),
        lambda: folder.symlink_to(tmp_path),
        lambda: (folder.mkdir(), (folder / "thing").write_text("x")),
    ):
        shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
        make()
        with pytest.raises(StoreError):
            run(plan, base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert os.path.lexists(folder)
    assert (folder / "thing").read_text() == "x"


def test_a_refused_merge_leaves_nothing_and_an_interrupted_one_its_shards(tmp_path, scene):
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))
    with pytest.raises(MergeFailed), staged_merge(plan, base, tmp_path / "out", fs=Unsynced()):
        raise MergeFailed("Too different.", "")
    assert list(tmp_path.iterdir()) == []

    def interrupted() -> None:
        with staged_merge(plan, base, tmp_path / "out", fs=Unsynced()) as staged:
            (staged / "merge_report.json").write_text("{}")
            (staged / "residual").mkdir()
            (staged / "residual" / "x").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "out").exists()
    (told,) = notes(run(plan, base, tmp_path / "out"))
    assert f"{len(plan.shards)} of {len(plan.shards)}" in told
    assert files_of(tmp_path / "out") == expected


def test_a_full_disk_says_what_is_kept(tmp_path, scene):
    base, adapter, _ = scene
    plan = plan_of(base, (adapter, 1.0))
    full = OSError(errno.ENOSPC, "full")
    with pytest.raises(StoreFull, match=r"no space left.*2 of the files are done and kept in .*the same merge goes on"):
        run(plan, base, tmp_path / "out", Killed("model-00003", full))
    with pytest.raises(StoreFull) as found:
        run(plan_of(base, (adapter, 2.0)), base, tmp_path / "new" / "out", Killed("model-00001", full))
    assert "kept" not in str(found.value)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("stops", ["write", "create"])
def test_a_disk_that_is_full_from_the_beginning_leaves_no_folder(tmp_path, scene, stops, monkeypatch):
    base, adapter, _ = scene
    monkeypatch.setattr(FileSystem, stops, _full)
    with pytest.raises(StoreFull):
        run(plan_of(base, (adapter, 1.0)), base, tmp_path / "out", Unsynced())
    assert list(tmp_path.iterdir()) == []


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "full")


def test_a_full_disk_does_not_cost_what_is_durable(tmp_path, scene, monkeypatch):
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))
    first = _died(plan, base, tmp_path / "out", "model-00003")
    with monkeypatch.context() as patched:
        patched.setattr(FileSystem, "write", _full)
        with pytest.raises(StoreFull):
            run(plan, base, tmp_path / "out", Unsynced())
    assert len(list(first.glob("*.safetensors"))) >= 2
    assert any("taken over" in line for line in notes(run(plan, base, tmp_path / "out")))
    assert files_of(tmp_path / "out") == expected


def test_two_merges_at_once_into_one_folder(tmp_path, scene):
    base, adapter, expected = scene
    plan, other = plan_of(base, (adapter, 1.0)), plan_of(base, (adapter, 0.5))
    with staged_merge(plan, base, tmp_path / "out", fs=Unsynced()):
        for late in (plan, other):
            with pytest.raises(StoreError, match="Another process is merging into"):
                run(late, base, tmp_path / "out")
        run(other, base, tmp_path / "elsewhere")
    assert files_of(tmp_path / "out") == expected
    assert hidden(tmp_path) == []
    with pytest.raises(StoreError, match="exists and is not an empty folder"):
        run(plan, base, tmp_path / "out")


def test_a_file_system_without_locks(tmp_path, scene, monkeypatch):
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))

    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(journal.fcntl, "flock", flock)
    _died(plan, base, tmp_path / "out", "model-00003")
    run(plan, base, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected
    assert hidden(tmp_path) == []


def test_whoever_comes_last_does_not_overwrite(tmp_path, scene):
    base, adapter, expected = scene
    plan = plan_of(base, (adapter, 1.0))

    def late() -> None:
        with staged_merge(plan, base, tmp_path / "out", fs=Unsynced()):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(StoreError, match="Could not publish"):
        late()
    assert files_of(tmp_path / "out") == {"theirs": b"x"}
    shutil.rmtree(tmp_path / "out")
    run(plan, base, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


def test_an_empty_folder_and_long_names_will_do(tmp_path, scene):
    base, adapter, expected = scene
    (tmp_path / "out").mkdir()
    long = "ü" * 120
    for name in ("out", long):
        run(plan_of(base, (adapter, 1.0)), base, tmp_path / name)
        assert files_of(tmp_path / name) == expected
    assert hidden(tmp_path) == []


SCRIPT = """
import os, signal, sys
from pathlib import Path
from adapterhub_lite.store.fs import FileSystem
from tests.merging.peft_merges import plan_of
from adapterhub_lite.merging.merge import staged_merge

class Deadly(FileSystem):
    left = 0

for name in ("create", "write", "copy_range", "fsync", "fsync_dir", "mkdir", "rename", "replace", "unlink", "rmdir"):
    def call(self, *arguments, _name=name):
        Deadly.left -= 1
        if Deadly.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(FileSystem, _name)(self, *arguments)
    setattr(Deadly, name, call)

base, adapter = Path(sys.argv[1]), Path(sys.argv[2])
plan = plan_of(base, (adapter, 1.0))
for line in sys.stdin:
    at, out = line.split()
    pid = os.fork()
    if pid == 0:
        Deadly.left = int(at)
        with staged_merge(plan, base, Path(out), fs=Deadly()):
            pass
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed(tmp_path, scene):
    """SIGKILL before an operation, at every fifth of them; locks of the dead are free."""
    base, adapter, expected = scene
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(base), str(adapter)]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=-1, stdout=-1, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    killed = 0
    plan = plan_of(base, (adapter, 1.0))
    for at in range(1, 400, 5):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        print(at, out, file=child.stdin, flush=True)
        status = int(child.stdout.readline())
        if out.exists():
            assert files_of(out) == expected
            shutil.rmtree(out)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
        run(plan, base, out)
        assert files_of(out) == expected
        assert hidden(out.parent) == []
    child.stdin.close()
    assert child.wait() == 0
    assert killed > 10


def test_a_power_cut_at_any_time_leaves_nothing_or_everything(tmp_path, scene):
    base, adapter, expected = scene
    place = tmp_path / "place"
    place.mkdir()
    fs, disk = Recording(), Disk(place)
    run(plan_of(base, (adapter, 1.0)), base, place / "out", fs)
    seen = 0
    for number, operation in enumerate(fs.log):
        disk.apply(operation)
        last = number > len(fs.log) - 12
        if number % 7 and not last:
            continue
        for tree in disk.states(16):
            found = tree.get("out")
            assert found is None or found == expected
            seen += found is not None
    assert seen
    (final,) = list(disk.states(1))[:1]
    assert final["out"] == expected


def test_after_a_power_cut_the_same_merge_goes_on(tmp_path, scene):
    base, adapter, expected = scene
    place = tmp_path / "place"
    place.mkdir()
    plan, fs, disk = plan_of(base, (adapter, 1.0)), Recording(), Disk(place)
    run(plan, base, place / "out", fs)
    for number, operation in enumerate(fs.log):
        disk.apply(operation)
        if number % 23:
            continue
        for index, tree in enumerate(disk.states(2)):
            world = tmp_path / f"{number}-{index}"
            write_tree(tree, world)
            if "out" not in tree:
                run(plan, base, world / "out")
            assert files_of(world / "out") == expected
            shutil.rmtree(world)


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "strace is here")
def test_a_merge_stopped_and_failed_at_its_system_calls(tmp_path, scene):
    base, adapter, _ = scene
    command = [sys.executable, "-m", "tests.merging.system_calls", str(base), str(adapter), str(tmp_path), "23"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    faults, problems = json.loads(done.stdout)
    assert problems == []
    assert faults > 5
