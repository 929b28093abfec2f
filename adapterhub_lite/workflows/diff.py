"""Compare two stored versions: how each was made, what it measured, its weights, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.adapter import stored_adapter
from ..adapters.compare import Comparison, compare
from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import AdapterHubError, AdapterMismatch, BaseMismatch, DataError, StoreError, Unsupported
from ..evaluation.evaluate import evaluate
from ..events import Listener, ignore
from ..formats.card import Card, spread
from ..names import Ref
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.registry import make_task
from ..tasks.rows import Rows
from ..tasks.tag import Tag
from ..tasks.task import Task
from .data import split_rows
from .difference import Answers, Change, ChangedAnswer, DataChange, Difference, MetricChange, Side
from .own_base import load_own_base

_SPLITS = ("train", "validation", "test")
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SAME_BASE = ("weights", "config", "tokenizer")


@dataclass(frozen=True)
class _Version:
    ref: Ref
    card: Card

    def __str__(self) -> str:
        return f"{self.ref.name}@{self.ref.version}"

    def side(self) -> Side:
        return Side(str(self), str(self.ref.digest), self.card.created, str(self.card.adapter.get("type") or ""))


def diff(
    a: str | Ref,
    b: str | Ref,
    *,
    store: Store | None = None,
    base: Base | Callable[[], Base] | None = None,
    outputs: int = 0,
    on_event: Listener = ignore,
) -> Difference:
    """Compare two stored versions.

    Args:
        base: the base of both, or what loads it; by default their own is loaded. It is only used for `outputs`.
        outputs: let both answer so many rows of the test split now (validation where there is none). Where that cannot
            be done (different bases, other columns, rows that have moved) `outputs_refused` says why, and everything
            else is compared; what the cards tell is found before a base is loaded.

    Raises:
        StoreCorrupt: a version is damaged.
    """
    store = store if store is not None else Store()
    one, two = (_Version(ref, store.card(ref)) for ref in (store.resolve(a), store.resolve(b)))
    same = one.ref.digest == two.ref.digest
    if outputs < 0:
        raise Unsupported(f"{outputs} rows cannot be answered.", "Give a number from 0 on.")
    live, refused = _answered(store, one, two, base, 0 if same else outputs, on_event)
    weights, weights_note = (None, "the same") if same else _weights(store, one, two)
    files = [store.manifest(side.ref).files for side in (one, two)]
    return Difference(
        a=one.side(),
        b=two.side(),
        same=same,
        same_weights=files[0][_WEIGHTS].sha256 == files[1][_WEIGHTS].sha256,
        same_config=files[0][_CONFIG].sha256 == files[1][_CONFIG].sha256,
        recipe=tuple(changes(one.card.recipe, two.card.recipe)) if one.card.recipe and two.card.recipe else (),
        recipe_note=_recipe_note(one, two),
        base=tuple(changes(one.card.base, two.card.base)),
        data=tuple(_data(one.card, two.card)),
        metrics=tuple(_metrics(one.card, two.card)),
        made=tuple(changes(_made(one.card), _made(two.card))),
        weights=weights,
        weights_note=weights_note,
        answers=(*_recorded(one, two), *live),
        outputs_refused=refused,
    )


# --- cards -------------------------------------------------------------------------------------------------------


def changes(a: Mapping[str, Any], b: Mapping[str, Any], stem: str = "") -> Iterator[Change]:
    """Every value that differs between two nested objects; lists are values, and None is as good as absent."""
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        path = stem + (json.dumps(key) if "." in key else key)
        nested = [value for value in (x, y) if value is not None]
        if nested and all(isinstance(value, dict) for value in nested):
            yield from changes(x or {}, y or {}, f"{path}.")
        elif x != y:
            yield Change(path, x, y)


def _made(card: Card) -> dict[str, Any]:
    return {
        "adapter": card.adapter,
        "task": card.task,
        "seed": card.seed,
        "parents": card.parents or None,
        "origin": {"kind": card.origin.get("kind")},
        "libraries": card.libraries,
        "duration_seconds": card.duration_seconds,
    }


def _recipe_note(one: _Version, two: _Version) -> str:
    known = [str(side) for side in (one, two) if side.card.recipe]
    return "" if len(known) == 2 else f"only {known[0]} has one" if known else "neither has one"


def _data(a: Card, b: Card) -> Iterator[DataChange]:
    for split in _in_order({*a.data, *b.data}):
        x, y = (_data_facts(card.data.get(split)) for card in (a, b))
        yield DataChange(split, _same_data(a, b, split), x, y)


def _data_facts(told: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if told is None else {key: told.get(key) for key in ("source", "sha256", "rows")}


def _same_data(a: Card, b: Card, split: str) -> bool:
    found = [card.data.get(split, {}).get("sha256") for card in (a, b)]
    return found[0] is not None and found[0] == found[1]


def _metrics(a: Card, b: Card) -> Iterator[MetricChange]:
    for split in _in_order({*a.metrics, *b.metrics}):
        x, y = a.metrics.get(split, {}), b.metrics.get(split, {})
        for name in dict.fromkeys((*x, *y)):
            yield MetricChange(split, name, x.get(name), y.get(name), _same_data(a, b, split))


def _in_order(splits: set[str]) -> list[str]:
    return sorted(splits, key=lambda name: (_SPLITS.index(name) if name in _SPLITS else len(_SPLITS), name))


# --- weights -----------------------------------------------------------------------------------------------------


def _weights(store: Store, one: _Version, two: _Version) -> tuple[Comparison | None, str]:
    read = [stored_adapter(store.read(side.ref)) for side in (one, two)]
    try:
        return compare(*read), ""
    except (AdapterMismatch, Unsupported) as error:
        return None, error.message


# --- answers -----------------------------------------------------------------------------------------------------


def _recorded(one: _Version, two: _Version) -> Iterator[Answers]:
    for split in _in_order({*one.card.examples, *two.card.examples}):
        said = [_by_row(side.card.examples.get(split)) for side in (one, two)]
        shared = sorted(said[0].keys() & said[1].keys())
        if not said[0] or not said[1]:
            alone = one if said[0] else two
            yield Answers(split, False, 0, (), f"only {alone} has recorded some")
        elif not _same_data(one.card, two.card, split):
            yield Answers(split, False, 0, (), "recorded on different rows")
        else:
            changed = [(row, said[0][row], said[1][row]) for row in shared if said[0][row] != said[1][row]]
            rows = _rows_at_hand(one, two, split) if changed else None
            yield Answers(split, False, len(shared), tuple(_explained(c, rows, one.card) for c in changed))


def _by_row(example: Mapping[str, Any] | None) -> dict[int, str]:
    return dict(zip(example["rows"], example["answers"], strict=True)) if example else {}


def _rows_at_hand(one: _Version, two: _Version, split: str) -> Rows | None:
    """The rows of a file that is where one of the two had it, unchanged; nothing is fetched to show a prompt."""
    local = [side.card for side in (one, two) if side.card.data[split].get("path")]
    return next((rows for card in local if (rows := split_rows(card, split)) is not None), None)


def _explained(changed: tuple[int, str, str], rows: Rows | None, card: Card) -> ChangedAnswer:
    index, a, b = changed
    if rows is None or index >= len(rows):
        return ChangedAnswer(index, a, b)
    row = rows.at([index])
    try:
        task = make_task(card.task)
        return ChangedAnswer(index, a, b, task.inputs(row)[0], _expected(task, row))
    except AdapterHubError:  # the task is not known, or the rows are not as it needs them
        return ChangedAnswer(index, a, b)


def _expected(task: Task, row: Rows) -> str:
    if isinstance(task, Tag):
        return " ".join(task.expected(row, 0))
    return str(row.field(0, task.config["label" if isinstance(task, Classify) else "completion"]))


def _answered(
    store: Store, one: _Version, two: _Version, base: Base | Callable[[], Base] | None, most: int, on_event: Listener
) -> tuple[tuple[Answers, ...], str]:
    """Answers given now, or why there are none: the other parts of a comparison are not lost for it."""
    if not most:
        return (), ""
    try:
        return (_live(store, one, two, base, most, on_event),), ""
    except StoreError:
        raise
    except AdapterHubError as error:
        return (), error.message


def _live(
    store: Store, one: _Version, two: _Version, base: Base | Callable[[], Base] | None, most: int, on_event: Listener
) -> Answers:
    _check_one_base(one, two)
    tasks = _tasks(one, two)
    split, rows = _rows_to_answer(one, two)
    chosen = spread(len(rows), most)
    part = rows.at(chosen)
    _check_columns(one, two, tasks, part)
    if not isinstance(base, Base):
        base = base() if base is not None else load_own_base(one.card, on_event=on_event)
    runtime = Runtime(base, store, slots=2, on_event=on_event)
    try:
        for side in (one, two):
            runtime.load(side.ref)
        with quiet():
            said = [
                evaluate(runtime, task, part, side.ref, on_event, f"{side} answers {len(part)} rows").answers
                for side, task in zip((one, two), tasks, strict=True)
            ]
    finally:
        runtime.close()
    changed = [pair for pair in zip(chosen, *said, strict=True) if pair[1] != pair[2]]
    asked = one.card if one.card.task.get("type") else two.card
    return Answers(split, True, len(part), tuple(_explained(pair, rows, asked) for pair in changed))


def _check_columns(one: _Version, two: _Version, tasks: Sequence[Task], rows: Rows) -> None:
    """Before the base is loaded: whether the rows have what each task reads."""
    for side, task in zip((one, two), tasks, strict=True):
        try:
            task.inputs(rows)
            task.metrics(rows, [""] * len(rows))
        except DataError as error:
            raise DataError(
                f"{one} and {two} read other columns, so they cannot answer the same rows. For {side}: {error}",
                "Compare them without live answers.",
            ) from error


def _check_one_base(one: _Version, two: _Version) -> None:
    """Before the base is loaded: what the cards say; the runtime checks it again on the live base."""
    marks = [side.card.base.get("fingerprint") or {} for side in (one, two)]
    differing = [key for key in _SAME_BASE if all(m.get(key) for m in marks) and marks[0][key] != marks[1][key]]
    if differing:
        names = [f"{side} was made for {side.card.base.get('name') or 'another base'}" for side in (one, two)]
        raise BaseMismatch(
            f"{', '.join(names)}: their {' and '.join(differing)} differ, so no base can let both answer.",
            "Compare them without live answers.",
        )


def _tasks(one: _Version, two: _Version) -> Sequence[Task]:
    """The task of each; one that names none does the other's."""
    known = [side.card.task for side in (one, two) if side.card.task.get("type")]
    if not known:
        raise Unsupported(f"Neither {one} nor {two} names a task, so nothing says what to ask.", "Use ahl run.")
    return [make_task(side.card.task if side.card.task.get("type") else known[0]) for side in (one, two)]


def _rows_to_answer(one: _Version, two: _Version) -> tuple[str, Rows]:
    for split in ("test", "validation"):
        for side in (one, two):
            rows = split_rows(side.card, split) if side.card.data.get(split, {}).get("sha256") else None
            if rows is not None:
                return split, rows
    raise DataError(
        f"The test data of {one} and {two} is not where it was, or has changed.", "Compare them without live answers."
    )
