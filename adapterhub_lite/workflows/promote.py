"""The quality gate: an alias moves to a version only if that is no worse than what the alias names now."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import DataError, StoreError, Unsupported
from ..evaluation.evaluate import evaluate
from ..events import Listener, ignore
from ..formats.card import Card, utc_now
from ..names import Ref, check_alias
from ..runtime.runtime import Runtime
from ..store import Move, Store
from ..tasks.registry import make_task
from ..tasks.rows import Rows, read_jsonl
from ..tasks.task import Task
from .combine_figures import figure_of_made
from .data import split_rows
from .figures import Figure, Question, judge_of, own_fingerprint, recorded
from .own_base import load_own_base

_ATTEMPTS = 5  # how often others may touch the alias while we measure, before we give up
_ROUNDING = 1e-9  # 0.8 - 0.1 is a little more than 0.7 in floating point
_SPLITS = ("test", "validation")
_IDENTITY = ("config", "tokenizer", "weights", "quantization")  # fields of a fingerprint that answers depend on


@dataclass(frozen=True)
class Decision:
    """Whether an alias moved to a candidate, and the figures (0..1) that decided it, all of the same rows.

    `current` is the version that the alias named before, None where it named none; its value is None too where there
    was nothing to compare. The two figures say when each was measured, and on what; `judge` is the digest of the task
    that judged the answers.
    """

    accepted: bool
    why: str
    name: str
    alias: str
    candidate: int
    current: int | None
    metric: str | None = None
    candidate_value: float | None = None
    current_value: float | None = None
    margin: float = 0.0
    rows: int = 0
    data: str = ""
    data_sha256: str = ""
    judge: str = ""
    candidate_figure: Figure | None = None
    current_figure: Figure | None = None

    @property
    def moved(self) -> bool:
        """Whether the alias names another version than before."""
        return self.accepted and self.candidate != self.current

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return asdict(self)


def promote(
    ref: str | Ref,
    alias: str,
    *,
    store: Store | None = None,
    base: Base | None = None,
    margin: float = 0.0,
    metric: str | None = None,
    data: Path | None = None,
    again: bool = False,
    device: str = "auto",
    on_event: Listener = ignore,
) -> Decision:
    """Point an alias at a version if that is no worse than the version the alias names now; the log keeps why.

    Both answer the same rows, each as it was trained to see them and on its own base, and the candidate's task judges
    the answers. Without a current version there is nothing to compare: the first promotion is accepted with its figure.
    A figure that this store has measured before, of the same version on the same rows and base, is not measured again;
    what an imported card claims is no figure. If somebody else touches the alias meanwhile, the candidate is compared
    with what it names then.

    Args:
        base: the candidate's base, if it is loaded already.
        margin: how much worse in the metric the candidate may be.
        metric: one that the candidate's task measures; by default its first.
        data: a JSON Lines file instead of the candidate's own test (else validation) rows.
        again: measure everything anew.

    Raises:
        Unsupported: a margin outside 0..1, an unknown metric, or no task to measure by.
        DataError: no rows, or rows that a version cannot read.
        StoreError: the alias was touched again and again.
    """
    store = store if store is not None else Store()
    check_alias(alias)
    if not 0 <= margin <= 1:
        raise Unsupported(f"A margin of {margin} is not a share of a metric.", "Give 0 to 1, for example 0.01.")
    candidate = store.resolve(ref)
    gate = _Gate(store, candidate, store.card(candidate), base, margin, metric, data, again, device, on_event)
    for _ in range(_ATTEMPTS):
        last, current = _state(store, candidate.name, alias)
        decision = gate.decide(alias, current)
        if current == candidate.version or _kept(store, decision, last):
            return decision
    raise StoreError(
        f"{candidate.name}:{alias} was touched {_ATTEMPTS} times while {candidate} was measured.",
        f"Nothing was moved. See what happens there with: ahl log {candidate.name}",
    )


def _state(store: Store, name: str, alias: str) -> tuple[Move, int | None]:
    """The last entry of an alias's log, and the version that the alias names."""
    history = store.alias_history(name, alias)
    moves = [move for move in history if move.event != "refuse"]
    return (history[-1] if history else Move(None, None, "")), (moves[-1].version if moves else None)


def _kept(store: Store, decision: Decision, last: Move) -> bool:
    """Write a decision to the store; False if the alias was touched after `last`."""
    name, alias, version = decision.name, decision.alias, decision.candidate
    if _state(store, name, alias)[0] != last:
        return False
    if not decision.accepted:
        store.refuse(name, alias, version, decision.to_dict())
        return True
    try:
        store.alias(name, alias, version, event="promote", reason=decision.to_dict(), expected=last)
    except StoreError:
        if _state(store, name, alias)[0] == last:
            raise
        return False
    return True


@dataclass
class _Gate:
    """Measures the candidate once, and each version it is compared with once, all on the candidate's rows."""

    store: Store
    candidate: Ref
    card: Card
    base: Base | None
    margin: float
    metric: str | None
    data: Path | None
    again: bool
    device: str
    on_event: Listener
    _figures: dict[int, Figure] = field(default_factory=dict)
    _base_for: Card | None = None  # whose base is loaded; None: the candidate's

    def __post_init__(self) -> None:
        self._given = self.base  # `base` may become another one

    def decide(self, alias: str, current: int | None) -> Decision:
        """The decision on the candidate against version `current`."""
        ref, version = self.candidate, self.candidate.version
        assert version is not None
        plain = Decision(True, "", ref.name, alias, version, current, margin=self.margin)
        if version == current:
            return replace(plain, why=f"{ref.name}:{alias} names {ref} already")
        rows, metric = self._rows, self._chosen
        plain = replace(plain, metric=metric, rows=len(rows), data=rows.source, data_sha256=rows.sha256)
        plain = replace(plain, judge=self._question.judge)
        if current is None:
            own = self._figure(version, alias)
            why = f"{ref.name}:{alias} named no version; {metric} of {ref} is {own.value:.4g}"
            return replace(plain, why=why, candidate_value=own.value, candidate_figure=own)
        other = Ref(ref.name, version=current)
        kind, mine = self.store.card(other).task.get("type"), self._judge.config["type"]
        if kind != mine:
            why = f"{ref} does {mine}, {other} {kind or 'nothing known'}: no figure compares the two"
            return replace(plain, accepted=False, why=why)
        own, now = self._figure(version, alias), self._figure(current, alias)
        accepted, compared = _compared(own.value, now.value, f"of {other}", self.margin)
        values = replace(plain, candidate_value=own.value, current_value=now.value)
        return replace(values, accepted=accepted, why=f"{metric} {compared}", candidate_figure=own, current_figure=now)

    @cached_property
    def _judge(self) -> Task:
        return _task(self.candidate, self.card)

    @cached_property
    def _rows(self) -> Rows:
        if self.data is not None:
            try:
                return read_jsonl(self.data)
            except DataError as error:
                raise DataError(error.message, "Give a JSON Lines file with --data FILE.jsonl.") from error
        split = next((split for split in _SPLITS if self.card.data.get(split)), None)
        if split is None:
            raise DataError(f"{self.candidate} was made without test data.", "Pass a file with --data FILE.jsonl.")
        rows = split_rows(self.card, split)
        if rows is None:
            recorded = self.card.data[split]
            where = recorded.get("path") or recorded.get("source")
            raise DataError(
                f"The {split} data of {self.candidate} is not at {where} any more, or has changed.",
                "Pass it with --data FILE.jsonl.",
            )
        return rows

    @cached_property
    def _chosen(self) -> str:
        """The metric to decide by. Tried on one row, since loading a base takes longer."""
        one = self._rows.at([0])
        known = list(self._judge.metrics(one, [""]))
        if self.metric is not None and self.metric not in known:
            raise Unsupported(f"{self.candidate} is not measured by {self.metric!r}.", f"Use {' or '.join(known)}.")
        return self.metric or self._judge.primary_metric

    @cached_property
    def _question(self) -> Question:
        return Question(self._chosen, self._rows.sha256, judge_of(self.card.task))

    def _figure(self, version: int, alias: str) -> Figure:
        """The metric of one version on the rows, as the candidate's task judges its answers."""
        if version not in self._figures:
            ref = self.store.resolve(Ref(self.candidate.name, version=version))
            card = self.store.card(ref)
            found = self._known(ref, card, self._measured_on(card), alias)
            if found is None:
                base = self._base_of(card)
                unsaid = self._measured_on(card) is None  # only the live base can tell which one it is
                found = self._known(ref, card, base.fingerprint.digest, alias) if unsaid else None
                found = found or self._measured(ref, card, base)
            self._figures[version] = found
        return self._figures[version]

    def _known(self, ref: Ref, card: Card, base: str | None, alias: str) -> Figure | None:
        if self.again or base is None:
            return None
        made = figure_of_made(self.store, ref, card, self._question, base)
        return made or recorded(self.store, ref, card, self._question, base, alias)

    def _measured_on(self, card: Card) -> str | None:
        """The fingerprint of the base on which a version is measured, as far as that is known without loading it."""
        given = self._given
        if given is not None and (_one_base(card, self.card) or _is_base_of(given, card)):
            return given.fingerprint.digest
        return own_fingerprint(card)

    def _measured(self, ref: Ref, card: Card, base: Base) -> Figure:
        runtime = Runtime(base, self.store, slots=1, on_event=self.on_event)
        try:
            runtime.load(ref)
            with quiet():
                found = evaluate(runtime, _task(ref, card), self._rows, ref, self.on_event, f"measuring {ref}")
        finally:
            runtime.close()
        value = self._judge.metrics(self._rows, found.answers)[self._chosen]
        return Figure(value, str(ref.digest), base.fingerprint.digest, "now", utc_now())

    def _base_of(self, card: Card) -> Base:
        """The base of a version: the one that is loaded, if that does for it."""
        if self.base is not None and (_one_base(card, self._base_for or self.card) or _is_base_of(self.base, card)):
            return self.base
        self.base = None  # makes room, unless the caller holds it
        self.base = load_own_base(card, device=self.device, on_event=self.on_event)
        self._base_for = card
        return self.base


def _compared(own: float, now: float, whose: str, margin: float) -> tuple[bool, str]:
    """Whether a figure is good enough beside the current one, and how the two compare in words."""
    if abs(own - now) <= _ROUNDING:
        return True, f"{own:.4g} equals that {whose}"
    one, other = f"{own:.4g}", f"{now:.4g}"
    if one == other:
        one, other = f"{own:.9g}", f"{now:.9g}"
    if own > now:
        return True, f"{one} is better than {other} {whose}"
    accepted = own >= now - margin - _ROUNDING
    worse = f"{one} is worse than {other} {whose}"
    if not margin:
        return accepted, worse
    return accepted, f"{worse} by {now - own:.4g}, {'within' if accepted else 'more than'} the margin of {margin:g}"


def _task(ref: Ref, card: Card) -> Task:
    if not card.task.get("type"):
        raise Unsupported(f"The card of {ref} names no task, so nothing says how to measure it.", "Train it here.")
    return make_task(card.task)


def _one_base(one: Card, other: Card) -> bool:
    """Whether two versions were made for the same base in the same quantisation, as far as their cards say."""
    marks = [card.base.get("fingerprint") or {} for card in (one, other)]
    if all(mark.get("weights") for mark in marks):
        return all(marks[0].get(key) == marks[1].get(key) for key in _IDENTITY)
    return one.base.get("name") == other.base.get("name")


def _is_base_of(base: Base, card: Card) -> bool:
    mark = card.base.get("fingerprint") or {}
    return bool(mark.get("weights")) and not set(base.fingerprint.differs_from(mark)) & set(_IDENTITY)
