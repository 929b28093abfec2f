"""What a run will take and how it is computed, known before its first step; arithmetic on what dry steps took."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...bases.devices import Choice
from ...errors import Unsupported
from ...recipe.training import AUTO, TrainingConfig
from ..computation import Settings
from .calibrate import Calibration
from .costs import Costs, fit_costs
from .loads import Stride

# Packs of more tokens make products no faster there (a CPU), or memory small and launches few (a GPU).
PACK_TOKENS = {"cpu": 1024, "cuda": 8192}
_LEAST_PACK = 64
# Shares of a step's time that a setup takes more than the fastest (docs/decisions.md); only their order decides.
_TWICE, _GATES, _AWAY, _TABLE = 0.33, 0.17, 0.05, 0.01
# What each pack costs, as tokens that could be computed meanwhile: products are short, and weights that have no dense
# copy are dequantised in it.
_PACK_COSTS = 30
_DEQUANTISED = {"cpu": 160, "cuda": 120}
# Writing a checkpoint lays all tensors into one file's bytes, by way of a copy of each (safetensors.torch.save).
_WRITING = 2
_DISK = 2.0e8  # bytes a second that a checkpoint is written and synced with, taken low
# What is free now may be taken by others; files, libraries and the allocator take some as well.
_SHARE_OF_ROOM = 0.95
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 10**3, "M": 10**6, "G": 10**9,
          "T": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]{0,3})", re.ASCII)


@dataclass(frozen=True)
class Setup:
    """How a run is computed; none of it changes what is learnt. The fields are those of a recipe's training part."""

    pack_tokens: int
    checkpointing: bool = False
    working_copies: bool = False
    recompute_mlp: bool = False
    offload: bool = False
    table_on_host: bool = False

    @property
    def settings(self) -> Settings:
        """As a computation takes it."""
        return Settings(
            self.pack_tokens,
            self.checkpointing,
            offload=self.offload,
            recompute_mlp=self.recompute_mlp,
            table_on_host=self.table_on_host,
        )

    def lost(self, device: str, dequantises: bool) -> float:
        """The share of time that it takes more than the fastest, roughly.

        Args:
            dequantises: whether weights without a working copy are dequantised in each pack.
        """
        pack = _PACK_COSTS + (_DEQUANTISED.get(device, 0) if dequantises and not self.working_copies else 0)
        passes = 2 + (1 if self.checkpointing else 0.5 if self.recompute_mlp else 0)
        again = _TWICE if self.checkpointing else _GATES if self.recompute_mlp else 0.0
        return again + _AWAY * self.offload + _TABLE * self.table_on_host + pack * passes / 2 / self.pack_tokens


FIELDS = tuple(field.name for field in fields(Setup))
"""A setup's fields, in the order in which they are told."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the process, or of the device.

    Attributes:
        base: the process with the base loaded.
        adapters: parameters, gradients, moments, and the best parameters where they are kept.
        work: the most that computing takes beside these.
        writing: the most that writing a checkpoint takes beside what is held then.
        peak: the most at once, of all of it.
        available: bytes that there are beyond `base`.
        on_host: of a device's run, taken from the host's memory; of which `host_room` are there.
    """

    base: int
    adapters: int
    work: int
    writing: int
    peak: int
    available: int
    on_host: int = 0
    host_room: int = 0

    @property
    def above(self) -> int:
        """The peak beyond the loaded base."""
        return self.peak - self.base


@dataclass(frozen=True)
class Time:
    """Seconds: all, of them evaluating and writing checkpoints. With early stopping it is the most there may be."""

    total: float
    evaluating: float
    writing: float


@dataclass(frozen=True)
class Learning:
    """One recipe of a plan: what is learnt, which no setting changes."""

    name: str
    adapter: str
    rows: int
    steps: int
    batch_size: int
    gradient_accumulation: int
    trained: int
    max_length: int
    longest: int


@dataclass(frozen=True)
class Plan:
    """A run before its first step.

    Attributes:
        choices: what was chosen, each with the reason.
        tokens: of all steps, without padding; `computed` with what padding adds and shared beginnings save.
        packs: of all steps.
        time: None where a run is too small to be worth dry steps; so is `memory`.
        overrides: the setup as overrides of a recipe.
    """

    base: str
    learnings: tuple[Learning, ...]
    setup: Setup
    choices: dict[str, Choice]
    steps: int
    tokens: int
    computed: int
    packs: int
    memory: Memory
    time: Time | None
    fit: int | None = None

    @property
    def overrides(self) -> list[str]:
        """As `ahl train -o` takes them."""
        return [f"training.{name}={_word(value)}" for name, value in self.chosen.items()]

    @property
    def chosen(self) -> dict[str, int | bool]:
        """Fields of a recipe's training part, with what was chosen; those that there was a choice of."""
        return {name: getattr(self.setup, name) for name in FIELDS if name in self.choices}

    @property
    def tokens_per_second(self) -> float | None:
        """While learning, without evaluation and checkpoints."""
        if self.time is None:
            return None
        return self.tokens / max(self.time.total - self.time.evaluating - self.time.writing, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """As plain data: bytes and seconds."""
        told = asdict(self)
        told["memory"]["above"] = self.memory.above
        told["overrides"] = self.overrides
        told["tokens_per_second"] = self.tokens_per_second
        return told


def _word(value: int | bool) -> str:
    return str(value).lower()


def parse_size(text: str | int) -> int:
    """Bytes of `8GB`, `512 MiB`, `1.5G`.

    Raises:
        Unsupported: it is no size.
    """
    if isinstance(text, int):
        count: float = text
    else:
        match = _SIZE.fullmatch(text.strip())
        unit = _UNITS.get(match[2].upper()) if match else None
        count = 0 if match is None or unit is None else float(match[1]) * unit
    if count < 1:
        raise Unsupported(f"{text!r} is not a size.", "Write it as 8GB, 512MB or 6.5GiB.")
    return int(count)


def ladder(
    configs: Sequence[TrainingConfig],
    longest: int,
    copies: bool,
    device: str,
    may_drop: bool = True,
    heeds: frozenset[str] = frozenset(),
    dequantises: bool = False,
) -> list[Setup]:
    """Setups to try, those that lose most time last; what a recipe fixes is the same in all.

    Args:
        longest: tokens of the longest row, below which smaller packs save nothing.
        copies: whether there are working copies; `may_drop`: which can be done without.
        heeds: the settings that change something, see `computation.heeded`.
        dequantises: see `Setup.lost`.
    """
    fixed = [c.pack_tokens for c in configs if isinstance(c.pack_tokens, int)]
    sizes = [min(fixed)] if fixed else _sizes(PACK_TOKENS.get(device, PACK_TOKENS["cpu"]), longest)
    wanted = {c.working_copies for c in configs if c.working_copies != AUTO}
    kept = [copies]
    if copies and may_drop and wanted != {True}:
        kept = [False] if wanted else [True, False]

    def flags(name: str) -> list[bool]:
        """Of recipes trained together the one that saves memory is heard."""
        told = {value for config in configs if (value := getattr(config, name)) != AUTO}
        if name != "checkpointing" and name not in heeds:
            return [False]
        return [True in told] if told else [False, True]

    gates, tables, away = flags("recompute_mlp"), flags("table_on_host"), flags("offload")
    again = [True] if away == [True] else flags("checkpointing")
    made = [
        Setup(size, twice, keeps, gate, off, table)
        for size in sizes for table in tables for keeps in kept for twice in again
        for gate in ([False] if twice else gates) for off in (away if twice else [False])
        # Copies are a luxury where layers are computed twice for want of memory.
        if not (twice and keeps and len(again) > 1 and len(kept) > 1)
    ]  # fmt: skip
    return sorted(made, key=lambda setup: setup.lost(device, dequantises))


def _sizes(first: int, longest: int) -> list[int]:
    """Halves, down to the longest row."""
    sizes = [first]
    while sizes[-1] // 2 >= max(longest, _LEAST_PACK):
        sizes.append(sizes[-1] // 2)
    return sizes


def memory_of(found: Calibration) -> Memory:
    """What dry steps took, and what comes later: the best parameters, and a checkpoint's bytes."""
    kept = found.after + found.best
    # Parameters, moments and the best ones go into the file; gradients do not.
    writing = _WRITING * (3 * found.state + found.best)
    peak = max(found.peak + found.best, kept + writing)
    adapters = 4 * found.state + found.best
    work = found.peak - (found.base - found.table) - 4 * found.state
    return Memory(found.base, adapters, max(work, 0), writing, peak, found.available, found.on_host, found.host_room)


def time_of(found: Calibration, configs: Sequence[TrainingConfig]) -> Time | None:
    """Seconds of the run, from the packs of its own rows."""
    if not found.samples:
        return None
    costs = costs_of(found)
    learning = _seconds(found.work.strides, costs[0]) + found.work.updates * found.update
    evaluating = _seconds(found.work.evaluations, costs[1])
    whole = learning + evaluating
    writing = (3 * found.state + found.best) / _DISK * _checkpoints(found, configs, whole)
    return Time(whole + writing, evaluating, writing)


def costs_of(found: Calibration) -> tuple[Costs, Costs]:
    """Of packs with gradients, and without."""
    costs = fit_costs([(sample.load, sample.seconds) for sample in found.samples])
    if not found.without:
        return costs, costs
    # Few are timed without gradients: as much of all costs as these took.
    expected = sum(costs.seconds(sample.load) for sample in found.without)
    share = sum(sample.seconds for sample in found.without) / max(expected, 1e-12)
    return costs, Costs(costs.pack * share, costs.token * share, costs.square * share, costs.supervised * share)


def _seconds(strides: Sequence[Stride], costs: Costs) -> float:
    return sum(stride.weight * sum(costs.seconds(load) for load in stride.packs) for stride in strides)


def _checkpoints(found: Calibration, configs: Sequence[TrainingConfig], seconds: float) -> float:
    """How many are written: by steps, by time, and at each evaluation and the end."""
    steps = min((c.checkpoint_steps for c in configs if c.checkpoint_steps), default=None)
    period = min((c.checkpoint_seconds for c in configs if c.checkpoint_seconds), default=None)
    if not any(c.checkpoints for c in configs):
        return 0
    times = max((stride.weight for stride in found.work.evaluations), default=0) or 1
    return times + (found.work.steps // steps if steps else 0) + (seconds // period if period else 0)


def fits(memory: Memory, limit: int | None = None) -> bool:
    """Whether there is room for the peak, and it is within `limit`; and room on the host for what goes there."""
    there = memory.above <= _SHARE_OF_ROOM * memory.available and memory.on_host <= _SHARE_OF_ROOM * memory.host_room
    return there and (limit is None or memory.peak <= limit)


def bytes_text(count: float) -> str:
    """For people: 950 kB, 1.94 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.2f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{count:.0f} B"
