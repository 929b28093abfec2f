"""Search a recipe's learning rate, rank and the like by the validation loss, within a time; publish the winner."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import read_adapter
from ..bases.load import Base
from ..errors import TrainingFailed, TrainingInterrupted, Unsupported
from ..events import Listener, Note, Stage, ignore
from ..formats.card import Card
from ..names import Ref, check_name
from ..recipe import Recipe, changed_recipe, recipe_dict
from ..store import Store
from ..training.member import History
from ..training.schedule import step_counts
from ..training.signals import Wish
from ..training.train import Trained
from .publish import Origin, _history, adapter_summary, base_summary, libraries, publish
from .search_draw import draw, need_optuna
from .search_group import Crew, Found, base_of, chunks, first_job, group_size, record, stored_trial, train_group
from .search_journal import Search, absolute
from .search_judge import HALVING, PRUNERS, Clock, Judge
from .search_results import SearchResult, ranked, write_results
from .search_space import Space, checked_space, default_space, read_space, space_dict, value_at
from .search_trials import COMPLETE, CUT, PRUNED, Trial
from .train import Overrides, _loaded

TOGETHER = 4
"""Trials that are drawn, and trained, at once."""
_EVALUATIONS = 8
_SHARE = 0.25  # of the work that evaluating may take
_LISTED = 200  # trials that the winner's card tells of


def tune(
    recipe: str | Path | Recipe,
    *,
    budget: float | None = None,
    trials: int | None = None,
    space: Path | Mapping[str, Any] | None = None,
    pruner: str = HALVING,
    seed: int | None = None,
    together: int = TOGETHER,
    store: Store | None = None,
    base: Base | None = None,
    overrides: Overrides = (),
    name: str | None = None,
    resume: bool = False,
    from_scratch: bool = False,
    out: Path | None = None,
    on_event: Listener = ignore,
) -> SearchResult:
    """Try parameters of a recipe, drawn by Optuna, and store the adapter with the best validation loss.

    With `trials` and without `budget` the same seed gives the same trials and the same winner, broken off or not.

    Args:
        budget: seconds to search in, the loading of the base among them; publishing comes after it. A trial that
            cannot be measured once more in time is cut where it is.
        trials: how many at most; one of both is needed.
        space: a YAML file, or {"rank": [8, 16], "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}.
        pruner: halving (the worse half ends after a quarter and half of the steps), median or none.
        together: trials that are drawn and trained at once.
        out: a folder for results.csv, results.json and plot.png; None: the search's own in the store.

    Raises:
        RecipeError, DataError, Unsupported: found before a base is loaded.
        TrainingFailed: no trial could be measured; or there is a search to go on with.
    """
    clock = Clock(budget)
    _check(budget, trials, pruner, together, resume, from_scratch)
    need_optuna()
    plan = _loaded(recipe, overrides)
    plan = replace(plan, name=check_name(name or plan.name))
    given = None if space is None else _space(space, plan)
    store = store if store is not None else Store()
    first = first_job(plan, store)
    store.prepare()
    seed = plan.training.seed if seed is None else seed
    told = {"space": space_dict(given) if given else None, "seed": seed, "together": together, "pruner": pruner}
    with Search(store.path, "tune", first.identity(), told) as search, Wish() as wish:
        search.check(resume, from_scratch)
        crew = Crew(store, first, search, base_of(plan, base, on_event), base is None, on_event)
        ranges = given or default_space(plan, crew.base.kind == "encoder")
        asked = {"budget": budget, "trials": trials, "pruner": pruner, "seed": seed, "together": together}
        asked |= {"space": False if isinstance(space, Mapping) else absolute(space), "out": absolute(out)}
        search.begin(first.identity(crew.base), space=space_dict(ranges), asked=asked)
        hunt = _Hunt(crew, _measured_often(plan, first.rows), ranges, seed, pruner, together, clock, wish)
        hunt.run(trials)
        return write_results(search, hunt.result(), out)


def _check(
    budget: float | None, trials: int | None, pruner: str, together: int, resume: bool, from_scratch: bool
) -> None:
    if budget is None and trials is None:
        raise Unsupported("A search needs an end.", "Give it a budget in time (--budget 20m) or a number of --trials.")
    if (budget is not None and not 0 < budget < math.inf) or (trials is not None and trials < 1) or together < 1:
        raise Unsupported("Budget, trials and together are more than 0.", "Give larger ones.")
    if pruner not in PRUNERS:
        raise Unsupported(f"There is no pruner {pruner!r}.", f"One of: {', '.join(PRUNERS)}.")
    if resume and from_scratch:
        raise Unsupported("To go on and to begin anew exclude each other.", "Ask for one of them.")


def _space(given: Path | Mapping[str, Any], plan: Recipe) -> Space:
    return checked_space(given, plan) if isinstance(given, Mapping) else read_space(Path(given), plan)


def _measured_often(plan: Recipe, rows: Mapping[str, Any]) -> Recipe:
    """With up to eight evaluations, as many as take a quarter of the work, and the best step kept.

    A row costs a third as much to measure as to learn from: a forward, without the backward that is twice as much.
    """
    training = plan.training
    changes: dict[str, object] = {} if training.keep else {"training.keep": "best"}
    if training.eval_every is None:
        sizes = training.batch_size, training.gradient_accumulation
        _, total = step_counts(len(rows["train"]), *sizes, training.epochs, training.max_steps)
        learnt = total * training.batch_size * training.gradient_accumulation
        count = min(_EVALUATIONS, max(2, int(_SHARE * 3 * learnt / max(len(rows["validation"]), 1))))
        changes["training.eval_every"] = max(1, math.ceil(total / count))
    return changed_recipe(plan, changes) if changes else plan


class _Hunt:
    """Rounds of trials: drawn, trained together, written down."""

    def __init__(
        self, crew: Crew, plan: Recipe, space: Space, seed: int, pruner: str, together: int, clock: Clock, wish: Wish
    ) -> None:
        self._crew, self._plan, self._space, self._seed = crew, plan, space, seed
        self._pruner, self._together, self._clock, self._wish = pruner, together, clock, wish
        self._search = crew.search
        self._started = time.perf_counter()
        self._longest_first = 0.0  # seconds that a round took at least
        self._partial: dict[int, tuple[Trial, Trained]] = {}

    def run(self, most: int | None) -> None:
        """Until the time, the trials or the patience of whoever pressed Ctrl-C is at its end."""
        while not self._wish.number:
            waiting = [trial for trial in self._search.trials if trial.is_open]
            if not waiting:
                ended = len(self._search.trials)
                if (most is not None and ended >= most) or (ended and self._clock.left < self._longest_first):
                    return
                left = self._together if most is None else min(self._together, most - ended)
                waiting = self._ask(left)
            try:
                self._round(waiting)
            except TrainingInterrupted:
                return

    def _ask(self, count: int) -> list[Trial]:
        trials = self._search.trials
        turn = max((trial.round for trial in trials), default=-1) + 1
        drawn = draw(self._space, trials, count, self._seed, turn)
        if not trials and (own := self._own_values()) is not None:
            drawn[0] = own  # what the recipe says itself is tried first
        new = [Trial(len(trials) + i, parameters, turn) for i, parameters in enumerate(drawn)]
        self._search.trials += new
        self._search.write()
        return new

    def _own_values(self) -> dict[str, Any] | None:
        own = {path: value_at(self._plan, path) for path in self._space}
        inside = all(
            own[path] in part.values if hasattr(part, "values") else part.low <= own[path] <= part.high
            for path, part in self._space.items()
        )
        return own if inside else None

    def _round(self, waiting: Sequence[Trial]) -> None:
        plans = {trial.number: self._recipe(trial) for trial in waiting}
        head = self._search.head
        if "fits" not in head:
            head["fits"] = group_size(
                self._crew, list(plans.values()), len(waiting), timed=self._clock.budget is not None
            )
            self._search.write()
        begun = self._clock.now
        for group in chunks(waiting, max(int(head["fits"]), 1)):
            others = [trial for trial in self._search.trials if trial not in group]
            judge = Judge(group, others, self._space, self._pruner, self._clock)
            keeper = _Keeper(self, group, judge)
            train_group(
                self._crew, [plans[one.number] for one in group], keeper, judge, lambda: self._wish.number,
                keeper.interrupted,
            )  # fmt: skip
        spans = [one.seconds * one.evaluations[0]["step"] / one.steps for one in waiting if one.evaluations]
        self._longest_first = min(self._clock.now - begun, max(spans, default=math.inf))
        best = ranked(self._search.trials)[0]
        if best.loss is not None:
            self._crew.on_event(Note(f"{len(self._search.trials)} trials; best: {best.loss:.4f} (trial {best.number})"))

    def _recipe(self, trial: Trial) -> Recipe:
        made = changed_recipe(self._plan, trial.parameters)
        return replace(made, name=f"{self._plan.name[:55]}-t{trial.number}")

    def keep(self, trial: Trial, trained: Trained) -> None:
        """Write card and, where it may win, adapter of a trial beside the journal."""
        recipe = replace(self._recipe(trial), name=self._plan.name)
        job = self._crew.job(recipe)
        card = Card(
            adapter=adapter_summary(trained.adapter),
            base=base_summary(self._crew.base),
            task={**job.task.config, "max_length": recipe.training.max_length},
            recipe=recipe_dict(recipe),
            data={split: part.summary() for split, part in job.rows.items()},
            seed=recipe.training.seed,
            libraries=libraries(),
            metrics={"validation": dict(trial.metrics)} if trial.metrics else {},
            parents=[str(job.start)] if job.start else [],
            origin={"kind": "trained", **_history(trained.history), "search": self._told(trial)},
            duration_seconds=trial.seconds,
        )
        files = trained.adapter.files() if trial.state != PRUNED or self._is_best(trial) else {}
        self._search.keep(trial.number, {**files, "card.json": card.to_bytes()})

    def keep_partial(self, trial: Trial, trained: Trained) -> None:
        """Remember what a trial that goes on later is worth now."""
        now = Trial(trial.number, trial.parameters, trial.round)
        record(now, trained, CUT)
        if now.loss is not None:
            self._partial[trial.number] = (now, trained)

    def _is_best(self, trial: Trial) -> bool:
        return ranked([one for one in self._search.trials if one.loss is not None or one is trial])[0] is trial

    def _told(self, trial: Trial) -> dict[str, Any]:
        return {"kind": "tune", "id": self._search.id, "trial": trial.number, "parameters": trial.parameters,
                "state": trial.state, "loss": trial.loss}  # fmt: skip

    def result(self) -> SearchResult:
        """Store the best, and say what was found. Raises as `publish`."""
        search, number = self._search, self._wish.number
        ref = self.publish()
        if not number:
            search.end()
        name, code = self._plan.name, 128 + number if number else 0
        return SearchResult("tune", name, search.id, ranked(search.trials), ref, search.folder, (), code, search.head)

    def publish(self) -> Ref | None:
        """Store the best of all trials under the recipe's name, unless this search did so before.

        Raises:
            TrainingFailed: nothing was measured.
        """
        search, crew = self._search, self._crew
        worth = [trial for trial in search.trials if trial.loss is not None]
        best = ranked([*worth, *(now for now, _ in self._partial.values())])[:1]
        if not best:
            if self._wish.number:
                raise TrainingInterrupted.by(self._wish.number, 0, True)
            notes = sorted({trial.note for trial in search.trials if trial.note})
            hint = "Lower the learning rates of the space, or add training.warmup."
            raise TrainingFailed(f"No trial could be measured. {' '.join(notes[:1])}".strip(), hint)
        trial, name = best[0], self._plan.name
        ref = stored_trial(crew.store, name, search, trial)
        if ref is not None:
            return ref
        crew.on_event(Stage(f"publishing trial {trial.number} as {name}"))
        trained = self._partial[trial.number][1] if trial.number in self._partial else self._kept(trial)
        job = crew.job(replace(self._recipe(trial), name=name))
        states = [one.state or "open" for one in search.trials]
        told = self._told(trial) | {
            "space": search.head["space"],
            "seed": self._seed,
            "counts": {state: states.count(state) for state in sorted(set(states))},
            "trials": [
                {"number": one.number, "parameters": one.parameters, "state": one.state, "loss": one.loss}
                for one in ranked(search.trials)[:_LISTED]
            ],
        }
        origin = Origin(self._started, [job.start] if job.start else [], {"search": told})
        ref = publish(crew.store, name, job.plan, crew.base, job.task, job.rows, trained, origin, crew.on_event)
        for one in search.trials:
            if one.number == trial.number:
                one.ref, one.test = str(ref), dict(crew.store.card(ref).metrics.get("test") or {})
        search.write()
        crew.on_event(Note(f"stored {ref} ({(ref.digest or '')[:12]})"))
        return ref

    def _kept(self, trial: Trial) -> Trained:
        folder = self._search.kept(trial.number)
        origin = Card.from_bytes((folder / "card.json").read_bytes()).origin
        history = History(
            losses=origin["losses"], evaluations=origin["evaluations"], tokens=origin["tokens"],
            seconds=origin["training_seconds"], kept_step=origin.get("kept_step"),
            ended=origin.get("ended", "finished"),
        )  # fmt: skip
        return Trained(read_adapter(folder, name=self._plan.name), history)


class _Keeper:
    """Writes down how the trials of a group ended."""

    def __init__(self, hunt: _Hunt, group: Sequence[Trial], judge: Judge) -> None:
        self._hunt, self._group, self._judge = hunt, group, judge

    def __call__(self, found: Found) -> None:
        search = self._hunt._search
        for trial, trained in zip(self._group, found, strict=True):
            record(trial, trained, self._judge.states.get(trial.number, COMPLETE))
            trial.total = self._judge.totals.get(trial.number, trial.steps)
        for trial, trained in zip(self._group, found, strict=True):
            if isinstance(trained, Trained):
                if trial.state == COMPLETE and trained.history.ended != "finished":
                    trial.note = trained.history.ended
                self._hunt.keep(trial, trained)
        search.write()

    def interrupted(self, found: Found) -> None:
        """Some may be the best so far, all go on another time."""
        for trial, trained in zip(self._group, found, strict=True):
            if isinstance(trained, Trained):
                self._hunt.keep_partial(trial, trained)
