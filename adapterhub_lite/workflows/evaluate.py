"""Measure a stored version again: on the rows its card names, or on others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import DataError, Unsupported
from ..evaluation.evaluate import evaluate as measure
from ..events import Listener, ignore
from ..formats.card import Card
from ..names import Ref
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.registry import make_task
from ..tasks.rows import Rows, read_jsonl
from .data import split_rows, split_task
from .own_base import load_own_base


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics in 0..1 of a version, and of its bare base where that can do the task at all."""

    ref: str
    metrics: dict[str, float]
    base_metrics: dict[str, float] | None
    primary_metric: str
    rows: int
    source: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return asdict(self)


def evaluate(
    ref: str | Ref,
    *,
    store: Store | None = None,
    base: Base | None = None,
    data: Path | None = None,
    split: str = "test",
    compare: bool = True,
    on_event: Listener = ignore,
) -> EvaluationReport:
    """Let a stored version answer the rows of one split and measure the answers by the metrics of its task.

    Args:
        base: the adapter's base, if it is loaded already.
        data: a JSON Lines file instead of the split that its card names.
        compare: measure the bare base too.

    Raises:
        Unsupported: its card names no task.
        DataError: the data has moved or changed, or lacks a field.
    """
    store = store if store is not None else Store()
    resolved = store.resolve(ref)
    card = store.card(resolved)
    if not card.task.get("type"):
        raise Unsupported(f"The card of {resolved} names no task, so nothing says how to measure it.", "Train it here.")
    rows = read_jsonl(data) if data is not None else _recorded_rows(resolved, card, split)
    task = make_task(card.task if data is not None else split_task(card, split))
    base = base or load_own_base(card, on_event=on_event)
    runtime = Runtime(base, store, slots=1, on_event=on_event)
    try:
        runtime.load(resolved)
        with quiet():
            own = measure(runtime, task, rows, resolved, on_event, f"measuring {resolved}")
            bare = None
            if compare and base.kind != "encoder":  # a bare encoder has no head
                bare = measure(runtime, task, rows, None, on_event, "measuring the base alone").metrics
    finally:
        runtime.close()
    return EvaluationReport(str(resolved), own.metrics, bare, task.primary_metric, len(rows), rows.source, rows.sha256)


def _recorded_rows(ref: Ref, card: Card, split: str) -> Rows:
    rows = split_rows(card, split)
    if rows is not None:
        return rows
    recorded = card.data.get(split)
    if not recorded:
        known = f"It has: {', '.join(card.data)}. " if card.data else ""
        raise DataError(f"{ref} was made without {split} data.", f"{known}Pass a file with --data FILE.jsonl.")
    where = recorded.get("path") or recorded.get("source")
    raise DataError(
        f"The {split} data of {ref} is not at {where} any more, or has changed.", "Pass it with --data FILE.jsonl."
    )
