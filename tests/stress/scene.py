"""What a reader sees of a world, what must hold of it, and scenes: an operation with its world, to be tried often."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import StoreCorrupt, StoreError
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced
from tests.stress.acts import ACTS, CARD, WEIGHTS, Act

View = dict[str, Any]


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
