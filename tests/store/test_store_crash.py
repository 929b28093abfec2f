"""Every operation of the store, stopped at each of its disk operations, by death and by errors.

Here the calls are those of the store's own `FileSystem`; `tests/stress/test_system_calls.py` does it to real ones.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from adapterhub_lite.errors import AdapterHubError, StoreError, StoreFull
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Unsynced
from tests.stress.acts import ACTS, CARD, populated
from tests.stress.scene import Scene, failed, scratch
from tests.stress.tally import LONG, Row, row

CHANGING = [name for name in ACTS if name not in ("read", "verify")]
FAULTS: dict[str, Callable[[int], Failing]] = {
    "death": lambda at: Failing(at, Crash()),
    "death in a write": lambda at: Failing(at, Crash(), torn=True),
    "ENOSPC": lambda at: Failing(at, OSError(errno.ENOSPC, "injected")),
    "EIO": lambda at: Failing(at, OSError(errno.EIO, "injected")),
    "EINTR": lambda at: Failing(at, InterruptedError(errno.EINTR, "injected")),
    "a disk that stays full": lambda at: Failing(at, OSError(errno.ENOSPC, "injected"), lasting=True, torn=True),
    "EIO of what was done": lambda at: Failing(at, OSError(errno.EIO, "injected"), late=True),
}
EVERY = {fault: 1 if LONG else 9 if fault.startswith("death") else 13 for fault in FAULTS}


@pytest.fixture(scope="module")
def scene() -> Iterator[Callable[[str], Scene]]:
    with scratch() as place:
        yield cache(lambda name: Scene(place / name, name))


def sweep(scene: Scene, fault: str, found: Row) -> None:
    """Run an operation with a fault at its disk operations, until one is not reached any more."""
    act, every, before = scene.act, EVERY[fault], scene.states
    for at in itertools.count(1 + len(scene.name + fault) % min(every, 6), every):
        world, fs = scene.world(), FAULTS[fault](at)
        try:
            act.run(Store(world / "store", fs=fs))
        except Crash:
            wrong = scene.problems(world)
            found.kills += 1
        except (AdapterHubError, OSError) as error:
            untold = fs.late or fs.lasting
            cleaning = untold or fs.kind in ("unlink", "rmdir")
            wrong = [one for one in (failed(error), *([] if cleaning else scene.left(world))) if one]
            wrong += scene.problems(world, [0] if act.takes_back and not untold else None)
            found.faults += 1
        else:
            wrong = scene.done(world)
            found.faults += fs.count >= at
        found.violations += [f"{scene.name}, {fault} at operation {at} ({fs.kind}): {one}" for one in wrong]
        if fs.count < at:
            break
    found.states = scene.states - before
    assert found.kills + found.faults > (4 if LONG else 0)


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("fault", FAULTS)
def test_old_or_new_whole_and_the_next_call_works(scene: Callable[[str], Scene], name: str, fault: str) -> None:
    with row("file system", name) as found:
        sweep(scene(name), fault, found)


def prepared(path: Path) -> Path:
    populated(path.parent / "world")
    (path.parent / "world" / "store").rename(path)
    return path


def test_full_disk_says_how_much(tmp_path: Path) -> None:
    class Full(FileSystem):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreFull, match=r"about \d{3,4} bytes are needed, \d+ are free") as caught:
        Store(tmp_path / "store", fs=Full()).put("sql", lora_files(), CARD)
    assert caught.value.hint
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_a_failed_fsync_is_never_repeated(tmp_path: Path) -> None:
    class Lost(FileSystem):
        calls = 0

        def fsync(self, fd: int) -> None:
            self.calls += 1
            raise OSError(errno.EIO, "Input/output error")

    fs = Lost()
    with pytest.raises(StoreError, match="Input/output error"):
        Store(prepared(tmp_path / "store"), fs=fs).put("sql", lora_files(3), CARD)
    assert fs.calls == 1


def test_one_byte_at_a_time(tmp_path: Path) -> None:
    class Slow(Unsynced):
        def write(self, fd: int, data: memoryview) -> int:
            return super().write(fd, data[:1])

    ref = Store(tmp_path / "store", fs=Slow()).put("sql", lora_files(), CARD)
    assert Store(tmp_path / "other", fs=Unsynced()).put("sql", lora_files(), CARD) == ref


def test_a_file_system_without_links(tmp_path: Path) -> None:
    class Linkless(Unsynced):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    store = Store(tmp_path / "store", fs=Linkless())
    digests = {store.put("sql", lora_files(), CARD).digest for _ in range(2)}
    assert len(digests) == 1
    assert store.verify() == []


class Unwritable(Unsynced):
    """A file system that was mounted to be read only."""

    def create(self, path: Path, mode: int) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_preparing_finds_that_nothing_can_be_written(tmp_path: Path) -> None:
    path = prepared(tmp_path / "store")
    with pytest.raises(StoreError, match=r"Could not write into the store: Read-only.*another store with --store"):
        Store(path, fs=Unwritable()).prepare()
    assert Store(path).resolve("sql:prod").version == 1


@pytest.mark.parametrize("kind", ["write", "fsync", "unlink"])
def test_preparing_tries_all_of_it(tmp_path: Path, kind: str) -> None:
    class Refusing(Unsynced):
        def __getattribute__(self, name: str) -> object:
            return refuse if name == kind else super().__getattribute__(name)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StoreError, match="Could not write into the store: Input/output error"):
        Store(prepared(tmp_path / "store"), fs=Refusing()).prepare()


def test_preparing_leaves_nothing(tmp_path: Path) -> None:
    for path in (prepared(tmp_path / "store"), tmp_path / "new"):
        Store(path, fs=Unsynced()).prepare()
        assert list((path / "tmp").iterdir()) == []
        assert (path / "store.json").is_file()


def test_preparing_a_full_disk_says_so(tmp_path: Path) -> None:
    class Full(Unsynced):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    path = prepared(tmp_path / "store")
    with pytest.raises(StoreFull, match="no space left"):
        Store(path, fs=Full()).prepare()
    assert list((path / "tmp").iterdir()) == []
