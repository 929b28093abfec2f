"""A grid of recipes: every point trained together on one base, stored, and set in a table."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bases.load import Base
from ..errors import NoEffect, TrainingFailed, Unsupported
from ..events import Listener, Note, ignore
from ..names import Ref, check_name
from ..recipe import Recipe
from ..store import Store
from .early import check_start
from .publish import Origin, publish
from .search_group import Crew, Found, base_of, chunks, first_job, group_size, record, stored_trial, train_group
from .search_journal import Search, absolute
from .search_results import SearchResult, ranked, write_results
from .search_space import Point, grid_points, grid_words
from .search_trials import FAILED, Trial
from .train import Overrides, _loaded

MOST_TOGETHER = 16


def sweep(
    recipe: str | Path | Recipe,
    grid: Mapping[str, Iterable[object]] | Sequence[str],
    *,
    store: Store | None = None,
    base: Base | None = None,
    overrides: Overrides = (),
    name: str | None = None,
    together: int | None = None,
    resume: bool = False,
    from_scratch: bool = False,
    out: Path | None = None,
    on_event: Listener = ignore,
) -> SearchResult:
    """Train every point of a grid, store a version of each under `<name>-<point>`, and compare them.

    Args:
        grid: {"rank": [8, 16], "learning_rate": [1e-4, 3e-4]} or ["rank=8,16", ...]; fields of adapter and training.
        together: most that are trained at once; None as many as fit, 16 at most. What is learnt does not depend on it.
        out: a folder for results.csv, results.json and plot.png; None: the search's own in the store.

    Raises:
        RecipeError, DataError, Unsupported: found before a base is loaded.
        TrainingFailed: no point could be stored; or there is a sweep to go on with, and what else `train` says.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is kept.
    """
    if resume and from_scratch:
        raise Unsupported("To go on and to begin anew exclude each other.", "Ask for one of them.")
    plan = _loaded(recipe, overrides)
    plan = replace(plan, name=check_name(name or plan.name))
    grid = {key: list(values) for key, values in grid.items()} if isinstance(grid, Mapping) else list(grid)
    points = grid_points(plan, grid)
    store = store if store is not None else Store()
    first = first_job(plan, store)
    for point in points:
        check_start(point.recipe, store, first.start, first.task)
    store.prepare()
    told = {"grid": [{"parameters": point.parameters, "name": point.name} for point in points]}
    with Search(store.path, "sweep", first.identity(), told) as search:
        search.check(resume, from_scratch)
        if not search.is_done:
            crew = Crew(store, first, search, base_of(plan, base, on_event), base is None, on_event)
            search.begin(first.identity(crew.base), asked={"grid": grid_words(grid), "out": absolute(out)})
            _train_points(crew, points, together)
            search.end()
        return write_results(search, _result(search, plan.name), out)


def _train_points(crew: Crew, points: Sequence[Point], together: int | None) -> None:
    search = crew.search
    if not search.trials:
        search.trials = [Trial(point.number, point.parameters) for point in points]
        plans = [point.recipe for point in points]
        search.head["together"] = group_size(crew, plans, together or MOST_TOGETHER)
        search.write()
    for group in chunks(points, int(search.head["together"])):
        if any(search.trials[point.number].is_open for point in group):
            train_group(crew, [point.recipe for point in group], _Keeper(crew, group))
    if all(trial.state == FAILED for trial in search.trials):
        raise TrainingFailed(
            f"No point of the grid could be stored: {search.trials[0].note}",
            "Lower the learning rates, or add training.warmup.",
        )


class _Keeper:
    """Publishes what a group has learnt, one after the other, and writes each down."""

    def __init__(self, crew: Crew, group: Sequence[Point]) -> None:
        self._crew, self._group, self._started = crew, group, time.perf_counter()

    def __call__(self, found: Found) -> None:
        search = self._crew.search
        for point, trained in zip(self._group, found, strict=True):
            trial = search.trials[point.number]
            if not trial.is_open:
                continue
            if not isinstance(trained, TrainingFailed) and trained.history.ended != "finished":
                trial.note = trained.history.ended
            record(trial, trained)
            if not isinstance(trained, TrainingFailed):
                self._publish(point, trial, trained)
            search.write()

    def _publish(self, point: Point, trial: Trial, trained: Any) -> None:
        crew, search = self._crew, self._crew.search
        told: dict[str, Any] = {
            "search": {"kind": "sweep", "id": search.id, "trial": trial.number, "parameters": trial.parameters,
                       "loss": trial.loss, "points": len(search.trials)},
        }  # fmt: skip
        job = crew.job(point.recipe)
        origin = Origin(self._started, [job.start] if job.start else [], told)
        try:
            ref = stored_trial(crew.store, point.name, search, trial) or publish(
                crew.store, point.name, point.recipe, crew.base, job.task, job.rows, trained, origin, crew.on_event
            )
        except NoEffect as error:
            trial.state, trial.note = FAILED, error.message
            crew.on_event(Note(f"{point.name}: {error.message}", "warning"))
            return
        trial.ref, trial.test = str(ref), dict(crew.store.card(ref).metrics.get("test") or {})
        crew.on_event(Note(f"stored {ref} ({(ref.digest or '')[:12]})"))


def _result(search: Search, name: str) -> SearchResult:
    trials = ranked(search.trials)
    best = next((Ref.parse(trial.ref) for trial in trials if trial.ref), None)
    return SearchResult("sweep", name, search.id, trials, best, search.folder, head=search.head)
