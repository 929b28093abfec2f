"""Every operation of the store, stopped at each of its system calls, by death and by errors."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_lite.errors import StoreError, StoreFull
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Unsynced

CARD = Card(created="2026-01-31T12:00:00Z")
Act = Callable[[Store], object]


def view(path: Path) -> dict[str, object]:
    """Everything a reader can see."""
    store = Store(path)
    entries = {f"{entry.name}@{entry.version}": (entry.digest, entry.aliases) for entry in store.list()}
    for ref in entries:
        store.verified_folder(ref)
    return dict(entries)


def prepared(path: Path) -> Path:
    store = Store(path, fs=Unsynced())
    for seed in (0, 1):
        store.put("sql", lora_files(seed), CARD)
    store.alias("sql", "prod", 1)
    return path


def outside(store: Store) -> Path:
    return store.path.parent / "out"


ACTS: dict[str, Act] = {
    "put": lambda store: store.put("sql", lora_files(2), CARD),
    "put equal": lambda store: store.put("sql", lora_files(0), CARD),
    "alias": lambda store: store.alias("sql", "prod", 2),
    "new alias": lambda store: store.alias("sql", "test", 2),
    "unalias": lambda store: store.unalias("sql", "prod"),
    "remove": lambda store: store.remove("sql@2"),
    "export": lambda store: store.export("sql@1", outside(store)),
}


def sweep(tmp_path: Path, act: Act, fault: Callable[[int], Failing], start: bool = True) -> int:
    """Run `act` failing at operation 1, 2, ... until it succeeds; return how many faults there were."""
    seed = tmp_path / "seed"
    if start:
        prepared(seed)
    before = view(seed)
    done = tmp_path / "done" / "store"
    done.parent.mkdir()
    if start:
        shutil.copytree(seed, done)
    act(Store(done, fs=Unsynced()))
    after = view(done)
    for at in range(1, 500):
        path = tmp_path / f"at{at}" / "store"
        path.parent.mkdir()
        if start:
            shutil.copytree(seed, path)
        fs = fault(at)
        try:
            act(Store(path, fs=fs))
        except (Crash, StoreError) as error:
            check_fault(path, fs, error, before, after)
        else:
            assert view(path) == after
            if fs.count < at:
                return at - 1
        assert_store_sound(path)
        act_again(path, act)
        shutil.rmtree(path.parent)
    raise AssertionError("never completed")


def check_fault(path: Path, fs: Failing, error: BaseException, before: object, after: object) -> None:
    assert view(path) in (before, after), f"operation {fs.at} ({fs.kind}) left a mixture"
    out = path.parent / "out"
    assert not out.exists() or len(list(out.iterdir())) == 4
    if isinstance(error, StoreError) and fs.taking_back:
        assert view(path) == before, f"operation {fs.at} ({fs.kind}) failed, yet published"
    if isinstance(error, StoreFull):
        assert "bytes are needed" in str(error)
        assert not list((path / "tmp").glob("*")) or fs.lasting


def act_again(path: Path, act: Act) -> None:
    """Whatever was left over, the store goes on working."""
    store = Store(path, fs=Unsynced())
    store.put("sql", lora_files(3), CARD)
    shutil.rmtree(outside(store), ignore_errors=True)
    assert_store_sound(path)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("torn", [False, True])
def test_death_at_every_operation(tmp_path: Path, name: str, torn: bool) -> None:
    assert sweep(tmp_path, ACTS[name], lambda at: Failing(at, Crash(), torn=torn)) > 5


def test_death_while_the_store_is_made(tmp_path: Path) -> None:
    assert sweep(tmp_path, ACTS["put"], lambda at: Failing(at, Crash()), start=False) > 20


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_errors_at_every_operation(tmp_path: Path, name: str, code: int) -> None:
    def fault(at: int) -> Failing:
        return Failing(at, OSError(code, "injected"), taking_back=name.startswith("put"))

    assert sweep(tmp_path, ACTS[name], fault) > 5


@pytest.mark.parametrize("name", ["put", "alias", "export"])
def test_a_disk_that_stays_full(tmp_path: Path, name: str) -> None:
    sweep(tmp_path, ACTS[name], lambda at: Failing(at, OSError(errno.ENOSPC, "injected"), lasting=True))


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
        Store(prepared(tmp_path / "store"), fs=fs).put("sql", lora_files(2), CARD)
    assert fs.calls == 1
