"""From format 1 to the present: nothing is lost, whenever the process dies, and old readers and new ones agree."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from adapterhub_lite.errors import StoreCorrupt, StoreError, StoreNewer
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Recording, Unsynced
from tests.store.first_format import to_first_format
from tests.store.power_loss import Disk, write_tree

EXPECTED = {"prod": [1, 2, 1], "canary": [2, None]}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of format 1 with two versions, and two aliases with a history."""
    store = Store(tmp_path / "old", fs=Unsynced())
    for seed in (0, 1):
        store.put("sql", lora_files(seed), Card(created="2026-01-31T12:00:00Z"))
    for version in (1, 2, 1):
        store.alias("sql", "prod", version)
    store.alias("sql", "canary", 2)
    store.unalias("sql", "canary")
    to_first_format(store.path)
    return store.path


def histories(path: Path) -> dict[str, list[int | None]]:
    store = Store(path)
    return {alias: [move.version for move in store.alias_history("sql", alias)] for alias in ("prod", "canary")}


def test_an_old_store_is_read_as_it_is(old: Path) -> None:
    before = sorted(old.rglob("*"))
    store = Store(old)
    assert store.aliases("sql") == {"prod": 1}
    assert store.resolve("sql:prod").version == 1
    assert histories(old) == EXPECTED
    assert store.verify() == []
    assert sorted(old.rglob("*")) == before


@pytest.mark.parametrize("act", ["put", "alias", "prepare", "remove"])
def test_the_first_write_migrates(old: Path, act: str) -> None:
    store = Store(old, fs=Unsynced())
    {
        "put": lambda: store.put("sql", lora_files(2), Card()),
        "alias": lambda: store.alias("sql", "new", 2),
        "prepare": store.migrate,
        "remove": lambda: store.remove("sql@2"),
    }[act]()
    assert (old / "store.json").read_text() == '{"format":2}\n'
    assert not list(old.glob("aliases/*/*.json"))
    assert histories(old) == EXPECTED
    if act != "remove":
        assert store.rollback("sql", "prod").version == 2
    assert_store_sound(old)


def test_killed_at_every_step_and_taken_up_again(old: Path, tmp_path: Path) -> None:
    points = 0
    for at in range(1, 200):
        path = tmp_path / f"at{at}"
        shutil.copytree(old, path)
        fs = Failing(at, Crash(), torn=bool(at % 2))
        try:
            Store(path, fs=fs).migrate()
        except Crash:
            points += 1
        assert histories(path) == EXPECTED, f"after operation {at} ({fs.kind})"
        store = Store(path, fs=Unsynced())
        store.alias("sql", "prod", 2)
        assert histories(path) == {**EXPECTED, "prod": [1, 2, 1, 2]}, f"after operation {at} ({fs.kind})"
        assert_store_sound(path)
        shutil.rmtree(path)
        if fs.count < at:
            break
    assert points > 30


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_errors_at_every_step(old: Path, tmp_path: Path, code: int) -> None:
    for at in range(1, 200):
        path = tmp_path / f"at{at}"
        shutil.copytree(old, path)
        fs = Failing(at, OSError(code, "injected"), lasting=True)
        try:
            Store(path, fs=fs).migrate()
        except StoreError:
            assert fs.count >= at
        assert histories(path) == EXPECTED
        assert_store_sound(path)
        shutil.rmtree(path)
        if fs.count < at:
            return
    raise AssertionError("never completed")


def test_power_lost_at_every_step(old: Path, tmp_path: Path) -> None:
    disk, fs = Disk(old), Recording()
    Store(old, fs=fs).migrate()
    looked = 0
    for operation in fs.log:
        disk.apply(operation)
        for tree in disk.states():
            looked += 1
            if looked % 7 and operation[0] != "rename":
                continue
            write_tree(tree, tmp_path / "disk")
            assert histories(tmp_path / "disk") == EXPECTED, operation
            shutil.rmtree(tmp_path / "disk")
    assert looked > 100


def test_what_a_killed_migration_wrote_is_not_believed(old: Path) -> None:
    with pytest.raises(Crash):
        Store(old, fs=Failing(20, Crash())).migrate()
    assert (old / "store.json").read_text() == '{"format":1}\n'
    moves = list(old.glob("aliases/sql/*@*"))
    assert moves  # it had begun
    assert histories(old) == EXPECTED  # and is not believed before it is decided


def test_a_damaged_alias_stays_damaged_and_can_be_set_again(old: Path) -> None:
    path = old / "aliases" / "sql" / "prod.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-20])
    store = Store(old, fs=Unsynced())
    store.put("sql", lora_files(2), Card())
    with pytest.raises(StoreCorrupt, match="ahl alias sql:prod VERSION"):
        store.resolve("sql:prod")
    assert [finding.where for finding in store.verify()] == ["sql:prod"]
    store.alias("sql", "prod", 3)
    assert Store(old).resolve("sql:prod").version == 3
    assert_store_sound(old)


def test_a_newer_store_is_refused_and_left_alone(old: Path) -> None:
    (old / "store.json").write_text('{"format":3}')
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    store = Store(old)
    for act in (
        store.migrate,
        store.list,
        lambda: store.put("sql", lora_files(), Card()),
        lambda: store.alias("sql", "prod", 2),
        store.gc,
        store.repair,
    ):
        with pytest.raises(StoreNewer, match=r"format 3.*up to 2.*pip install --upgrade"):
            act()
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_leftovers_of_a_migration_killed_after_its_decision_are_collected(old: Path) -> None:
    fs = Failing(10_000, Crash())
    store = Store(old, fs=fs)
    store.migrate()
    last = fs.count
    to_first_format(old)
    for at in range(last, 0, -1):
        if (old / "store.json").read_text() == '{"format":2}\n':
            break
        with pytest.raises(Crash):
            Store(old, fs=Failing(at, Crash())).migrate()
    left = list(old.glob("aliases/sql/*.json"))
    assert left
    gone = Store(old, fs=Unsynced()).gc()
    assert {one.path for one in gone} >= {str(path.relative_to(old)) for path in left}
    assert histories(old) == EXPECTED
    assert_store_sound(old)
