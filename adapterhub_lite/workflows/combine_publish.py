"""A version made of others becomes a stored one: measured where its base is at hand, with its parents in its card."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..adapters.adapter import Adapter
from ..combining.combine import Combined, Layer, Options
from ..errors import Unsupported
from ..events import Note
from ..formats.card import Card
from ..names import Ref
from .combine_base import Ground, with_base
from .combine_data import HeldOut, data_of, held_out, part_name
from .combine_measure import Measured, Proof, prove_made
from .combine_members import Member
from .combine_setting import Setting
from .publish import adapter_summary, libraries

NOT_ASKED = "Measuring was turned off."
"""Why a version that was made with `evaluate=False` is not measured."""
_LARGE = 0.2  # relative error of the whole that a person should know of
_ROUNDING = 1e-7  # relative: factors stored in float32 have no less


@dataclass(frozen=True)
class Making:
    """How a version is made of others.

    Attributes:
        primary: the member whose task it has.
        origin: what its card says of the way.
        seed: of what was drawn, where something was.
        started: when, by `time.perf_counter`.
    """

    name: str
    members: Sequence[Member]
    primary: Member
    origin: dict[str, Any]
    started: float
    seed: int | None = None


@dataclass(frozen=True)
class Made:
    """A version that was made of others.

    Attributes:
        combined: its tensors, with the error of each layer.
        measured: every test set of its parents.
        not_measured: why effect and metrics are not known; "" where they are.
    """

    ref: Ref
    card: Card
    combined: Combined
    measured: tuple[Measured, ...]
    not_measured: str

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return {
            "ref": f"{self.ref.name}@{self.ref.version}",
            "digest": self.ref.digest,
            "parents": list(self.card.parents),
            "origin": {key: value for key, value in self.card.origin.items() if key != "measured"},
            "adapter": self.card.adapter,
            "layers": [asdict(layer) for layer in self.combined.layers],
            "effect": self.card.effect,
            "metrics": self.card.metrics,
            "measured": [one.to_dict() for one in self.measured],
            "not_measured": self.not_measured,
        }


def put_made(combined: Combined, making: Making, ground: Ground, setting: Setting) -> Made:
    """Measure what was made on the base of `ground`, and store it. Without that base it is stored unmeasured.

    Raises:
        NoEffect: it moves no logit.
        AdapterMismatch: it does not fit the base.
    """
    adapter: Adapter = replace(combined.adapter, name=making.name, card=None, digest="")
    if combined.error > _LARGE:
        text = f"What is stored is off by {100 * combined.error:.0f}% of the exact change: it may do something else."
        setting.on_event(Note(text, "warning"))
    members, task = making.members, dict(making.primary.card.task)
    data, proof = data_of(members, making.primary), Proof()
    if setting.evaluate:
        ground = with_base(ground, members, setting.quantize, setting.device, setting.on_event)
    if setting.evaluate and ground.base is not None:
        sets = held_out(members, making.primary)
        proof = prove_made(adapter, sets, task, ground.base, setting)
        proof = _under_plain_names(proof, sets, data, making.primary)
    not_measured = "" if proof.effect else ground.missing if setting.evaluate else NOT_ASKED
    card = Card(
        adapter=adapter_summary(adapter),
        base=ground.facts,
        task=task,
        data=data,
        seed=making.seed,
        libraries=libraries(),
        metrics=proof.metrics,
        effect=proof.effect,
        examples=proof.examples,
        parents=[str(member) for member in members],
        origin={
            **making.origin,
            "members": [{"ref": str(one), "digest": one.ref.digest, "weight": one.weight} for one in members],
            "error": told(combined.error),
            "layers": layers_summary(combined.layers),
            **({"notes": list(combined.notes)} if combined.notes else {}),
            "measured": [one.to_dict() for one in proof.measured],
            **({"not_measured": not_measured} if not_measured else {}),
        },
        duration_seconds=round(time.perf_counter() - making.started, 3),
    )
    ref = setting.store.put(making.name, dict(adapter.files()), card)
    return Made(ref, setting.store.card(ref), combined, proof.measured, not_measured)


def _under_plain_names(proof: Proof, sets: Sequence[HeldOut], data: dict[str, Any], primary: Member) -> Proof:
    """Where parents have test sets of their own, that of `primary` is also the new version's `test`."""
    metrics, examples = dict(proof.metrics), dict(proof.examples)
    for split in ("test", "validation"):
        own = HeldOut(primary, split, split, primary.card.task).identity
        pairs = zip(proof.measured, sets, strict=True)
        same = next((told for told, one in pairs if one.split and one.identity == own and told.made is not None), None)
        if split in data and split not in examples and same is not None and same.made is not None:
            metrics[part_name(split, same.rows, same.of_rows)] = same.made
            examples[split] = examples[same.split]
    return replace(proof, metrics=metrics, examples=examples)


def check_size(rank: int | None, error: float | None) -> None:
    """Raise Unsupported unless at most one of a rank and an error (0..1) is wished for."""
    if rank is not None and error is not None:
        raise Unsupported("A rank and an error are both given; each decides the other.", "Give one of them.")
    Options(rank=rank, error=error).check_size()


def layers_summary(layers: Sequence[Layer]) -> dict[str, Any]:
    """What a card keeps of the layers' ranks and errors."""
    if not layers:
        return {"count": 0}
    ranks = [layer.rank for layer in layers]
    worst = max(layers, key=lambda layer: layer.error)
    return {
        "count": len(layers),
        "rank": {"smallest": min(ranks), "largest": max(ranks), "mean": round(sum(ranks) / len(ranks), 2)},
        "error": {
            "mean": told(math.fsum(layer.error for layer in layers) / len(layers)),
            "largest": told(worst.error),
            "at": worst.module,
        },
    }


def told(error: float) -> float | None:
    """An error as a card says it: what float32 makes of any value is none."""
    return 0.0 if error < _ROUNDING else finite(error)


def finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return float(value) if math.isfinite(value) else None
