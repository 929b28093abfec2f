"""What a version made of others does: its effect on the base, and its answers to every test set of its parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..adapters.adapter import Adapter
from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import AdapterHubError, DataError, StoreError, Unsupported
from ..evaluation.evaluate import Evaluation, evaluate
from ..events import Listener
from ..formats.card import examples_of
from ..runtime.certificate import measure
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.registry import make_task
from ..tasks.rows import Rows
from .combine_data import HeldOut

_HEADED = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class Measured:
    """A parent's test set, answered by the parent alone and by what was made of it.

    Attributes:
        split: what the card calls the rows; "" where the parent has none.
        alone, made: metrics in 0..1; None where they were not measured.
        reason: why they were not.
    """

    parent: str
    split: str
    rows: int = 0
    alone: dict[str, float] | None = None
    made: dict[str, float] | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return asdict(self)


@dataclass(frozen=True)
class Proof:
    """What goes into the card: the certificate, and metrics and example answers by split."""

    effect: dict[str, Any] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)


def prove_made(
    store: Store,
    adapter: Adapter,
    sets: Sequence[HeldOut],
    task: Mapping[str, Any],
    base: Base,
    on_event: Listener,
) -> Proof:
    """Measure an adapter that is in no store yet, as a runtime would serve it.

    Args:
        task: the one that it has.

    Raises:
        NoEffect: it moves no logit.
        AdapterMismatch: it does not fit the base.
    """
    runtime = Runtime(base, store, slots=2, batch_size=64, on_event=on_event)
    answered: dict[object, Evaluation] = {}
    found = []
    metrics: dict[str, dict[str, float]] = {}
    examples: dict[str, Any] = {}
    try:
        with quiet():
            held = runtime.attach(adapter, make_task(task) if task.get("type") else None)
            effect = measure(runtime, held)
            for one in sets:
                told, made = _measured(runtime, adapter, one, task, answered, on_event)
                found.append(told)
                if made is not None:
                    metrics[one.name], examples[one.name] = made.metrics, examples_of(made.answers)
    finally:
        runtime.close()
    return Proof(effect, tuple(found), metrics, examples)


def _measured(
    runtime: Runtime,
    adapter: Adapter,
    one: HeldOut,
    own_task: Mapping[str, Any],
    answered: dict[object, Evaluation],
    on_event: Listener,
) -> tuple[Measured, Evaluation | None]:
    """One test set; what cannot be measured is told, and ends nothing."""
    parent = str(one.parent)
    try:
        rows = _rows(one)
        task = make_task(one.task)
        alone = evaluate(runtime, task, rows, one.parent.ref, on_event, f"measuring {parent} alone")
        _check_head(adapter, one, own_task)
        if one.identity not in answered:
            held = runtime.attach(adapter, task)
            answered[one.identity] = evaluate(
                runtime, task, rows, held, on_event, f"measuring {adapter.name} on {one.name}"
            )
    except StoreError:
        raise
    except _HeadOfAnother as error:
        return Measured(parent, one.name, len(rows), alone.metrics, None, error.message), None
    except AdapterHubError as error:
        return Measured(parent, one.name, reason=error.message), None
    made = answered[one.identity]
    return Measured(parent, one.name, len(rows), alone.metrics, made.metrics), made


class _HeadOfAnother(Unsupported):
    """The parent can be measured, and what was made of it cannot."""


def _rows(one: HeldOut) -> Rows:
    if not one.split:
        raise DataError(f"{one.parent} was made without test data.")
    if not one.task.get("type"):
        raise Unsupported(f"The card of {one.parent} names no task, so nothing says how to measure it.")
    rows = one.rows()
    if rows is None:
        told = one.parent.card.data[one.split]
        where = told.get("path") or told.get("source") or "its place"
        raise DataError(f"The {one.split} data of {one.parent} is not at {where} any more, or has changed.")
    return rows


def _check_head(adapter: Adapter, one: HeldOut, own_task: Mapping[str, Any]) -> None:
    """A classifier's answers are the labels of its head, and a mix has one head."""
    headed = adapter.spec.task_type in _HEADED
    if headed and list(one.task.get("labels") or ()) != list(own_task.get("labels") or ()):
        raise _HeadOfAnother(f"{adapter.name} has a head for other labels than those of {one.parent}.")
