"""A plan's choices with their reasons, and what to change where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bases.devices import Choice
from ..bases.load import Base
from ..errors import CapacityError
from ..recipe import LoraAdapter
from ..recipe.options import PeftAdapter
from ..recipe.training import AUTO
from ..training.batches import Order
from ..training.planning.calibrate import Calibration
from ..training.planning.plan import Learning, Memory, Plan, Setup, bytes_text, memory_of, time_of
from ..training.planning.room import held, room
from ..training.train import Assignment

_NF4_BYTES = 0.5 + 4 / 64  # of a weight, with its share of a block's scale


@dataclass(frozen=True)
class Tried:
    """A setup that does not fit, with the bytes that it would hold at most."""

    setup: Setup
    peak: int
    memory: Memory | None = None


def copies_there(base: Base) -> bool:
    """Whether a quantised base has its dequantised weights beside it."""
    return any(getattr(module, "_ahl_copy", None) is not None for module in base.model.modules())


def longest_row(assignments: Sequence[Assignment]) -> int:
    """Tokens of the longest row of all parts that training reads."""
    rows = [len(example.ids) for one in assignments for part in (one.train, one.validation) for example in part]
    return max(rows, default=1)


def plan_of(
    assignments: Sequence[Assignment],
    base: Base,
    setup: Setup,
    found: Calibration,
    tried: Sequence[Tried],
    fit: int | None,
) -> Plan:
    """The plan with a setup that fits, of which dry steps gave `found`."""
    work, configs = found.work, [one.recipe.training for one in assignments]
    packs = sum(stride.weight * len(stride.packs) for stride in work.strides)
    computed = sum(stride.weight * sum(load.tokens for load in stride.packs) for stride in work.strides)
    return Plan(
        base.name if base.quantization == "none" else f"{base.name} in {base.quantization}",
        tuple(_learning(one, count) for one, count in zip(assignments, found.trained, strict=True)),
        setup, _choices(assignments, base, setup, found, tried), work.steps, work.tokens, round(computed), round(packs),
        memory_of(found), time_of(found, configs), fit,
    )  # fmt: skip


def line(made: Plan) -> str:
    """A plan in one line."""
    setup, names = made.setup, ", ".join(one.name for one in made.learnings)
    parts = [f"{names}: {made.steps:,} steps, {made.tokens:,} tokens"]
    if made.time is not None:
        parts.append(f"about {_duration(made.time.total)} ({made.tokens_per_second:,.0f} tokens/s)")
    parts.append(f"at most {bytes_text(made.memory.peak)}, {bytes_text(made.memory.above)} above the base")
    parts.append(f"{made.choices['computation'].value}, packs of {setup.pack_tokens:,} tokens")
    if setup.checkpointing:
        parts.append("layers computed twice")
    return "; ".join(parts)


def _learning(one: Assignment, trained: int) -> Learning:
    recipe, config = one.recipe, one.recipe.training
    kind: str = recipe.adapter.method.lower() if isinstance(recipe.adapter, PeftAdapter) else recipe.adapter.type
    kind += f" of rank {recipe.adapter.rank}" if isinstance(recipe.adapter, LoraAdapter) else ""
    return Learning(
        recipe.name, kind, len(one.train), Order(config, one.train).total, config.batch_size,
        config.gradient_accumulation, trained, config.max_length, max(len(e.ids) for e in one.train),
    )  # fmt: skip


def _choices(
    assignments: Sequence[Assignment], base: Base, setup: Setup, found: Calibration, tried: Sequence[Tried]
) -> dict[str, Choice]:
    """What was chosen, each with the reason."""
    told = {"computation": Choice(*found.computation), "device": base.choices["device"], "dtype": base.choices["dtype"]}
    configs = [one.recipe.training for one in assignments]
    less = _why_less(tried, setup)
    sizes = {c.pack_tokens for c in configs}
    enough = "larger ones make products no faster" if not tried else less
    told["pack_tokens"] = Choice(str(setup.pack_tokens), enough if sizes == {AUTO} else "the recipe says so")
    told["packing"] = (
        Choice("padded", "this model's rows cannot stand one after another: those of like length stand side by side")
        if found.padded
        else Choice("one after another", "no padding: attention stays within a row")
    )
    twice = {c.checkpointing for c in configs}
    why = less if setup.checkpointing else "memory is enough"
    told["checkpointing"] = Choice(_word(setup.checkpointing), why if twice == {AUTO} else "the recipe says so")
    if base.quantization != "none" and base.device.type == "cpu":
        kept = {c.working_copies for c in configs}
        why = "memory is enough" if setup.working_copies else less or "there was no room for them"
        told["working_copies"] = Choice(_word(setup.working_copies), why if kept == {AUTO} else "the recipe says so")
    return told


def _why_less(tried: Sequence[Tried], setup: Setup) -> str:
    if not tried:
        return ""
    last = tried[-1]
    return f"{_shown(last.setup)} would take {bytes_text(last.peak)}"


def _shown(setup: Setup) -> str:
    parts = [f"packs of {setup.pack_tokens:,} tokens"]
    parts += ["layers computed twice"] if setup.checkpointing else []
    parts += ["working copies"] if setup.working_copies else []
    return " with ".join(parts[:2]) + "".join(f" and {part}" for part in parts[2:])


def _word(flag: bool) -> str:
    return "on" if flag else "off"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def refusal(assignments: Sequence[Assignment], base: Base, tried: Sequence[Tried], fit: int | None) -> CapacityError:
    """Why nothing fits, and what to change."""
    least = min(tried, key=lambda one: one.peak)
    there = held(base.device) + room(base.device)
    limit = there if fit is None else min(fit, there)
    names = ", ".join(one.recipe.name for one in assignments)
    what = "memory" if base.device.type == "cpu" else f"memory of {base.device}"
    return CapacityError(
        f"Training {names} takes {bytes_text(least.peak)} of {what} at least ({_shown(least.setup)}), and "
        f"{bytes_text(limit)} may be taken{'' if limit == there else ' (--fit)'}.",
        "Change one of these: " + "; ".join(_knobs(assignments, base, least)) + ".",
    )


def _knobs(assignments: Sequence[Assignment], base: Base, least: Tried) -> list[str]:
    """Fields to change, each with about what it saves; what saves most first."""
    saves: list[tuple[int, str]] = []
    configs = [one.recipe.training for one in assignments]
    longest = longest_row(assignments)
    work = least.memory.work if least.memory else max(least.peak - base.memory.total, 0)
    if any(isinstance(c.pack_tokens, int) for c in configs) and least.setup.pack_tokens > longest:
        saves.append((work - work * longest // least.setup.pack_tokens, f"training.pack_tokens: {longest}"))
    if any(c.checkpointing is False for c in configs):
        saves.append((work // 2, "training.checkpointing: true"))
    if copies_there(base) and any(c.working_copies is True for c in configs):
        saves.append((base.memory.working_copies, "training.working_copies: false"))
    if base.quantization == "none":
        weights = [m.weight for m in base.model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
        saved = sum(w.nbytes - int(w.numel() * _NF4_BYTES) for w in weights if isinstance(w.nbytes, int))
        saves.append((saved, "quantize: nf4"))
    if longest > 16:
        half = work // 2 if least.setup.pack_tokens <= longest else 0
        saves.append((half, f"training.max_length: {longest // 2} (the longest row has {longest} tokens)"))
    for one in assignments:
        if isinstance(one.recipe.adapter, LoraAdapter) and one.recipe.adapter.rank > 1:
            adapters = least.memory.adapters + least.memory.writing if least.memory else 0
            saves.append((adapters // 2, f"adapter.rank: {one.recipe.adapter.rank // 2}"))
            break
    ordered = sorted(saves, key=lambda pair: -pair[0])
    return [f"{text} takes about {bytes_text(saved)} less" if saved else text for saved, text in ordered]
