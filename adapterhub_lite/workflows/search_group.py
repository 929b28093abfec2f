"""Train a group of a search's adapters together, as large a group as memory allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..bases.load import Base, load_base
from ..bases.quiet import quiet
from ..errors import CapacityError, DataError, TrainingFailed, TrainingInterrupted
from ..events import Listener, Note, Stage
from ..names import Ref
from ..recipe import Recipe
from ..store import Store
from ..training.computation import Settings, make_computation
from ..training.frozen import unchanged
from ..training.loop import Referee
from ..training.member import History, Member
from ..training.runs.checkpoint import Checkpoints, State
from ..training.runs.run import Run
from ..training.train import Assignment, Trained, new_members, train_adapters
from .early import check_adapter
from .plan import chosen_setup, kept_setup, wanted_copies
from .search_journal import Search
from .search_trials import COMPLETE, FAILED, Trial
from .train import _assignment, _checkpointing, _Job, prepared

Found = Sequence[Trained | TrainingFailed]
_SHORTEST = 30  # steps of a run, below which it is not tried how a step is computed fastest
_FASTER = 0.9  # the share of the time together that learner by learner must take to be chosen


@dataclass
class Crew:
    """What the groups of a search share; how they are computed is in the search's head."""

    store: Store
    first: _Job
    search: Search
    base: Base
    own: bool
    on_event: Listener
    examples: dict[tuple[Any, ...], Assignment] = field(default_factory=dict)

    def job(self, plan: Recipe) -> _Job:
        """With the rows that all of them share."""
        return _Job(plan, self.first.rows, self.first.task, self.first.start)

    def assignment(self, job: _Job) -> Assignment:
        """Rows are made into tokens once for each length they are cut to."""
        key = (job.plan.training.max_length,)
        if key not in self.examples:
            self.examples[key] = _assignment(job, self.base, self.store, True, self.on_event)
        return replace(self.examples[key], recipe=job.plan, name=job.plan.name)


def first_job(plan: Recipe, store: Store) -> _Job:
    """The recipe itself, with its rows read.

    Raises:
        DataError: there is no validation part to compare by.
    """
    if plan.data.validation is None:
        raise DataError(
            f"{plan.name} has no data.validation, by which adapters are compared; the test part must not choose.",
            "Give the recipe one, or override it: -o data.validation=FILE.jsonl.",
        )
    check_adapter(plan)
    return prepared(plan, store)


def base_of(plan: Recipe, base: Base | None, on_event: Listener) -> Base:
    """The base that is given, or the recipe's."""
    return base or load_base(plan.base, plan.quantize, working_copies=wanted_copies([plan]), on_event=on_event)


def group_size(crew: Crew, plans: Sequence[Recipe], most: int, timed: bool = False) -> int:
    """How many of these fit into memory at once, at most so many; the largest are tried. Writes into the search's head
    how they are computed: the plan's setup, and where `timed` whether learner by learner is faster than together. That
    rounds otherwise, so what must come out the same again is not timed.

    Raises:
        CapacityError: not even one fits.
    """
    largest = sorted(plans, key=_size, reverse=True)
    count = max(1, min(most, len(plans)))
    while True:
        group = [crew.assignment(crew.job(plan)) for plan in largest[:count]]
        try:
            setup = chosen_setup(group, crew.base, crew.own, crew.on_event)
            break
        except CapacityError:
            if count == 1:
                raise
            count = (count + 1) // 2
    apart = timed and count > 1 and _apart_is_faster(group, crew.base, setup.settings, crew.on_event)
    crew.search.head |= {"computed": asdict(setup), "apart": apart}
    return count


def _size(plan: Recipe) -> float:
    adapter = plan.adapter
    return float(getattr(adapter, "rank", getattr(adapter, "tokens", 1)))


def _apart_is_faster(group: Sequence[Assignment], base: Base, settings: Settings, on_event: Listener) -> bool:
    """Compute the first step of a group together and learner by learner, with learners that are thrown away."""
    seconds = {"together": 0.0, "apart": 0.0}
    with base.training(), quiet(), unchanged(base.model):
        learners, members = new_members(group, base)
        if min(member.order.total for member in members) < _SHORTEST:
            return False
        computation = make_computation(base, learners, settings)
        rows = [member.rows() for member in members]
        for turn in range(2):  # the first warms up
            begun = time.perf_counter()
            for part in rows:
                computation.gradients(part)
            between = time.perf_counter()
            computation.gradients([row for part in rows for row in part])
            if turn:
                seconds = {"apart": between - begun, "together": time.perf_counter() - between}
    told = f"a step of {len(group)} adapters: {seconds['together']:.2f} s together, {seconds['apart']:.2f} s one by one"
    on_event(Note(told))
    return seconds["apart"] < _FASTER * seconds["together"]


def train_group(
    crew: Crew,
    plans: Sequence[Recipe],
    keep: Callable[[Found], None],
    referee: Referee | None = None,
    wish: Callable[[], int] | None = None,
    interrupted: Callable[[Found], None] | None = None,
) -> None:
    """Train these together, on from where they were broken off, and give them to `keep` before their state is dropped.

    Raises:
        TrainingInterrupted: after `interrupted` got each as it is now; their state is kept all the same.
    """
    jobs = [crew.job(plan) for plan in plans]
    identities = [job.identity(crew.base) for job in jobs]
    with Run(crew.search.folder, identities, on_event=crew.on_event) as run:
        assignments = [crew.assignment(job) for job in jobs]
        resume = run.is_broken_off
        computed = run.computed if resume else crew.search.head.get("computed", {})
        setup = kept_setup(assignments, crew.base, computed, crew.own)
        checkpoints = run.begin(
            identities, [job.rows for job in jobs], resume, asdict(setup), **_checkpointing(plans)
        )  # fmt: skip
        names = ", ".join(plan.name for plan in plans)
        crew.on_event(Stage(f"training {len(plans)} adapters on {crew.base.name}: {names}"))
        more: dict[str, Any] = {
            "settings": setup.settings,
            "apart": bool(crew.search.head.get("apart")),
            "on_event": crew.on_event,
        }
        begun = time.perf_counter()
        try:
            found = train_adapters(
                assignments, crew.base, checkpoints=checkpoints, referee=referee, wish=wish, **more
            )  # fmt: skip
        except TrainingInterrupted:
            if interrupted is not None and checkpoints.latest() is not None:
                interrupted(_as_they_are(assignments, crew.base, checkpoints, more))
            raise
        finally:
            head = crew.search.head
            head["seconds"] = round(head.get("seconds", 0.0) + time.perf_counter() - begun, 3)
        keep(found)
        run.done = True


def _as_they_are(
    assignments: Sequence[Assignment], base: Base, checkpoints: Checkpoints, more: Mapping[str, Any]
) -> Found:
    """The adapters of a run that was broken off, each at its best step so far."""

    def stop(members: Sequence[Member], evaluated: bool) -> None:
        for member in members:
            member.stop()

    frozen = _Frozen(checkpoints.latest())
    return train_adapters(assignments, base, checkpoints=frozen, referee=stop, wish=lambda: 0, **more)  # type: ignore[arg-type]


@dataclass
class _Frozen:
    """A checkpoint to begin with; writes none."""

    state: State | None
    kept_step = 0

    def latest(self) -> State | None:
        return self.state

    def after_step(self, members: Sequence[Member], evaluated: bool) -> None: ...

    def save(self, members: Sequence[Member]) -> bool:
        return True


def record(trial: Trial, found: Trained | TrainingFailed, state: str = COMPLETE) -> None:
    """Write down how a trial ended."""
    if isinstance(found, TrainingFailed):
        trial.state, trial.note = FAILED, found.message
        return
    note_history(trial, found.history)
    trial.state = state


def note_history(trial: Trial, history: History) -> None:
    """What a trial was measured at; its figures are those of the step that is kept."""
    step = history.kept_step if history.kept_step is not None else len(history.losses)
    at = next((one for one in reversed(history.evaluations) if one["step"] == step), None)
    at = at or (history.evaluations[-1] if history.evaluations else None)
    trial.evaluations = [dict(one) for one in history.evaluations]
    trial.steps, trial.tokens, trial.seconds = len(history.losses), history.tokens, round(history.seconds, 3)
    if at is not None:
        trial.step, trial.loss = int(at["step"]), at["loss"]
        trial.metrics = {key: value for key, value in at.items() if key != "step"}


def stored_trial(store: Store, name: str, search: Search, trial: Trial) -> Ref | None:
    """The version that this search stored of a trial before, as it is now."""
    for version in reversed(store.versions(name) if name in store.names() else []):
        ref = Ref(name, version=version)
        told = store.card(ref).origin.get("search")
        mine = {"id": search.id, "trial": trial.number, "loss": trial.loss}
        if isinstance(told, dict) and {key: told.get(key) for key in mine} == mine:
            return store.resolve(ref)
    return None


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Parts of at most so many."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
