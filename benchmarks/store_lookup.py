"""Looking adapters up by name and listing them: against PEFT folders and MLflow's registry, and as a store grows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from adapterhub_lite.store import Store

from .rows import Row, Sample, chosen, faster, in_turn, skip, slower, timed, times, within
from .store_make import CONFIG, Unsynced, card_of, name_of, tiny_files
from .store_mlflow import Registry

LOOKUP, GROWTH, LISTING = "lookup", "growth", "list"
LOOKUP_SECONDS, LIST_SECONDS = 0.0002, 1.0
SCAN_GOAL, MLFLOW_GOAL, GROWTH_GOAL = 200.0, 100.0, 1.5
SEARCH = "search_registered_models"  # by name, as its users do
_ROUNDS = 10
_OURS, _SCANS, _CALLS = 200, 2, 20  # lookups in a round
_LIST_ROUNDS = 3
_PUTS, _PUT_ROUNDS = 5, 5  # few: the small name must stay small
_Work = Callable[[int], list[float]]


def lookups(path: Path, folders: Path, count: int, registry: Registry | None) -> Iterator[Row]:
    """Finding one of `count` names: ours, among PEFT folders, and in MLflow's registry of as many models."""
    names = [name_of(number) for number in range(count)]
    store, warm = Store(path), Store(path)
    again = chosen(names, _OURS, seed=-1)
    _check_alike(path, folders, names)
    works: dict[str, _Work] = {
        "one": lambda turn: times(store.resolve, chosen(names, _OURS, turn)),
        "seen": lambda turn: times(warm.resolve, again),
        "new": lambda turn: times(lambda name: Store(path).resolve(name), chosen(names, _OURS, turn)),
        "scan": lambda turn: times(lambda name: scan(folders, name), chosen(names, _SCANS, turn)),
        "open": lambda turn: times(lambda run: _config(folders / run), chosen(os.listdir(folders), _OURS, turn)),
        **{call: _asking(registry, call, names) for call in (registry.calls if registry else ())},
    }
    found = in_turn(works, _ROUNDS)
    yield within(LOOKUP, f"resolve(name), {count:,} names, one Store", found["one"], LOOKUP_SECONDS)
    yield within(LOOKUP, f"resolve(name), {count:,} names, a new Store each time", found["new"], LOOKUP_SECONDS)
    yield within(LOOKUP, f"resolve(name), {count:,} names, one Store, names it has seen", found["seen"])
    what = "new Store / reading PEFT folders until the name is found"
    yield faster(LOOKUP, what, found["new"], "scan", found["scan"], SCAN_GOAL)
    what = "new Store / opening a folder whose path is known"
    yield faster(LOOKUP, what, found["new"], "open", found["open"])
    yield from _mlflow_rows(found, registry)


def scan(folders: Path, name: str) -> Path:
    """The PEFT folder whose configuration has this name, as it is found where nothing keeps an index."""
    with os.scandir(folders) as entries:
        for entry in entries:
            if _config(Path(entry.path)).get("name") == name:
                return Path(entry.path)
    raise LookupError(name)


def growth(few: Path, many: Path, counts: tuple[int, int]) -> Iterator[Row]:
    """Looking a name up in a small and in a large store."""
    paths = dict(zip(counts, (few, many), strict=True))
    names = {count: [name_of(number) for number in range(count)] for count in counts}
    warm = {count: Store(path) for count, path in paths.items()}
    again = {count: chosen(names[count], _OURS, seed=-1) for count in counts}

    def new(count: int) -> _Work:
        return lambda turn: times(lambda name: Store(paths[count]).resolve(name), chosen(names[count], _OURS, turn))

    def unseen(count: int) -> _Work:
        return lambda turn: times(Store(paths[count]).resolve, chosen(names[count], _OURS, turn))

    def seen(count: int) -> _Work:
        return lambda turn: times(warm[count].resolve, again[count])

    for what, work in (
        ("a new Store each time", new),
        ("one Store, names it has not seen", unseen),
        ("one Store, names it has seen", seen),
    ):
        found = in_turn({str(count): work(count) for count in counts}, _ROUNDS)
        yield _grown(f"resolve(name), {what}", found, counts, "names", GROWTH_GOAL)


def version_growth(few: Path, many: Path, name: str, counts: tuple[int, int]) -> Iterator[Row]:
    """Looking up and storing versions of one name that has few or many."""
    paths = dict(zip(counts, (few, many), strict=True))
    warm = {count: Store(path) for count, path in paths.items()}
    refs = {count: [f"{name}@{number + 1}" for number in range(count)] for count in counts}

    def newest(count: int) -> _Work:
        return lambda turn: times(lambda _: Store(paths[count]).resolve(name), range(20))

    def numbered(count: int) -> _Work:
        return lambda turn: times(lambda ref: Store(paths[count]).resolve(ref), chosen(refs[count], 20, turn))

    def seen(count: int) -> _Work:
        return lambda turn: times(warm[count].resolve, [name] * _OURS)

    for what, work in (
        ("resolve(name), a new Store each time", newest),
        ("resolve(name@N), a new Store each time", numbered),
        ("resolve(name), one Store", seen),
    ):
        yield _grown(what, in_turn({str(count): work(count) for count in counts}, _ROUNDS), counts, "versions")
    for what, durable in (("put of a version", True), ("put of a version, without waiting for the disk", False)):
        storing: dict[str, _Work] = {str(count): _putting(paths[count], name, durable) for count in counts}
        yield _grown(what, in_turn(storing, _PUT_ROUNDS), counts, "versions")


def listings(path: Path, count: int, at_most: float | None) -> Iterator[Row]:
    """`list` of a whole store: the first one ever, later ones, and after something was stored."""

    def listed() -> None:
        if len(Store(path).list()) < count:
            raise RuntimeError(f"list has not all {count} adapters")

    first = Sample.of([timed(listed)])
    later = Sample.of([timed(listed) for _ in range(_LIST_ROUNDS)])
    changed = []
    for number in range(_LIST_ROUNDS):
        Store(path, fs=Unsynced()).put(name_of(0), tiny_files(), card_of(count + number))
        changed.append(timed(listed))
    yield within(LISTING, f"list(), {count:,} names, the first since they were stored", first, at_most)
    yield within(LISTING, f"list(), {count:,} names, again, a new Store each time", later, at_most)
    yield within(LISTING, f"list(), {count:,} names, after a put", Sample.of(changed), at_most)


def _config(folder: Path) -> dict[str, object]:
    with open(folder / CONFIG, "rb") as file:
        found: dict[str, object] = json.load(file)
    return found


def _check_alike(path: Path, folders: Path, names: list[str]) -> None:
    """Both find the same adapter, so that both do the work that is timed."""
    for name in (names[0], names[-1]):
        told = Store(path).resolve(name)
        if (told.name, told.version) != (name, 1) or _config(scan(folders, name))["name"] != name:
            raise RuntimeError(f"{name} was not found")


def _asking(registry: Registry | None, call: str, names: list[str]) -> _Work:
    def ask(turn: int) -> list[float]:
        return registry.ask(call, chosen(names, _CALLS, turn)) if registry else []

    return ask


def _mlflow_rows(found: dict[str, Sample], registry: Registry | None) -> Iterator[Row]:
    if registry is None:
        yield skip(LOOKUP, "one Store / MLflow's registry on SQLite", "run with --with-mlflow")
        return
    best = min(registry.calls, key=lambda call: found[call].p50)
    for call in registry.calls:
        goal = MLFLOW_GOAL if call in (best, SEARCH) else None
        yield faster(LOOKUP, f"one Store / MLflow {call}", found["one"], "mlflow", found[call], goal)
    yield faster(LOOKUP, f"one Store, names it has seen / MLflow {best}", found["seen"], "mlflow", found[best])


def _putting(path: Path, name: str, durable: bool) -> _Work:
    store = Store(path) if durable else Store(path, fs=Unsynced())
    files = tiny_files()

    def put(turn: int) -> list[float]:
        cards = [card_of((turn + 2) * 100_000_000 + number * 2 + durable) for number in range(_PUTS)]
        return times(lambda card: store.put(name, files, card), cards)

    return put


def _grown(what: str, found: dict[str, Sample], counts: tuple[int, int], of: str, at_most: float | None = None) -> Row:
    small, large = counts
    label = f"{what}: {large:,} {of}"
    return slower(GROWTH, label, found[str(large)], f"at {small:,}", found[str(small)], at_most)
