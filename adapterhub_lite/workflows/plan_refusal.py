"""Why no setup of a plan fits, what the least of them takes, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..bases.load import Base
from ..bases.quantization import bytes_of_weights
from ..errors import CapacityError
from ..recipe import LoraAdapter
from ..training.memory.offload import movable_table
from ..training.planning.plan import bytes_text
from ..training.planning.room import held, room
from ..training.train import Assignment
from .plan_told import Tried, copies_there, longest_row, shown

_MARGIN = 1.02  # a measured peak varies a little from time to time
_SMALLER = {"none": "nf4", "int8": "nf4", "nf4": "nf4-double"}
_GATES = 0.4  # of what computing takes is what `recompute_mlp` saves


def refusal(
    assignments: Sequence[Assignment], base: Base, tried: Sequence[Tried], fit: int | None, heeds: frozenset[str]
) -> CapacityError:
    """Why nothing fits, and what to change."""
    measured = [one for one in tried if one.memory is not None]
    least = min(measured or tried, key=lambda one: one.peak)
    there = held(base.device) + room(base.device)
    limit = there if fit is None else min(fit, there)
    names = ", ".join(one.recipe.name for one in assignments)
    what = "memory" if base.device.type == "cpu" else f"memory of {base.device}"
    some = "" if least.memory is not None else "about "
    hints = _advice(_knobs(assignments, base, least, heeds), least.peak - limit)
    if least.memory is not None and limit < there and least.peak * _MARGIN <= there:
        hints = f"--fit {_size(least.peak * _MARGIN)} is enough. {hints}"
    return CapacityError(
        f"Training {names} takes {some}{bytes_text(least.peak)} of {what} at least ({shown(least.setup)}; the base is "
        f"{bytes_text(base.memory.total)} of it), and {bytes_text(limit)} may be taken"
        f"{'' if limit == there else ' (--fit)'}.",
        hints,
    )


def _size(count: float) -> str:
    """As --fit takes it, rounded up: 613MB, 1.94GB."""
    return f"{math.ceil(count / 1e7) / 100:.2f}GB" if count >= 1e9 else f"{math.ceil(count / 1e6)}MB"


def _knobs(assignments: Sequence[Assignment], base: Base, least: Tried, heeds: frozenset[str]) -> list[tuple[int, str]]:
    """Fields to change, each with about what it saves; what saves most first."""
    saves = [*_fixed(assignments, base, least, heeds), *_other(assignments, base, least)]
    return sorted(saves, key=lambda pair: -pair[0])


def _advice(knobs: Sequence[tuple[int, str]], needed: int) -> str:
    """What to change, and whether one change is enough."""
    told = "; ".join(f"{text} takes about {bytes_text(saved)} less" if saved else text for saved, text in knobs)
    if any(saved >= needed for saved, _ in knobs):
        return f"Change one of these: {told}."
    whole = sum(saved for saved, _ in knobs)
    if whole >= needed:
        return f"It needs {bytes_text(needed)} less; change several of these: {told}."
    return f"It needs {bytes_text(needed)} less, more than all of these save: {told}."


def _fixed(
    assignments: Sequence[Assignment], base: Base, least: Tried, heeds: frozenset[str]
) -> Iterator[tuple[int, str]]:
    """What recipes have fixed that need not be: no setup without it was tried."""
    configs: list[Any] = [one.recipe.training for one in assignments]
    longest, work = longest_row(assignments), _work(base, least)

    def off(name: str) -> bool:
        return any(getattr(config, name) is False for config in configs)

    if any(isinstance(c.pack_tokens, int) for c in configs) and least.setup.pack_tokens > longest:
        yield work - work * longest // least.setup.pack_tokens, f"training.pack_tokens: {longest}"
    if off("checkpointing"):
        yield work // 2, "training.checkpointing: true"
        if off("recompute_mlp") and "recompute_mlp" in heeds:
            yield int(work * _GATES), "training.recompute_mlp: true"
    if off("offload") and "offload" in heeds:
        yield 0, "training.offload: true"
    if off("table_on_host") and (table := movable_table(base)) is not None:
        yield table.nbytes, "training.table_on_host: true"
    if copies_there(base) and any(c.working_copies is True for c in configs):
        yield base.memory.working_copies, "training.working_copies: false"


def _other(assignments: Sequence[Assignment], base: Base, least: Tried) -> Iterator[tuple[int, str]]:
    """What changes what is learnt."""
    longest, work = longest_row(assignments), _work(base, least)
    if (smaller := _SMALLER.get(base.quantization)) is not None:
        yield (
            bytes_of_weights(base.model, base.quantization) - bytes_of_weights(base.model, smaller),
            (f"quantize: {smaller}"),
        )
    if longest > 16 and least.setup.pack_tokens <= longest:
        yield work // 2, f"training.max_length: {longest // 2} (the longest row has {longest} tokens)"
    adapters = least.memory.adapters + least.memory.writing if least.memory else 0
    for one in assignments:
        if isinstance(one.recipe.adapter, LoraAdapter) and one.recipe.adapter.rank > 1:
            yield adapters // 2, f"adapter.rank: {one.recipe.adapter.rank // 2}"
            break
    if len(assignments) > 1:
        yield adapters - adapters // len(assignments), "training one after the other"
    yield 0, "a smaller base"


def _work(base: Base, least: Tried) -> int:
    return least.memory.work if least.memory else max(least.peak - base.memory.total, 0)
