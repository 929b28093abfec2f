"""A training plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .render import Column, counted, fields, printable, seconds, size, table

if TYPE_CHECKING:
    from ..training.planning.plan import Learning, Plan

_ORDER = (
    "computation", "device", "dtype", "pack_tokens", "packing", "checkpointing", "recompute_mlp", "offload",
    "table_on_host", "working_copies",
)  # fmt: skip


def plan_lines(plan: Plan) -> list[str]:
    """What is trained, what was chosen and why, and what it takes."""
    lines = [printable(f"on {plan.base}:"), *table(_COLUMNS, [_learning(one) for one in plan.learnings]), ""]
    chosen = [(key, plan.choices[key]) for key in _ORDER if key in plan.choices]
    lines += table(
        (Column("CHOSEN"), Column(""), Column("WHY", 1)), [(k.replace("_", " "), c.value, c.reason) for k, c in chosen]
    )
    return [*lines, "", *fields([("steps", _steps(plan)), ("memory", _memory(plan)), ("time", _time(plan))])]


_COLUMNS = (
    Column("RECIPE"),
    Column("ADAPTER", 1),
    Column("ROWS", 2, right=True),
    Column("STEPS", right=True),
    Column("ROWS A STEP", 1, right=True),
    Column("LONGEST", 2, right=True),
    Column("PARAMETERS", 1, right=True),
)


def _learning(one: Learning) -> list[object]:
    rows = f"{one.batch_size} x {one.gradient_accumulation}" if one.gradient_accumulation > 1 else one.batch_size
    return [one.name, one.adapter, f"{one.rows:,}", f"{one.steps:,}", rows, f"{one.longest:,}", f"{one.trained:,}"]


def _steps(plan: Plan) -> str:
    each = plan.packs / max(plan.steps, 1)
    told = f"{plan.steps:,}, in {counted(plan.packs, 'packs')} ({each:.1f} a step); {plan.tokens:,} tokens"
    return told if plan.computed == plan.tokens else f"{told}, {plan.computed:,} computed (shared, padded)"


def _memory(plan: Plan) -> str:
    memory = plan.memory
    limit = f"; --fit {size(plan.fit)}" if plan.fit is not None else ""
    host = f"; of the host's memory {size(memory.on_host)}" if memory.on_host else ""
    return (
        f"{size(memory.peak)} at most: the process with the base loaded {size(memory.base)}, "
        f"adapters and optimiser {size(memory.adapters)}, "
        f"computing {size(memory.work)}; {size(memory.available)} beyond that are free{host}{limit}"
    )


def _time(plan: Plan) -> str:
    if plan.time is None:
        return ""
    told = f"about {seconds(plan.time.total)}, {plan.tokens_per_second:,.0f} tokens/s"
    return f"{told}; {seconds(plan.time.evaluating)} of it evaluating" if plan.time.evaluating else told
