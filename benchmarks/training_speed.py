"""How fast an adapter is trained beside Trainer with PEFT: a chat model, the same in NF4, and a classifier.

First both sides make one epoch in the same order, from the same values: their losses are compared, and that warms up.
Then rounds in turn, the sides beside each other, each an epoch of the same rows with another seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from adapterhub_lite.bases.load import Base, load_base

from .common import synchronise
from .rows import Row, Sample, faster, in_turn, timed
from .training_cases import Case, classify_case, instruct_case
from .training_sides import CANDIDATES, DEFAULTS, Peer, Run, run_ours, run_peer

if TYPE_CHECKING:
    from .training import Sizes

SPEED, LOSS = "speed", "loss"
_ROOF_SIDE = 2048
# Of the mean loss: what float32 in another order of sums makes of it is a tenth of that; dropout is drawn anew by each
# side, and with it the classifier's loss.
BOUND, BOUND_DROPOUT = 0.01, 0.15


@dataclass
class Seen:
    """What is kept for the rows below: the slowest round's share of the cores, and the speeds of ours."""

    busy: list[float] = field(default_factory=list)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0

    def add(self, run: Run) -> Run:
        """Take note of a run."""
        self.busy.append(run.busy)
        return run


def decoder_rows(base: Base, sizes: Sizes, seen: Seen) -> Iterator[Row]:
    """A chat model in its own dtype beside Trainer's defaults and beside its best public settings."""
    case = instruct_case(base, sizes.updates)
    with TemporaryDirectory() as folder:
        start = case.export(Path(folder))
        best = _best(case, start, sizes, seen)
        yield Row(SPEED, "settings of Trainer that were tried", told=best.told)
        peers = [(DEFAULTS, 10.0), (best.peer, 5.0)]
        yield from _beside(_what(case, base.name), case, start, peers, sizes, seen)


def quantized_rows(name: str, sizes: Sizes, seen: Seen) -> Iterator[Row]:
    """The same with the base in NF4, beside Trainer with bitsandbytes."""
    base = load_base(name, "nf4")
    case = instruct_case(base, sizes.updates, quantize="nf4")
    with TemporaryDirectory() as folder:
        peer = replace(DEFAULTS, name="Trainer + bnb")
        what = _what(case, f"{base.name} in NF4")
        yield from _beside(what, case, case.export(Path(folder)), [(peer, 6.0)], sizes, seen)


def encoder_rows(name: str, sizes: Sizes, seen: Seen) -> Iterator[Row]:
    """A classifier beside Trainer's defaults."""
    base = load_base(name)
    case = classify_case(base, sizes.classifier_updates)
    with TemporaryDirectory() as folder:
        start = case.export(Path(folder))
        yield from _beside(_what(case, base.name), case, start, [(DEFAULTS, 3.0)], sizes, seen, BOUND_DROPOUT)


def _what(case: Case, name: str) -> str:
    mean = case.tokens / len(case.examples)
    return f"1,000 tokens of {case.source}, {case.rows} rows an update, {mean:.0f} tokens a row, {name}"


def _beside(
    what: str,
    case: Case,
    start: Path,
    peers: Sequence[tuple[Peer, float]],
    sizes: Sizes,
    seen: Seen,
    bound: float = BOUND,
) -> Iterator[Row]:
    """Losses, then speeds. Samples are seconds of 1,000 real tokens."""
    own = seen.add(run_ours(case))
    for peer, _ in peers:
        yield same_losses(own, seen.add(run_peer(case, replace(peer, same_order=True), start)), peer.name, bound)
    works = {"ours": lambda round_: [seen.add(run_ours(case.seeded(round_))).per_thousand]}
    for peer, _ in peers:
        works[peer.name] = lambda round_, peer=peer: [  # type: ignore[misc]
            seen.add(run_peer(case.seeded(round_), peer, start)).per_thousand
        ]
    found = in_turn(works, sizes.rounds, warmups=0)
    seen.tokens_per_second[case.base.quantization if not case.labels else "encoder"] = 1000 / found["ours"].p50
    for peer, goal in peers:
        yield _with_speeds(faster(SPEED, what, found["ours"], peer.name, found[peer.name], goal))


def _with_speeds(row: Row) -> Row:
    assert row.ours is not None
    assert row.peer is not None
    return replace(row, told=f"{row.told}, {1000 / row.ours.p50:,.0f} / {1000 / row.peer.p50:,.0f} tokens/s")


def same_losses(ours: Run, peer: Run, name: str, bound: float = BOUND) -> Row:
    """Whether both learnt the same: the mean loss of the last half of the same updates, within `bound` of it."""
    own, other = ours.last_half, peer.last_half
    apart = abs(own - other) / max(abs(other), 1e-9)
    half = len(ours.updates) - len(ours.updates) // 2
    told = f"{own:.4f} / {other:.4f}, {apart:.2%} apart"
    same_work = len(ours.updates) == len(peer.updates) and ours.tokens == peer.tokens
    what = f"mean loss of the last {half} of {len(ours.updates)} equal updates, {name}"
    goal = f"within {bound:.0%}, equal tokens"
    return Row(LOSS, what, figure=apart, told=told, goal=goal, met=apart <= bound and same_work)


@dataclass(frozen=True)
class Best:
    """The fastest of the peer's settings, and what each took."""

    peer: Peer
    told: str


def _best(case: Case, start: Path, sizes: Sizes, seen: Seen) -> Best:
    """Two short updates with each candidate, the second timed; one round, since they lie far apart."""
    short = case.first(2 * sizes.tried_rows).trained(batch_size=sizes.tried_rows)
    speeds = {peer: 1000 / seen.add(run_peer(short, peer, start)).per_thousand for peer in CANDIDATES}
    told = ", ".join(f"{peer.name} {speed:.0f}" for peer, speed in speeds.items())
    return Best(max(speeds, key=lambda peer: speeds[peer]), f"{told} tokens/s")


def roof() -> dict[torch.dtype, float]:
    """Operations per second of a large product, by dtype; medians of several in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    works, side = {}, _ROOF_SIDE
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        works[str(dtype)] = _product(a, b)
    found = in_turn(works, 5)
    return {dtype: 2 * side**3 / found[str(dtype)].p50 for dtype in (torch.float32, torch.bfloat16)}


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[int], list[float]]:
    """Seconds of one product."""

    def run() -> None:
        torch.mm(a, b)
        synchronise()

    return lambda round_: [timed(run)]


def roof_rows(base: Base, seen: Seen) -> Iterator[Row]:
    """What share of the matrix products that this machine can do training reached; and what they allow at most."""
    found = roof()
    best = max(found.values())
    told = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {speed / 1e9:,.0f} GFLOP/s" for dtype, speed in found.items()
    )
    yield Row("roof", f"products of {_ROOF_SIDE} x {_ROOF_SIDE} matrices, by torch alone", figure=best, told=told)
    parameters = sum(p.numel() for p in base.model.parameters())
    speed = seen.tokens_per_second["none"]
    reached = 4 * parameters * speed / best
    what = f"share of that, 4 x {parameters / 1e6:.1f}M parameters x {speed:,.0f} tokens/s"
    one = Sample(1000 / speed, 1000 / speed, 1)
    at_roof = Sample(4000 * parameters / best, 4000 * parameters / best, 1)
    told = f"{reached:.2f}; 1,000 tokens at the roof beside it"
    yield Row("roof", what, one, "roof", at_roof, reached, told, ">= 0.25", reached >= 0.25)
