"""A plan's choices with their reasons, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..bases.devices import Choice
from ..bases.load import Base
from ..recipe import LoraAdapter
from ..recipe.options import PeftAdapter
from ..recipe.training import AUTO
from ..training.batches import Order
from ..training.planning.calibrate import CAREFUL, Calibration
from ..training.planning.plan import Learning, Memory, Plan, Setup, bytes_text, memory_of, time_of
from ..training.train import Assignment

_SAYS = "the recipe says so"
_WORDS = {
    "checkpointing": "layers computed twice",
    "recompute_mlp": "gate and up computed twice",
    "offload": "layers' inputs on the host",
    "table_on_host": "embeddings on the host",
    "working_copies": "working copies",
}


@dataclass(frozen=True)
class Tried:
    """A setup that does not fit, with the bytes that it would hold at most.

    Attributes:
        memory: where all of it was measured; else `peak` is drawn on from smaller packs.
        base, limit: what was held before, and what may be; 0 where that is not known.
    """

    setup: Setup
    peak: int
    memory: Memory | None = None
    base: int = 0
    limit: int = 0


def is_hopeless(setup: Setup, tried: Sequence[Tried]) -> bool:
    """Whether it need not be tried: the same with larger packs took so much that even in proportion it is too much, or
    what was held before was.
    """
    for one in tried:
        share = setup.pack_tokens / one.setup.pack_tokens
        if one.limit and one.base >= one.limit and setup.working_copies == one.setup.working_copies:
            return True
        if one.limit and replace(one.setup, pack_tokens=setup.pack_tokens) == setup and share < 1:
            # What was drawn on may be a quarter too high; what does not grow with packs makes the truth higher still.
            least = one.base + (one.peak - one.base) / CAREFUL * share
            if least > one.limit:
                return True
    return False


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
    heeds: frozenset[str],
) -> Plan:
    """The plan with a setup that fits, of which dry steps gave `found`."""
    work, configs = found.work, [one.recipe.training for one in assignments]
    packs = sum(stride.weight * len(stride.packs) for stride in work.strides)
    computed = sum(stride.weight * sum(load.tokens for load in stride.packs) for stride in work.strides)
    choices = _choices(assignments, base, setup, found, tried, heeds)
    return Plan(
        base.name if base.quantization == "none" else f"{base.name} in {base.quantization}",
        tuple(_learning(one, count) for one, count in zip(assignments, found.trained, strict=True)),
        setup, choices, work.steps, work.tokens, round(computed), round(packs),
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
    parts += [text for name, text in _WORDS.items() if name != "working_copies" and getattr(setup, name)]
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
    assignments: Sequence[Assignment],
    base: Base,
    setup: Setup,
    found: Calibration,
    tried: Sequence[Tried],
    heeds: frozenset[str],
) -> dict[str, Choice]:
    """What was chosen, each with the reason."""
    told = {"computation": Choice(*found.computation), "device": base.choices["device"], "dtype": base.choices["dtype"]}
    configs = [one.recipe.training for one in assignments]
    less = _why_less(tried, setup)
    sizes = {c.pack_tokens for c in configs}
    enough = "larger ones make products no faster" if not tried else less
    told["pack_tokens"] = Choice(str(setup.pack_tokens), enough if sizes == {AUTO} else _SAYS)
    told["packing"] = (
        Choice("padded", "this model's rows cannot stand one after another: those of like length stand side by side")
        if found.padded
        else Choice("one after another", "no padding: attention stays within a row")
    )
    for name in ("checkpointing", "recompute_mlp", "offload", "table_on_host"):
        asked, value = {getattr(c, name) for c in configs} - {AUTO}, bool(getattr(setup, name))
        if name != "checkpointing" and name not in heeds:
            if True in asked:
                told[name] = Choice(_word(False), _needless(name, base))
            continue
        told[name] = Choice(_word(value), _SAYS if asked else less if value else "memory is enough")
    if setup.checkpointing and "recompute_mlp" in told:
        del told["recompute_mlp"]  # it is part of what is computed twice
    if base.quantization != "none" and base.device.type == "cpu":
        kept = {c.working_copies for c in configs}
        why = "memory is enough" if setup.working_copies else less or "there was no room for them"
        told["working_copies"] = Choice(_word(setup.working_copies), why if kept == {AUTO} else _SAYS)
    return told


def _needless(name: str, base: Base) -> str:
    """Why something that a recipe asks for is not done."""
    if name != "recompute_mlp" and base.device.type != "cuda":
        return "there is no device whose memory it would save"
    if name == "table_on_host" and base.kind == "causal":
        return "the output layer has the same table, or a computation here reads it otherwise"
    return "what computes here keeps nothing of the kind"


def _why_less(tried: Sequence[Tried], setup: Setup) -> str:
    if not tried:
        return ""
    last = tried[-1]
    return f"{shown(last.setup)} would take {bytes_text(last.peak)}"


def shown(setup: Setup) -> str:
    """A setup in words."""
    parts = [f"packs of {setup.pack_tokens:,} tokens", *(text for name, text in _WORDS.items() if getattr(setup, name))]
    return " with ".join(parts[:2]) + "".join(f" and {part}" for part in parts[2:])


def _word(flag: bool) -> str:
    return "on" if flag else "off"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
