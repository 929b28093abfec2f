"""What benchmarks share: samples, rows with a goal, fair turns, the machine. No torch."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("adapterhub-lite", "typer", "peft")
_WHAT, _TIMES, _NAME = 66, 23, 14  # widths of columns
_PEER = _NAME + 1 + _TIMES


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one operation: median, 95th percentile, and of how many."""

    p50: float
    p95: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Sample:
        """The sample of these times."""
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)], len(ordered))

    def per(self, count: int) -> Sample:
        """The same for one of `count` operations that were timed together."""
        return Sample(self.p50 / count, self.p95 / count, self.count)

    def __str__(self) -> str:
        return f"{_time(self.p50):>11} ({_time(self.p95).strip()})"


@dataclass(frozen=True)
class Row:
    """One figure, with the goal beside it where there is one; `skipped` says why there is no figure."""

    part: str
    what: str
    ours: Sample | None = None
    peer_name: str = ""
    peer: Sample | None = None
    figure: float | None = None
    told: str = ""
    goal: str = ""
    met: bool | None = None
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"   {self.what:<{_WHAT}} skipped: {self.skipped}"
        peer = f"{self.peer_name:>{_NAME}} {self.peer}" if self.peer else ""
        verdict = f"  goal {self.goal}" if self.goal else ""
        if self.met is not None:
            verdict += ": met" if self.met else ": MISSED"
        return f"   {self.what:<{_WHAT}} {self.ours or ''!s:<{_TIMES}} {peer:<{_PEER}} {self.told}{verdict}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """As plain data, times in seconds."""
        return asdict(self)


def within(part: str, what: str, ours: Sample, at_most: float | None = None) -> Row:
    """A time of ours; the goal is about its median, in seconds."""
    if at_most is None:
        return Row(part, what, ours, figure=ours.p50)
    goal = f"<= {at_most:g} s" if at_most >= 1 else f"<= {at_most * 1e3:g} ms"
    return Row(part, what, ours, figure=ours.p50, goal=goal, met=ours.p50 <= at_most)


def faster(part: str, what: str, ours: Sample, peer_name: str, peer: Sample, at_least: float | None = None) -> Row:
    """How many times faster ours is than the peer."""
    ratio = peer.p50 / ours.p50
    goal = "" if at_least is None else f">= {at_least:g} x"
    met = None if at_least is None else ratio >= at_least
    return Row(part, what, ours, peer_name, peer, ratio, f"{ratio:,.2f} x as fast", goal, met)


def slower(part: str, what: str, ours: Sample, peer_name: str, peer: Sample, at_most: float | None = None) -> Row:
    """How many times the peer's time ours takes. The peer may be ours with less to do."""
    ratio = ours.p50 / peer.p50
    goal = "" if at_most is None else f"<= {at_most:g} x"
    met = None if at_most is None else ratio <= at_most
    return Row(part, what, ours, peer_name, peer, ratio, f"{ratio:,.2f} x the time", goal, met)


def share(part: str, what: str, ours: Sample, peer_name: str, peer: Sample, fraction: float, at_least: float) -> Row:
    """A fraction of what is possible, made of two times of ours."""
    goal = f">= {at_least:g}"
    return Row(part, what, ours, peer_name, peer, fraction, f"{fraction:.2f}", goal, fraction >= at_least)


def skip(part: str, what: str, why: str) -> Row:
    """A figure that was not taken."""
    return Row(part, what, skipped=why)


def in_turn(works: dict[str, Callable[[int], list[float]]], rounds: int, warmups: int = 1) -> dict[str, Sample]:
    """Samples of each work, which gets the round's number and returns seconds; every round runs all, in an order that
    turns. A work that returns nothing in any round is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for round_ in range(-warmups, rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            found = works[name](round_)
            if round_ >= 0:
                seconds[name] += found
    return {name: Sample.of(found) for name, found in seconds.items() if found}


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def times(work: Callable[[Any], object], items: Iterable[Any]) -> list[float]:
    """Seconds of one call an item."""
    found = []
    for item in items:
        begun = time.perf_counter()
        work(item)
        found.append(time.perf_counter() - begun)
    return found


def chosen(items: Sequence[str], count: int, seed: int) -> list[str]:
    """Different items in a random order; the same for the same seed."""
    return random.Random(seed).sample(items, min(count, len(items)))


def settle(seconds: float) -> None:
    """Let what was written reach the disk, and folders be older than what a store takes for just changed."""
    os.sync()
    time.sleep(seconds)


def machine(folder: Path) -> dict[str, str]:
    """Where and with what the figures are taken."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "file system": _file_system(folder),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    """The type of the file system that `folder` is on: fsync means little on one in memory."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    inside = [(len(fields[1]), fields[2]) for fields in mounts if folder.resolve().is_relative_to(fields[1])]
    return max(inside, default=(0, "unknown"))[1]


def _time(seconds: float) -> str:
    for scale, unit in ((1.0, "s "), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"
