"""What a store can be asked to do, for every harness that stops it, fails it or cuts its power: worlds to start from,
operations, what a reader then sees, and what must hold of it.

A world is a folder: `store`, `in` with what is imported, and `out` or `out.tar` where something is exported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import StoreCorrupt, StoreError
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Unsynced
from tests.store.first_format import to_first_format

CARD = Card(created="2026-01-31T12:00:00Z")
WEIGHTS = "adapter_model.safetensors"
Step = Callable[[Store], object]
View = dict[str, Any]


# -- worlds --------------------------------------------------------------------------------------------------------


def empty(world: Path) -> None:
    world.mkdir()


def populated(world: Path) -> None:
    """Three versions; `prod` names the first, `live` the third after the first."""
    empty(world)
    store = Store(world / "store", fs=Unsynced())
    for seed in range(3):
        store.put("sql", lora_files(seed), CARD)
    for alias, version in (("prod", 1), ("live", 1), ("live", 3)):
        store.alias("sql", alias, version)


def with_visitors(world: Path) -> None:
    """And what another program and another store have written, to be imported."""
    populated(world)
    plain = world / "in" / "plain"
    plain.mkdir(parents=True)
    for file, data in lora_files(5).items():
        (plain / file).write_bytes(data)
    other = Store(world / "in" / "other", fs=Unsynced())
    ref = other.put("guest", lora_files(6), CARD)
    other.export(ref, world / "in" / "guest")
    other.export(ref, world / "in" / "guest.tar")
    shutil.rmtree(other.path)


def with_leftovers(world: Path) -> None:
    """And a put and a removal that died, and content that no version holds."""
    populated(world)
    store = Store(world / "store", fs=Unsynced())
    store.put("sql", lora_files(7), CARD)
    for at, step in ((9, lambda s: s.put("sql", lora_files(5), CARD)), (8, lambda s: s.remove("sql@4"))):
        with suppress(Crash):
            step(Store(store.path, fs=Failing(at, Crash())))
    digest = hashlib.sha256(b"nobody's").hexdigest()
    blob = store.path / "objects" / digest[:2] / digest
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"nobody's")
    for entry in (store.path / "tmp").iterdir():
        os.utime(entry, (0, 0))


def damaged(world: Path) -> None:
    """And one file that is gone and one that rots, both with a twin under another name."""
    populated(world)
    store = Store(world / "store", fs=Unsynced())
    for seed in (0, 2):
        ref = store.put("twin", lora_files(seed), CARD)
        path = store.folder(ref) / WEIGHTS
        data = path.read_bytes()
        path.unlink()
        if seed:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def of_first_format(world: Path) -> None:
    populated(world)
    to_first_format(world / "store")


# -- operations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """One operation.

    Of several `steps` each is whole. `takes_back`: what fails has published nothing. `spares`: it goes on past what it
    cannot read or remove, which `verify` and the next run find again.
    """

    steps: tuple[Step, ...]
    start: Callable[[Path], None] = populated
    takes_back: bool = False
    spares: bool = False

    def run(self, store: Store) -> None:
        for step in self.steps:
            step(store)


def _act(step: Step, start: Callable[[Path], None] = populated, takes_back: bool = False) -> Act:
    return Act((step,), start, takes_back)


def _beside(store: Store, name: str) -> Path:
    return store.path.parent / name


_REASON = {"metric": "accuracy", "before": 0.5, "after": 0.75}

ACTS: Mapping[str, Act] = {
    "put": _act(lambda store: store.put("sql", lora_files(3), CARD), takes_back=True),
    "put new name": _act(lambda store: store.put("topics", lora_files(3), CARD), takes_back=True),
    "put equal": _act(lambda store: store.put("sql", lora_files(0), CARD), takes_back=True),
    "put first": _act(lambda store: store.put("sql", lora_files(3), CARD), empty, takes_back=True),
    "alias": _act(lambda store: store.alias("sql", "prod", 2)),
    "alias new": _act(lambda store: store.alias("sql", "test", 2)),
    "promote": _act(lambda store: store.alias("sql", "prod", 3, event="promote", reason=_REASON)),
    "refuse": _act(lambda store: store.refuse("sql", "prod", 2, _REASON)),
    "rollback": _act(lambda store: store.rollback("sql", "live")),
    "unalias": _act(lambda store: store.unalias("sql", "prod")),
    "remove": _act(lambda store: store.remove("sql@2")),
    # Taking the alias away and removing the version are two decisions, in this order.
    "remove forced": Act((lambda store: store.unalias("sql", "prod"), lambda store: store.remove("sql@1", force=True))),
    "gc": Act((lambda store: store.gc(),), with_leftovers, spares=True),
    "import folder": _act(
        lambda store: store.import_(_beside(store, "in") / "plain", "new"), with_visitors, takes_back=True
    ),
    "import export": _act(
        lambda store: store.import_(_beside(store, "in") / "guest", "new"), with_visitors, takes_back=True
    ),
    "import tar": _act(
        lambda store: store.import_(_beside(store, "in") / "guest.tar", "sql"), with_visitors, takes_back=True
    ),
    "export folder": _act(lambda store: store.export("sql@1", _beside(store, "out"))),
    "export tar": _act(lambda store: store.export("sql@1", _beside(store, "out.tar"))),
    "migrate": _act(lambda store: store.migrate(), of_first_format),
    "migrate and put": _act(lambda store: store.put("sql", lora_files(3), CARD), of_first_format, takes_back=True),
    "migrate and alias": _act(lambda store: store.alias("sql", "prod", 2), of_first_format),
    "repair": Act((lambda store: store.repair(),), damaged, spares=True),
    "read": _act(lambda store: _reads(store)),
    "verify": _act(lambda store: _verifies(store), damaged),
}

_ANSWERS: dict[str, Any] = {}


def _reads(store: Store) -> None:
    """Ask everything: each answer is right, as the first time in this process, or refused."""
    from tests.stress.doors import answers, wrong

    seen = answers(store, store.path.parent / "told", ("sql@1", "sql:live"))
    if found := wrong(seen, _ANSWERS.setdefault("read", seen)):
        raise AssertionError(f"read wrongly: {found}")


def _verifies(store: Store) -> None:
    """Everything that is wrong is reported, whatever else is."""
    where = {finding.where for finding in store.verify()}
    if not _ANSWERS.setdefault("verify", where) <= where:
        raise AssertionError(f"verify reports {where}")


# -- what is seen, and what must hold ------------------------------------------------------------------------------


def view(world: Path) -> View:
    """Everything that a reader can see, without the time of day; each version's bytes are checked."""
    store = Store(world / "store")
    versions: dict[str, Any] = {}
    rotten: list[str] = []
    for entry in store.list():
        ref = f"{entry.name}@{entry.version}"
        try:
            store.verified_folder(ref)
        except StoreCorrupt:
            rotten.append(ref)
            continue
        card = replace(store.card(ref), created="", origin=_timeless(store.card(ref).origin))
        facts = [store.manifest(ref).files[file].sha256 for file in ("adapter_config.json", WEIGHTS)]
        versions[ref] = (facts, card, sorted(entry.aliases), _timeless(store.received(ref) or {}))
    names = {path.name for folder in ("adapters", "aliases") for path in (store.path / folder).glob("*")}
    moves = {
        f"{name}:{alias}": [(move.number, move.event, move.version) for move in store.alias_history(name, alias)]
        for name in sorted(names)
        for alias in store._catalog.alias_names(name)
    }
    pointing = {name: store.aliases(name) for name in sorted(names)}
    removed = {name: gone for name in sorted(names) if (gone := store._catalog.removed(name))}
    return {
        "versions": versions,
        "rotten": rotten,
        "moves": {alias: told for alias, told in moves.items() if told},
        "pointing": {name: told for name, told in pointing.items() if told},
        "removed": removed,
        "out": _outside(world),
    }


def _timeless(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != "time"}


def _outside(world: Path) -> dict[str, str]:
    files = [file for name in ("out", "out.tar") for file in (world / name, *(world / name).glob("**/*"))]
    return {
        str(file.relative_to(world)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }


def stages(act: Act, world: Path) -> list[View]:
    """What is seen of a world of `act` before its first step and after each."""
    seen = [view(world)]
    for step in act.steps:
        step(Store(world / "store", fs=Unsynced()))
        seen.append(view(world))
    return seen


def stage(seen: View, told: Sequence[View]) -> int:
    """Which stage is seen; -1 if it is none: a mixture. Files heal one by one."""
    for number, one in enumerate(told):
        if seen == one:
            return number
    first, last = told[0], told[-1]
    between = set(last["rotten"]) <= set(seen["rotten"]) <= set(first["rotten"])
    known = all(seen["versions"].get(ref, fact) == fact for ref, fact in last["versions"].items())
    rest = {key: value for key, value in seen.items() if key not in ("versions", "rotten")}
    if first["rotten"] and between and known and rest.items() <= first.items():
        return 0
    return -1


_PLACES = re.compile(
    r"store\.json|adapters/[^/]+/\d+/(adapter_config\.json|adapter_model\.safetensors|card\.json|manifest\.json)"
    r"|adapters/[^/]+/\d+\.removed|aliases/[^/]+/[^/@]+@\d+/move\.json|aliases/[^/]+/[^/@]+\.json"
    r"|objects/[0-9a-f]{2}/[0-9a-f]{64}|tmp/.*"
)


def strays(world: Path) -> list[str]:
    """Files of a store where none belongs; what is unfinished lies in tmp/ alone."""
    store = world / "store"
    files = [str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()]
    return [file for file in files if not _PLACES.fullmatch(file)]


class Scene:
    """An operation and its world, to be copied; what is left of copies is judged, the same only once."""

    def __init__(self, place: Path, name: str, act: Act | None = None) -> None:
        place.mkdir(parents=True)
        self.name, self.act, self._place = name, act or ACTS[name], place
        self.seed, self._made = place / "seed", 0
        self.act.start(self.seed)
        done = self.world()
        self.told = stages(self.act, done)
        self.last = len(self.told) - 1
        self._known: dict[tuple[str, tuple[int, ...] | None], list[str]] = {}

    def world(self) -> Path:
        """A new copy; the one before is gone."""
        shutil.rmtree(self._place / str(self._made), ignore_errors=True)
        self._made += 1
        copy(self.seed, self._place / str(self._made))
        return self._place / str(self._made)

    def problems(self, world: Path, allowed: Sequence[int] | None = None) -> list[str]:
        """As the function."""
        key = (fingerprint(world), tuple(allowed) if allowed is not None else None)
        if key not in self._known:
            self._known[key] = problems(self.act, world, self.told, allowed)
        return self._known[key]

    def done(self, world: Path) -> list[str]:
        """What is wrong after the operation has returned, although something failed in it."""
        return self.problems(world, None if self.act.spares else [self.last])

    def left(self, world: Path) -> list[str]:
        """Temporary entries that were not there before."""
        many = len(_temporary(world)) - len(_temporary(self.seed))
        return [f"{many} temporary entries are left"] if many > 0 else []

    @property
    def states(self) -> int:
        """How many different worlds were judged so far."""
        return len({known for known, _ in self._known})


def _temporary(world: Path) -> list[Path]:
    return [*(world / "store" / "tmp").glob("*"), *world.glob(".*")]


def fingerprint(world: Path) -> str:
    """A digest of all names and bytes; of what lies in tmp/ the random names do not count."""
    told = hashlib.sha256()
    for path in sorted(world.rglob("*")):
        name = re.sub(r"\.[0-9a-f]{32}", ".tmp", str(path.relative_to(world)))
        told.update(repr((name, path.read_bytes() if path.is_file() else None)).encode())
    return told.hexdigest()


def problems(act: Act, world: Path, told: Sequence[View], allowed: Sequence[int] | None = None) -> list[str]:
    """What is wrong with a world in which `act` was stopped; [] if nothing is, and the next calls work.

    `allowed` are the stages that may be seen, by default all.
    """
    try:
        seen = view(world)
        at = stage(seen, told)
        if at < 0:
            return [f"a mixture is seen: {_difference(seen, told)}"]
        if allowed is not None and not any(told[at] == told[one] for one in allowed):
            return [f"stage {at} of {len(told) - 1} is seen instead of {list(allowed)}"]
        if not seen["rotten"]:
            assert_store_sound(world / "store")
        if left := strays(world):
            return [f"files outside tmp/: {left}"]
        return _goes_on(act, world, told, at)
    except AssertionError as error:
        return [f"not sound: {error}"]
    except Exception as error:  # whatever a damaged store raises is what this looks for
        return [f"{type(error).__name__}: {error}"]


def _goes_on(act: Act, world: Path, told: Sequence[View], at: int) -> list[str]:
    """Take up the operation where it stopped, and another one after it."""
    for step in act.steps[at:]:
        step(Store(world / "store", fs=Unsynced()))
    seen = view(world)
    if seen != told[-1]:
        return [f"taken up again it ends in something else: {_difference(seen, told[-1:])}"]
    store = Store(world / "store", fs=Unsynced())
    ref = store.put("sql", lora_files(8), CARD)
    store.alias("sql", "next", ref.version or 0)
    if Store(store.path).resolve("sql:next").digest != ref.digest:
        return ["the next put is not what its alias names"]
    if not seen["rotten"]:
        assert_store_sound(store.path)
    return []


def _difference(seen: View, told: Sequence[View]) -> str:
    last = told[-1]
    return json.dumps({key: [str(seen[key]), str(last[key])] for key in seen if seen[key] != last[key]})[:2000]


# -- folders -------------------------------------------------------------------------------------------------------


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of one's own, in memory where there is one: a sweep makes and removes thousands of files.

    AHL_STRESS_DIR names another place, such as one on the disk that is to be tried.
    """
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 28
    place = os.environ.get("AHL_STRESS_DIR") or (str(memory) if usable else None)
    with tempfile.TemporaryDirectory(prefix="ahl-stress-", dir=place) as made:
        yield Path(made).resolve()


def copy(source: Path, target: Path) -> None:
    """Copy a world with its hard links and times."""
    _copy(source, target, {})


def _copy(source: Path, target: Path, known: dict[int, Path]) -> None:
    target.mkdir()
    for entry in os.scandir(source):
        path, stat = target / entry.name, entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            _copy(Path(entry.path), path, known)
        elif stat.st_ino in known:
            os.link(known[stat.st_ino], path)
        else:
            path.write_bytes(Path(entry.path).read_bytes())
            path.chmod(stat.st_mode)
            known[stat.st_ino] = path
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def failed(error: BaseException) -> str:
    """ "" for an error that a caller may get from a store that could not be written; else what is wrong with it."""
    if not isinstance(error, StoreError):
        return f"{type(error).__name__}: {error}"
    return "" if error.message and error.hint else f"says too little: {error!r}"
