"""What a version made of others does: its effect on the base, and its answers to the test sets of its parents."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..adapters.adapter import Adapter
from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import AdapterHubError, DataError, StoreError, Unsupported
from ..evaluation.evaluate import Evaluation, evaluate
from ..events import Stage
from ..formats.card import examples_of, spread
from ..formats.specs import HEADED
from ..names import Ref
from ..runtime.certificate import measure
from ..runtime.runtime import Runtime
from ..tasks.registry import make_task
from ..tasks.rows import Rows
from .combine_data import HeldOut, part_name
from .combine_figures import own_metrics
from .combine_setting import Setting


@dataclass(frozen=True)
class Measured:
    """Rows of a parent's test set, answered by the parent alone and by what was made of it.

    Attributes:
        split: what the card calls the rows; "" where the parent has none.
        rows, of_rows: how many were answered, evenly over how many.
        alone, made: metrics in 0..1 of these rows; None where they were not measured.
        alone_since: when the parent was measured, where that was before: its card has the figures.
        reason: why something was not measured.
    """

    parent: str
    split: str
    rows: int = 0
    of_rows: int = 0
    alone: dict[str, float] | None = None
    made: dict[str, float] | None = None
    alone_since: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return asdict(self)


@dataclass(frozen=True)
class Proof:
    """What goes into the card: the certificate, metrics by split (or part of one), and example answers by split."""

    effect: dict[str, Any] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)


def prove_made(
    adapter: Adapter, sets: Sequence[HeldOut], task: Mapping[str, Any], base: Base, setting: Setting
) -> Proof:
    """Measure an adapter that is in no store yet, as a runtime would serve it.

    Args:
        task: the one that it has.

    Raises:
        NoEffect: it moves no logit.
        AdapterMismatch: it does not fit the base.
    """
    runtime = Runtime(base, setting.store, slots=2, batch_size=64, on_event=setting.on_event)
    try:
        with quiet():
            held = runtime.attach(adapter, make_task(task) if task.get("type") else None)
            effect = measure(runtime, held)
            bench = _Bench(runtime, adapter, task, setting)
            parts = [bench.part(one) for one in sets]
            bench.announce(parts)
            measured = tuple(bench.measured(part) for part in parts)
    finally:
        runtime.close()
    return Proof(effect, measured, bench.metrics, bench.examples)


@dataclass
class _Part:
    """The rows of one test set that are answered, and what is known before.

    Attributes:
        chosen: their places in the whole set.
        alone: the parent's metrics, where its card has them.
    """

    of: HeldOut
    told: Measured
    rows: Rows | None = None
    chosen: Sequence[int] = ()
    alone: dict[str, float] | None = None
    headless: str = ""


class _Bench:
    """Answers test sets one after another, each asked and judged alike only once."""

    def __init__(self, runtime: Runtime, adapter: Adapter, task: Mapping[str, Any], setting: Setting) -> None:
        self.runtime, self.adapter, self.task, self.setting = runtime, adapter, task, setting
        self.metrics: dict[str, dict[str, float]] = {}
        self.examples: dict[str, Any] = {}
        self._answered: dict[object, Evaluation] = {}
        self._left = self._done = 0  # answers to come, and given
        self._spent = 0.0  # seconds for those

    def part(self, one: HeldOut) -> _Part:
        """What is to be measured of one test set; what cannot be is told, and ends nothing."""
        told = Measured(str(one.parent), one.name)
        try:
            whole = _rows(one)
            if not self.setting.rows:
                return _Part(one, replace(told, of_rows=len(whole), reason="No rows were asked for."))
            chosen = spread(len(whole), self.setting.rows)
            some = whole.at(chosen)
            make_task(one.task)
        except AdapterHubError as error:
            return _Part(one, replace(told, reason=error.message))
        card, mark = one.parent.card, self.runtime.base.fingerprint.digest
        name = part_name(one.split, len(some), len(whole))
        alone = own_metrics(self.setting.store, one.parent.ref, card, name, mark)
        told = replace(told, rows=len(some), of_rows=len(whole), alone_since=card.created if alone else "")
        return _Part(one, told, some, chosen, alone, _other_head(self.adapter, one, self.task))

    def announce(self, parts: Sequence[_Part]) -> None:
        """Count the answers to come."""
        asked = set()
        for part in parts:
            if part.rows is None:
                continue
            self._left += len(part.rows) * (part.alone is None)
            if not part.headless and part.of.identity not in asked:
                asked.add(part.of.identity)
                self._left += len(part.rows)

    def measured(self, part: _Part) -> Measured:
        """One test set, answered."""
        if part.rows is None:
            return part.told
        one, told, rows = part.of, part.told, part.rows
        try:
            task = make_task(one.task)
            alone = part.alone
            if alone is None:
                alone = self._evaluated(rows, one.task, one.parent.ref, f"measuring {told.parent} alone").metrics
            if part.headless:
                return replace(told, alone=alone, reason=part.headless)
            if one.identity not in self._answered:
                held = self.runtime.attach(self.adapter, task)
                title = f"measuring {self.adapter.name} on {one.name}"
                self._answered[one.identity] = self._evaluated(rows, one.task, held, title)
        except StoreError:
            raise
        except AdapterHubError as error:
            return replace(told, rows=0, alone_since="", reason=error.message)
        made = self._answered[one.identity]
        self.metrics[part_name(one.name, told.rows, told.of_rows)] = made.metrics
        self.examples[one.name] = _examples(made.answers, part.chosen)
        return replace(told, alone=alone, made=made.metrics)

    def _evaluated(self, rows: Rows, task: Mapping[str, Any], adapter: str | Ref, title: str) -> Evaluation:
        self.setting.on_event(Stage(f"{title}: {counted(len(rows))}{self._time(len(rows))}"))
        started = time.perf_counter()
        found = evaluate(self.runtime, make_task(task), rows, adapter, self.setting.on_event, title)
        self._spent += time.perf_counter() - started
        self._done, self._left = self._done + len(rows), self._left - len(rows)
        return found

    def _time(self, now: int) -> str:
        """How many answers there are beside those that come now; once some were given, how long the rest takes."""
        total = self._done + self._left
        if total == now:
            return ""
        if not self._done:
            return f" ({total:,} answers in all)"
        left = self._spent / self._done * self._left
        time_left = f", about {left / 60:.0f} min" if left >= 90 else f", about {left:.0f} s" if left >= 1 else ""
        return f" ({self._left:,} of {total:,} answers left{time_left})"


def counted(rows: int) -> str:
    """`1 row`, `5 rows`."""
    return f"{rows:,} row{'' if rows == 1 else 's'}"


def _examples(answers: Sequence[str], chosen: Sequence[int]) -> dict[str, Any]:
    """As `examples_of`, the rows being those of the whole set."""
    found = examples_of(answers)
    return {**found, "rows": [chosen[row] for row in found["rows"]]}


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


def _other_head(adapter: Adapter, one: HeldOut, own_task: Mapping[str, Any]) -> str:
    """Why an adapter cannot answer a parent's rows: a classifier's answers are the labels of its head, and it has one.

    The parent can be measured nevertheless. "" where it can.
    """
    headed = adapter.spec.task_type in HEADED
    if headed and list(one.task.get("labels") or ()) != list(own_task.get("labels") or ()):
        return f"{adapter.name} has a head for other labels than those of {one.parent}."
    return ""
