"""Storing: large adapters against `cp` and `sha256sum` of the same files, and many processes on one name."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store

from .rows import Row, faster, in_turn, skip, timed
from .store_make import card_of, clear, tiny_files, write_random

PUT, WRITERS = "put", "writers"
PUT_GOAL = 0.7
_TOOLS = ("cp", "sha256sum", "sync")
_NAME = "shared"
_barrier: Barrier


def puts(folder: Path, sizes: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    """Storing an adapter from files, for each (bytes, rounds); every round has new contents, the same for all."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        yield skip(PUT, "put from files", f"there is no {missing[0]}")
        return
    for size, rounds in sizes:
        yield from _put_rows(folder / str(size), size, rounds)
        clear(folder / str(size))


def _put_rows(folder: Path, size: int, rounds: int) -> Iterator[Row]:
    store = Store(folder / "store")
    store.prepare()
    copy = folder / "copy"
    source = folder / "source"
    made: dict[int, dict[str, Path]] = {}

    def fresh(turn: int) -> dict[str, Path]:
        if turn not in made:
            clear(source)
            made[turn] = write_random(source, size)
        clear(copy)
        os.sync()  # nobody pays for what was written before
        return made[turn]

    def ours(turn: int) -> list[float]:
        files = fresh(turn)
        return [timed(lambda: store.put("random", files, Card()))]

    def peer(durable: bool) -> Callable[[int], list[float]]:
        def work(turn: int) -> list[float]:
            names = [str(copy / name) for name in fresh(turn)]
            return [timed(lambda: _copy(source, copy, names, durable))]

        return work

    found = in_turn({"ours": ours, "cp": peer(False), "cp, sync": peer(True)}, rounds)
    label = f"put of {size >> 20} MB from files" if size >> 20 else f"put of {size >> 10} KB from files"
    yield faster(PUT, f"{label} / cp -r, sha256sum", found["ours"], "cp", found["cp"], PUT_GOAL)
    yield faster(PUT, f"{label} / cp -r, sync of the files, sha256sum", found["ours"], "cp", found["cp, sync"])


def _copy(source: Path, target: Path, files: list[str], durable: bool) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if durable:
        subprocess.run(["sync", *files, str(target), str(target.parent)], check=True)
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


def writers(path: Path, processes: int, each: int) -> Iterator[Row]:
    """Many processes storing versions of one name at once, each durable before the next."""
    context = multiprocessing.get_context("spawn")
    # The barrier gives each process one share of the work, and keeps their start out of the time.
    gate = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_keep, initargs=(gate,)) as pool:
        shares = [share.result() for share in [pool.submit(_write, path, who, each) for who in range(processes)]]
    seconds = max(end for _, end, _ in shares) - min(begin for begin, _, _ in shares)
    told = [number for _, _, numbers in shares for number in numbers]
    problem = missing_or_twice(path, told, processes * each)
    rate = processes * each / seconds
    what = f"{processes} processes x {each} puts on one name"
    goal = f"{processes * each:,} versions, none lost or twice"
    yield Row(WRITERS, what, figure=rate, told=f"{rate:,.0f} puts/s{problem}", goal=goal, met=not problem)


def missing_or_twice(path: Path, told: list[int], count: int) -> str:
    """What is wrong with the versions that the writers were told they made, or ""."""
    store = Store(path)
    numbers = list(range(1, count + 1))
    if sorted(told) != numbers:
        twice = [number for number, times in Counter(told).items() if times > 1]
        return f"; writers were told {len(set(told))} numbers, {len(twice)} of them twice"
    if store.versions(_NAME) != numbers:
        return f"; the store has {len(store.versions(_NAME))} versions"
    contents = {store.card(f"{_NAME}@{number}").seed for number in numbers}
    if contents != set(range(count)):
        return f"; {count - len(contents)} contents are lost"
    wrong = store.verify()
    return f"; {wrong[0]}" if wrong else ""


def _keep(gate: Barrier) -> None:
    global _barrier
    _barrier = gate


def _write(path: Path, who: int, each: int) -> tuple[float, float, list[int]]:
    store, files = Store(path), tiny_files()
    cards = [card_of(number) for number in range(who * each, (who + 1) * each)]
    _barrier.wait(timeout=300)
    begin = time.monotonic()  # one clock for all processes
    numbers = [int(store.put(_NAME, files, card).version or 0) for card in cards]
    return begin, time.monotonic(), numbers
