"""Dry steps: gradients of real rows by the real computation, to see what they take. Nothing is learnt of them.

They are made with learners of their own, thrown away afterwards: the parameters of the run to come, its generators and
the base are as they were. The update is made too, at rate 0, so that its moments are in memory and in time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from ...bases.load import Base
from ...bases.quantization import dense_weight
from ...bases.quiet import quiet
from ..computation import Computation, Load, Row, Settings, heeded, make_computation
from ..frozen import unchanged
from ..member import Member
from ..memory.offload import settled
from ..precision import choose_precision, products_in
from ..train import Assignment, new_members
from .loads import Stride, Work, work_of
from .room import Peak, held, room, settle

_HOST = torch.device("cpu")
# A larger pack is tried only if this many times what smaller ones took, drawn on, is there.
CAREFUL = 1.25


class TooLarge(Exception):
    """A pack would not fit; `bytes` is what the process would hold, drawn on from smaller packs, `base` what it held
    before, and `limit` what it may hold.
    """

    def __init__(self, count: int, base: int = 0, limit: int = 0) -> None:
        super().__init__(count, base, limit)
        self.bytes, self.base, self.limit = count, base, limit


@dataclass(frozen=True)
class Sample:
    """Seconds that a pack took."""

    load: Load
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What dry steps took. Bytes are those of the process, or of the device.

    Attributes:
        computation: its name and why it is this one.
        base: held before there was anything to train; with all weights read.
        peak: the most, with gradients and moments.
        after: still held when nothing is computed.
        state: parameters of all learners; there are gradients and two moments of the same size.
        best: parameters of the best step, where they are kept.
        samples: with gradients; `without` the same packs, or those of the validation part, without.
        update: seconds of one update of one learner.
        available: bytes that there were beyond `base`.
        trained: how many parameters each learner has.
        padded: whether rows are made as long as the longest beside them.
        table: of the base that were in the host's memory while packs were computed.
        on_host: taken from the host's memory for a device, `table` among them; `host_room` what there was of it.
    """

    computation: tuple[str, str]
    base: int
    peak: int
    after: int
    state: int
    best: int
    samples: tuple[Sample, ...]
    without: tuple[Sample, ...]
    update: float
    available: int
    work: Work
    trained: tuple[int, ...]
    padded: bool = False
    table: int = 0
    on_host: int = 0
    host_room: int = 0


def calibrate(
    assignments: Sequence[Assignment],
    base: Base,
    settings: Settings,
    limit: int | None = None,
    repeats: int = 2,
    bare: int | None = None,
) -> Calibration:
    """Make dry steps with packs of several sizes, the largest and longest of the run among them.

    Args:
        limit: bytes that may be held at most, beside what there is.
        repeats: how often each pack is timed; 0 times none.
        bare: bytes held with the base loaded, where that is known from an earlier call.

    Raises:
        TooLarge: the largest pack would not fit.
    """
    try:
        return _calibrated(assignments, base, settings, limit, repeats, bare)
    except torch.OutOfMemoryError as error:
        raise TooLarge(held(base.device) + room(base.device)) from error


def _calibrated(
    assignments: Sequence[Assignment], base: Base, settings: Settings, limit: int | None, repeats: int, bare: int | None
) -> Calibration:
    device = base.device
    precision = choose_precision([one.recipe.training.precision for one in assignments], device, base.dtype)
    with (
        base.training(),
        torch.random.fork_rng(),
        quiet(),
        unchanged(base.model),
        products_in(precision.name),
        ExitStack() as stack,
    ):
        read_weights(base)
        settle(device)
        before, there = held(device), room(device)
        host = room(_HOST) if device.type == "cuda" else 0
        bare = before if bare is None else bare
        peaks = Peaks(device, before + there if limit is None else min(before + there, limit), bare)
        with peaks.seen():
            learners, members = new_members(assignments, base)
            computation = make_computation(base, learners, settings)
        table = stack.enter_context(settled(base, learners, computation, settings))
        work = work_of(computation, members)
        dry = _Dry(computation, members, peaks)
        packs = probes(work.strides)
        for rows, load in packs:
            dry.grow(rows, load)
        update = dry.update()
        if peaks.most > peaks.limit:
            raise peaks.too_large(peaks.most)
        seen = [dry.timed(rows, load, repeats) for rows, load in packs] if repeats else []
        validation = probes(work.evaluations)[-2:]
        without = [dry.timed(rows, load, max(repeats, 1), True) for rows, load in validation]
        after = held(device)  # with what the allocator keeps for reuse: a run does not give it back either
        on_host = table + computation.on_host
        with peaks.seen():
            stack.close()  # what was moved comes back beside parameters and moments
        trained = tuple(sum(p.numel() for p in learner.parameters()) for learner in learners)
        sizes = [(member.optimizer.values.nbytes, member.keeps_best) for member in members]
        return Calibration(
            (computation.name, computation.why), bare, max(peaks.most, after), after,
            sum(size for size, _ in sizes), sum(size for size, best in sizes if best),
            tuple(seen), tuple(without), update, before + there - bare, work, trained, computation.padded,
            table, on_host, host,
        )  # fmt: skip


def heeded_by(assignments: Sequence[Assignment], base: Base) -> frozenset[str]:
    """Which settings that save memory change something for these, see `computation.heeded`."""
    try:
        with base.training(), torch.random.fork_rng(), quiet():
            learners, _ = new_members(assignments, base)
            return heeded(base, learners)
    except torch.OutOfMemoryError:  # not even the adapters fit
        return frozenset()


def probes(strides: Sequence[Stride]) -> list[tuple[list[Row], Load]]:
    """Packs from the smallest to those with most tokens, longest rows, most losses; each with its rows."""
    packs = [(stride, load) for stride in strides for load in stride.packs]
    if not packs:
        return []
    packs.sort(key=lambda one: (one[1].tokens, one[1].squares, one[1].supervised))
    last = len(packs) - 1
    chosen = {0, last // 3, 2 * last // 3, last}
    chosen.add(max(range(len(packs)), key=lambda i: packs[i][1].squares))
    chosen.add(max(range(len(packs)), key=lambda i: packs[i][1].supervised))
    return [([stride.rows[i] for i in load.rows], load) for stride, load in (packs[i] for i in sorted(chosen))]


class Peaks:
    """The most bytes held in all looks so far."""

    def __init__(self, device: torch.device, limit: int, bare: int = 0) -> None:
        self._device, self.limit, self._bare = device, limit, bare
        self.most = 0
        self._points: list[tuple[int, int]] = []

    @contextmanager
    def seen(self, tokens: int = 0) -> Iterator[None]:
        """Look at what happens within the block."""
        with Peak(self._device) as peak:
            yield
        self.most = max(self.most, peak.bytes)
        self._points.append((tokens, peak.bytes))

    def check(self, tokens: int) -> None:
        """Raise TooLarge if a pack of so many tokens would, as the smaller ones go, be beyond the limit."""
        expected = drawn_on(self._points, tokens)
        if expected > self.limit:
            raise self.too_large(expected)

    def too_large(self, count: int) -> TooLarge:
        """So many bytes are beyond the limit."""
        return TooLarge(count, self._bare, self.limit)


def drawn_on(points: Sequence[tuple[int, int]], tokens: int) -> int:
    """Bytes at so many tokens, by the steepest line from the first of the (tokens, bytes) through another."""
    if not points:
        return 0
    first, most = points[0], max(count for _, count in points)
    slopes = [(count - first[1]) / (at - first[0]) for at, count in points if at > first[0]]
    if not slopes or tokens <= max(at for at, _ in points):
        return most
    return max(most, round(first[1] + CAREFUL * max(slopes) * (tokens - first[0])))


class _Dry:
    """Computes packs, and takes no step but those that change nothing."""

    def __init__(self, computation: Computation, members: Sequence[Member], peaks: Peaks) -> None:
        self._computation, self._members, self._peaks = computation, members, peaks

    def grow(self, rows: Sequence[Row], load: Load) -> None:
        """Compute a pack that may be larger than those before."""
        self._peaks.check(load.tokens)
        with self._peaks.seen(load.tokens):
            self._compute(rows, False)

    def timed(self, rows: Sequence[Row], load: Load, repeats: int, validation: bool = False) -> Sample:
        """The median of so many."""
        found = []
        for _ in range(repeats):
            with self._peaks.seen():
                begun = time.perf_counter()
                self._compute(rows, validation)
                found.append(time.perf_counter() - begun)
        return Sample(load, statistics.median(found))

    def update(self) -> float:
        """Make the moments; returns the seconds of a learner's clearing, clipping and update."""
        seconds = []
        with self._peaks.seen():
            for _ in range(2):  # the first makes the moments
                begun = time.perf_counter()
                for member in self._members:
                    optimizer = member.optimizer
                    norm = optimizer.mean(1)
                    if not math.isfinite(norm):
                        optimizer.gradients.zero_()  # 0 times infinity would not be 0
                    optimizer.step(0.0, norm if math.isfinite(norm) else 0.0, member.config.max_grad_norm)
                    optimizer.clear()
                _wait(self._members[0].optimizer.values.device)
                seconds.append(time.perf_counter() - begun)
        return seconds[-1] / len(self._members)

    def _compute(self, rows: Sequence[Row], validation: bool) -> None:
        keyed = [replace(row, key=place) for place, row in enumerate(rows)]
        if validation:
            self._computation.losses(keyed)
        else:
            self._computation.gradients(keyed)
        _wait(self._members[0].optimizer.values.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_weights(base: Base) -> None:
    """Have all weights in memory: they may be mapped from disk, and would count as what training takes."""
    if base.device.type == "cpu":
        for tensor in [*base.model.parameters(), *base.model.buffers()]:
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            flat[::4096].sum()


@contextmanager
def copies_dropped(base: Base, wanted: Callable[[], bool]) -> Iterator[None]:
    """Within the block a quantised base on a CPU has no working copies; made again after it, unless `wanted` says
    no.
    """
    modules = drop_copies(base)
    try:
        yield
    finally:
        for module in modules if wanted() else ():
            module._ahl_copy = dense_weight(module, module._ahl_dtype)  # type: ignore[arg-type,assignment]


def drop_copies(base: Base) -> list[torch.nn.Module]:
    """Let the working copies of a base go; returns the layers that had one."""
    modules = [m for m in base.model.modules() if getattr(m, "_ahl_copy", None) is not None]
    for module in modules:
        module._ahl_copy = None  # type: ignore[assignment]
    return modules
