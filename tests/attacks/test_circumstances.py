"""S11, S14, S16 to S18, S20 and I15: what a store lies in, the clock, an index, leftovers, and sources that change."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store, aliases, listing, publish
from adapterhub_lite.store.incoming import LIMITS
from tests.attacks.build import CARD, CONFIG, WEIGHTS, files
from tests.attacks.doors import Call, Place, ahl, perform
from tests.attacks.guard import ROOT, changes, tree
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced

# --- S11: read-only ----------------------------------------------------------------------------------------------

_TRY_ALL = """
import json, sys
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from tests.formats.build import lora_files
store, out = Store(sys.argv[1]), sys.argv[2]
tries = {
    "read": lambda: store.read("sql@1"), "list": store.list, "search": lambda: store.search("sql"),
    "verify": lambda: [str(one) for one in store.verify()], "log": lambda: store.log("sql"),
    "export": lambda: store.export("sql@1", out), "put": lambda: store.put("sql", lora_files(7), Card()),
    "alias": lambda: store.alias("sql", "prod", 2), "remove": lambda: store.remove("sql@2"),
    "gc": lambda: store.gc(), "repair": store.repair,
}
told = {}
for name, run in tries.items():
    try:
        found = run()
        told[name] = ["done", found if name in ("verify", "gc", "repair") else ""]
    except AdapterHubError as error:
        told[name] = [type(error).__name__, str(error)]
print(json.dumps(told))
"""


def without_privileges() -> list[str]:
    """What runs a process for which modes of files count, also where everything runs as root."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root ignores the modes of files, and there is no setpriv to take that right away")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


@contextmanager
def modes(root: Path, folders: int, content: int) -> Iterator[None]:
    """Folders and files below `root` with these modes for a while."""
    paths = sorted(root.rglob("*"))
    before = [(path, stat.S_IMODE(path.lstat().st_mode)) for path in (root, *paths)]
    for path, _ in reversed(before):
        path.chmod(folders if path.is_dir() else content)
    try:
        yield
    finally:
        for path, mode in before:
            path.chmod(mode)


def test_s11_a_store_that_cannot_be_written(place: Place) -> None:
    command = [*without_privileges(), sys.executable, "-c", _TRY_ALL, str(place.store_path), str(place.outbox / "out")]
    before = tree(place.store_path)
    with modes(place.store_path, 0o500, 0o400):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        command[-1] = str(place.store_path / "tmp" / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    for name in ("read", "list", "search", "log", "export"):
        assert told[name] == ["done", ""], told
    assert told["verify"] == ["done", []]
    assert told["gc"] == told["repair"] == ["done", []]  # there is nothing to do
    for name in ("put", "alias", "remove"):
        kind, said = told[name]
        assert kind == "StoreError", told
        assert "Permission denied" in said
        assert str(place.store_path) in said
    assert [path for path in changes(before, tree(place.store_path)) if not (place.store_path / path).is_dir()] == []
    assert_store_sound(place.store_path)


def test_s11_a_store_that_cannot_be_read(place: Place) -> None:
    command = [*without_privileges(), sys.executable, "-c", _TRY_ALL, str(place.store_path), str(place.outbox / "out")]
    with modes(place.store_path, 0, 0):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    for name, (kind, said) in told.items():
        if name != "verify":
            assert (kind, "Permission denied" in said) == ("StoreError", True), (name, kind, said)


def test_s11_a_source_that_cannot_be_read(place: Place) -> None:
    folder = place.inbox / "foreign"
    folder.mkdir()
    for name, data in files().items():
        (folder / name).write_bytes(data)
    words = ["import", str(folder), "--name", "x", "--store", str(place.store_path), "--json"]
    command = [*without_privileges(), sys.executable, "-m", "adapterhub_lite.cli", *words]
    for mode in ((0, 0), (0o700, 0), (0o400, 0o400)):
        with modes(folder, *mode):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1, (mode, done.stdout, done.stderr)
        assert json.loads(done.stdout)["error"]["type"] == "StoreError"
        assert "Permission denied" in done.stderr
        assert "Traceback" not in done.stderr
    assert place.store.names() == ["sql"]


# --- S14: the index ----------------------------------------------------------------------------------------------


def _index(place: Place) -> Path:
    (found,) = Path(os.environ["AHL_CACHE"]).rglob("*.sqlite")
    return found


def _older(path: Path, place: Place) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE names (name TEXT PRIMARY KEY, facts BLOB)")


def _row_of_another(path: Path, place: Place) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE names SET facts = ?", ('[[1,"","",{},""]]',))


def _locked(path: Path, place: Place) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("BEGIN EXCLUSIVE")
    return db


INDEXES = {
    "deleted": lambda path, place: path.unlink(),
    "of zeros": lambda path, place: path.write_bytes(bytes(4096)),
    "text": lambda path, place: path.write_bytes(b"hello" * 1000),
    "cut": lambda path, place: os.truncate(path, 5000),
    "of an older form": _older,
    "of other facts": _row_of_another,
    "locked": _locked,
    "a folder": lambda path, place: (path.unlink(), path.mkdir()),
    "a link to a file of the user": lambda path, place: (
        path.unlink(), path.symlink_to(place.outside / "precious.txt"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", INDEXES)
def test_s14_the_index_is_never_the_truth(place: Place, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    expected = place.store.list()
    monkeypatch.setattr(listing, "INDEXED", 0)
    monkeypatch.setattr("adapterhub_lite.store.catalog.SETTLED", 0)  # folders count as settled at once
    assert place.store.list() == expected
    held = INDEXES[damage](_index(place), place)
    before = tree(place.outside)
    assert place.store.list() == expected
    assert place.store.search("accuracy>0.1") == expected
    ref = place.store.put("new", lora_files(9), Card())
    assert [entry.digest for entry in place.store.list() if entry.name == "new"] == [ref.digest]
    assert changes(before, tree(place.outside)) == []
    assert_store_sound(place.store_path)
    if isinstance(held, sqlite3.Connection):
        held.close()


# --- S16, S17: modes and roots -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o444), (0o077, 0o400), (0o027, 0o440), (0o002, 0o444)])
def test_s16_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    root = tmp_path / "group" / "store"
    root.parent.mkdir()
    os.chmod(root.parent, 0o2775)  # new folders belong to the group of this one, and pass that on
    before = os.umask(umask)
    try:
        store = Store(root, fs=Unsynced())
        store.put("sql", lora_files(), Card())
        store.put("sql", lora_files(), Card())  # the same content: a second name of the same file
        store.alias("sql", "prod", 1)
        exported = store.export("sql@1", tmp_path / "out")
    finally:
        os.umask(before)
    found = {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_file()}
    assert found == {mode}
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()} == {0o644 & ~umask}
    inherited = {path.stat().st_mode & stat.S_ISGID for path in root.rglob("*") if path.is_dir()}
    assert inherited == ({stat.S_ISGID} if sys.platform == "linux" else inherited)
    assert_store_sound(root)


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "ä ö",
        "日本語",
        "e\u0301",
        "-rf",
        "a\nb",
        "$(touch pwned)",
        "%s{}",
        "a" * 255,
        "\udcff\udcfe",
        "'\"",
        "~",
        "C:",
    ],
    ids=ascii,
)
def test_s17_a_root_may_have_any_name(tmp_path: Path, name: str) -> None:
    root = tmp_path / "roots" / name
    root.parent.mkdir()
    store = Store(root, fs=Unsynced())
    ref = store.put("sql", lora_files(), Card())
    store.alias("sql", "prod", 1)
    exported = store.export(ref, tmp_path / "out.tar")
    assert store.import_(exported, "again").digest == ref.digest
    assert {entry.name for entry in store.search("sql")} == {"sql"}
    assert_store_sound(root)
    assert [os.fsencode(path) for path in os.listdir(root.parent)] == [os.fsencode(name)]
    said = ahl("list", f"--store={root}")
    assert said.exit_code == 0, said.stderr
    missing = ahl("show", "nothing", f"--store={root}", "--json")
    assert missing.exit_code == 1
    assert all(character.isprintable() or character == "\n" for character in missing.stderr)


def test_s17_a_root_of_256_bytes_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / ("a" * 256), fs=Unsynced())
    for use in (store.names, store.list, lambda: store.put("sql", lora_files(), Card())):
        with pytest.raises(AdapterHubError, match="File name too long"):
            use()


# --- S18: clocks -------------------------------------------------------------------------------------------------


def test_s18_order_is_by_number_when_the_clock_jumps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", fs=Unsynced())
    for number, day in enumerate(("2038-01-19", "2001-01-01", "1970-01-01"), start=1):
        now = f"{day}T00:00:00Z"
        for module in (aliases, publish):
            monkeypatch.setattr(module, "utc_now", lambda now=now: now)
        seconds = time.mktime(time.strptime(day, "%Y-%m-%d"))
        monkeypatch.setattr(time, "time", lambda seconds=seconds: seconds)
        monkeypatch.setattr(time, "time_ns", lambda seconds=seconds: int(seconds * 1e9))
        assert store.put("sql", lora_files(number), Card(created=now)).version == number
        store.alias("sql", "prod", number)
        assert store.resolve("sql").version == number
        assert store.resolve("sql:prod").version == number
        assert Store(tmp_path / "store").resolve("sql:prod").version == number
    assert [move.number for move in store.alias_history("sql", "prod")] == [1, 2, 3]
    assert store.rollback("sql", "prod").version == 2
    assert store.remove("sql@3").version == 3
    assert store.put("sql", lora_files(8), Card()).version == 4
    assert_store_sound(store.path)


# --- S20: leftovers ----------------------------------------------------------------------------------------------


def test_s20_only_what_is_old_is_swept(place: Place) -> None:
    tmp = place.store_path / "tmp"
    day = publish.STALE_SECONDS
    for name, age in (("old", day + 60), ("older", 50 * day), ("young", day - 600), ("future", -day)):
        folder = tmp / f".{name}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / WEIGHTS).write_bytes(b"half")
        os.utime(folder, (time.time() - age, time.time() - age))
        single = tmp / f".{name}-file"
        single.write_bytes(b"half")
        os.utime(single, (time.time() - age, time.time() - age))
    place.store.list()
    place.store.verify()
    assert len(os.listdir(tmp)) == 8  # reading sweeps nothing
    place.store.put("sql", lora_files(5), Card())
    assert sorted(os.listdir(tmp)) == [".future", ".future-file", ".young", ".young-file"]
    place.store.gc(older_than=-2 * day)
    assert os.listdir(tmp) == []
    assert_store_sound(place.store_path)


# --- I15: sources that change ------------------------------------------------------------------------------------


def test_i15_what_is_stored_is_what_was_looked_at(place: Place) -> None:
    """While a folder is imported somebody writes to it: what is stored is sound, whatever of it that is."""
    folder = place.inbox / "changing"
    folder.mkdir()
    variants = [
        files(),
        {**lora_files(3), "run.py": b"x"},
        {CONFIG: lora_files(4)[CONFIG], WEIGHTS: b"\x80\x04garbage"},
    ]
    for name, data in variants[0].items():
        (folder / name).write_bytes(data)
    over = threading.Event()

    def rewrite() -> None:
        number = 0
        while not over.is_set():
            number += 1
            for name, data in variants[number % len(variants)].items():
                if number % 2:  # in place, cut and written again
                    (folder / name).write_bytes(data)
                else:
                    (folder / "new").write_bytes(data)
                    os.replace(folder / "new", folder / name)

    writer = threading.Thread(target=rewrite)
    writer.start()
    stored = refused = 0
    try:
        begin = time.monotonic()
        while time.monotonic() - begin < 0.8 or not stored:
            outcome = perform(Call("", lambda: place.store.import_(folder, "changing")))
            stored, refused = stored + (outcome.error is None), refused + (outcome.error is not None)
            assert time.monotonic() - begin < 60
    finally:
        over.set()
        writer.join()
    assert refused
    known = {lora_files(3)[WEIGHTS], files()[WEIGHTS]}
    for version in place.store.versions("changing"):
        assert place.store.read(f"changing@{version}").weights in known
    assert_store_sound(place.store_path)


def test_limits_of_files_agree() -> None:
    """What a version may hold is what the formats read."""
    from adapterhub_lite.formats import card, peft_config

    assert LIMITS[CONFIG] == peft_config.MAX_BYTES
    assert LIMITS[CARD] == card.MAX_BYTES
