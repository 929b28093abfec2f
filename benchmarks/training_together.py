"""Several adapters trained together on one base, beside as many runs of ours one after another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from adapterhub_lite.bases.load import Base
from adapterhub_lite.events import Event, Listener, Step, ignore
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.train import Assignment, Trained, train_adapters

from .common import synchronise
from .rows import Row, faster, in_turn
from .training_cases import Case, instruct_case

PART = "together"
TOKENS = 64
_GOAL = 2.0


def rows(base: Base, count: int, updates: int, rounds: int, tokens: int = TOKENS) -> Iterator[Row]:
    """One row of so many tokens an update and adapter; updates alone are timed, the first left out."""
    cases = cases_of(base, count, updates, tokens)
    check_equal(cases)
    found = in_turn(
        {"together": lambda _: [seconds(cases)], "alone": lambda _: [sum(seconds([case]) for case in cases)]}, rounds
    )
    what = f"{updates - 1} updates of {count} adapters, 1 x {tokens} tokens each, together / one by one"
    row = faster(PART, what, found["together"], "one by one", found["alone"], _GOAL)
    speed = (updates - 1) * count * tokens / found["together"].p50
    yield replace(row, told=f"{row.told}, {speed:,.0f} tokens/s")


def cases_of(base: Base, count: int, updates: int, tokens: int) -> list[Case]:
    """Different rows for each adapter, cut from real ones to one length; the loss is on the second half."""
    whole = instruct_case(base, 4 * count * updates, rows=1, quantize=base.quantization)
    ids = [i for example in whole.examples for i in example.ids]
    made = [ids[i : i + tokens] for i in range(0, count * updates * tokens, tokens)]
    half = tokens // 2
    rows = [Example(some, [IGNORED] * half + some[half:]) for some in made]
    cut = [replace(whole, examples=rows[i::count]) for i in range(count)]
    return [case.seeded(i) for i, case in enumerate(cut)]


def seconds(cases: list[Case]) -> float:
    """Seconds from the end of the first update of all to the end of the last."""
    ends: list[tuple[int, float]] = []

    def listen(event: Event) -> None:
        if isinstance(event, Step):
            synchronise()
            ends.append((event.step, time.perf_counter()))

    _train(cases, listen)
    first = max(at for step, at in ends if step == 1)
    return ends[-1][1] - first


def check_equal(cases: list[Case]) -> None:
    """Together as alone: the same losses, up to the order of sums in matrix products of another size."""
    together = _train(cases)
    for case, found in zip(cases[:2], together[:2], strict=True):
        (alone,) = _train([case])
        for a, b in zip(alone.history.losses, found.history.losses, strict=True):
            if abs(a - b) > 2e-3 * abs(a):
                raise AssertionError(f"trained together the loss is {b}, alone {a}")


def _train(cases: list[Case], listen: Listener = ignore) -> list[Trained]:
    assignments = [Assignment(c.recipe, c.examples, name=str(i)) for i, c in enumerate(cases)]
    found = train_adapters(assignments, cases[0].base, on_event=listen)
    for one in found:
        if not isinstance(one, Trained):
            raise one
    return found  # type: ignore[return-value]
