"""From recipes to stored versions: data, base, training, and what is published of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, stored_adapter
from ..bases.load import Base, load_base
from ..errors import AdapterHubError, NoEffect, TrainingFailed, Unsupported
from ..events import Listener, Note, Stage, ignore
from ..names import Ref, check_name
from ..recipe import Recipe, load_recipe, recipe_dict
from ..runtime.admit import compare_base
from ..runtime.prompting import position_limit
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.instruct import Instruct
from ..tasks.registry import make_task
from ..tasks.rows import Rows
from ..tasks.tag import Tag
from ..tasks.task import Task
from ..training.runs.run import Identity, Run, data_identity
from ..training.train import Assignment, Trained, train_adapters
from .early import check_adapter, check_start, found_start
from .plan import chosen_setup, kept_setup, wanted_copies
from .publish import Origin, publish
from .publish import base_summary as base_summary
from .publish import libraries as libraries
from .recipe_data import changed_since
from .recipe_data import read_data as read_data

Overrides = Mapping[str, object] | Sequence[str]


def train(
    recipe: str | Path | Recipe,
    *,
    store: Store | None = None,
    base: Base | None = None,
    overrides: Overrides = (),
    name: str | None = None,
    resume: bool = False,
    from_scratch: bool = False,
    on_event: Listener = ignore,
) -> Ref:
    """Train what a recipe describes and store it as a new version.

    Args:
        recipe: a built-in recipe's name, the path of a YAML file, or a loaded recipe.
        base: a base that is loaded already; it must be the recipe's, in the recipe's quantisation.
        overrides: {"training.epochs": 1} or ["training.epochs=1"].
        name: the adapter's name in the store, instead of the recipe's.
        resume: go on with the run that was broken off; the result is what it would have been.
        from_scratch: begin anew although there is one.

    Raises:
        RecipeError, DataError: found before the first step.
        TrainingFailed, NoEffect: nothing is published; also where a run was broken off and neither `resume` nor
            `from_scratch` is given, and where what it was begun with has changed.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is kept.
        StoreError: it was trained, but could not be stored, and the message says where it is kept; or another process
            trains the same.
    """
    plan = _loaded(recipe, overrides)
    plan = replace(plan, name=check_name(name or plan.name))
    (ref,) = _train([plan], store, base, resume, from_scratch, on_event)
    return ref


def train_together(
    recipes: Sequence[str | Path | Recipe],
    *,
    store: Store | None = None,
    base: Base | None = None,
    overrides: Overrides = (),
    resume: bool = False,
    from_scratch: bool = False,
    on_event: Listener = ignore,
) -> list[Ref]:
    """Train several recipes at once on one base, each exactly as it would be alone, and store a version of each.

    Args:
        overrides: apply to every recipe; the other arguments are those of `train`.

    Raises:
        Unsupported: their bases or quantisations differ.
        TrainingFailed: one of them diverged; the others are stored all the same, and the message names them.
    """
    plans = [_loaded(recipe, overrides) for recipe in recipes]
    check_together(plans)
    return _train(plans, store, base, resume, from_scratch, on_event)


def check_together(plans: Sequence[Recipe]) -> None:
    """Raise Unsupported if these cannot be trained on one base."""
    if not plans:
        raise Unsupported("There is no recipe to train.", "Name one at least.")
    first = plans[0]
    for plan in plans[1:]:
        for what, one, other in (("base", first.base, plan.base), ("quantize", first.quantize, plan.quantize)):
            if one != other:
                raise Unsupported(
                    f"{first.name} has {what}: {one}, {plan.name} has {what}: {other}; trained together they share one "
                    "base in memory.",
                    "Train them one after the other, or give them the same.",
                )


@dataclass
class _Job:
    """One recipe on its way through a run."""

    plan: Recipe
    rows: dict[str, Rows]
    task: Task
    start: Ref | None = None

    @cached_property
    def data(self) -> dict[str, dict[str, Any]]:
        """What a run remembers of the rows."""
        return {part: data_identity(rows) for part, rows in self.rows.items()}

    def identity(self, base: Base | None = None) -> Identity:
        """What its run is made of, as far as it is known."""
        start = f"{self.start} {(self.start.digest or '')[:12]}" if self.start else ""
        source = str(Path(self.plan.source).absolute()) if self.plan.source else ""
        made = Identity(self.plan.name, recipe_dict(self.plan), self.data, start=start, source=source)
        if base is None:
            return made
        told = {"name": base.name, "quantization": base.quantization}
        told |= {key: choice.value for key, choice in base.choices.items()} | base.fingerprint.to_dict()
        return replace(made, base=told, libraries=libraries())


def _train(
    plans: Sequence[Recipe],
    store: Store | None,
    base: Base | None,
    resume: bool,
    from_scratch: bool,
    on_event: Listener,
) -> list[Ref]:
    if resume and from_scratch:
        raise Unsupported("To go on with a run and to begin anew exclude each other.", "Ask for one of them.")
    store = store if store is not None else Store()
    started = time.perf_counter()
    jobs = _jobs(plans, store)
    store.prepare()
    parts = [job.rows for job in jobs]
    with Run(store.path, [job.identity() for job in jobs], on_event=on_event) as run:
        run.check(resume, from_scratch, parts)
        own = base is None
        base = base or load_base(
            plans[0].base, plans[0].quantize, working_copies=wanted_copies(plans), on_event=on_event
        )
        assignments = [_assignment(job, base, store, len(jobs) > 1, on_event) for job in jobs]
        setup = None if resume else chosen_setup(assignments, base, own, on_event)
        told = asdict(setup) if setup else None
        checkpoints = run.begin([job.identity(base) for job in jobs], parts, resume, told, **_checkpointing(plans))
        settings = (setup or kept_setup(assignments, base, run.computed, own)).settings
        for job, one in zip(jobs, assignments, strict=True):
            on_event(Stage(f"training {job.plan.name} on {base.name}: {len(one.train)} examples"))
        found = train_adapters(assignments, base, checkpoints=checkpoints, settings=settings, on_event=on_event)
        pairs = zip(plans, found, strict=True)
        run.note_diverged({plan.name: one.message for plan, one in pairs if isinstance(one, TrainingFailed)})
        refs = _publish_all(store, jobs, base, found, run, resume, started, on_event)
        run.done = True
    return refs


def _jobs(plans: Sequence[Recipe], store: Store) -> list[_Job]:
    """Recipes with their rows read and what they start from found; what is wrong with one is said first."""
    for plan in plans:
        check_adapter(plan)
    return [prepared(plan, store) for plan in plans]


def prepared(plan: Recipe, store: Store) -> _Job:
    """A recipe with its rows read, its task ready, and what it starts from found.

    Raises:
        DataError: a row that cannot be read.
        RecipeError: `start_from` names nothing, or nothing that the recipe could go on with.
    """
    start = found_start(plan, store)
    job = _Job(plan, read_data(plan), make_task(recipe_dict(plan)["task"]), start)
    job.task.prepare(job.rows["train"])
    check_start(plan, store, start, job.task)
    return job


def _publish_all(
    store: Store,
    jobs: Sequence[_Job],
    base: Base,
    found: Sequence[Trained | TrainingFailed],
    run: Run,
    resume: bool,
    started: float,
    on_event: Listener,
) -> list[Ref]:
    """A version of each that was trained; after that the first failure is raised, where there is one."""
    refs: list[Ref] = []
    failures: list[AdapterHubError] = []
    for index, (job, trained) in enumerate(zip(jobs, found, strict=True)):
        if isinstance(trained, TrainingFailed):
            failures.append(trained)
            continue
        told: dict[str, Any] = {"run": run.id, "learner": index}
        if len(jobs) > 1:
            told["together"] = [other.plan.name for other in jobs]
        if changed := changed_since(job.rows):
            told["data_changed"] = changed
            on_event(Note(f"{', '.join(changed)} changed while {job.plan.name} was trained", "warning"))
        ref = _stored_before(store, job.plan.name, run.id, index) if resume else None
        origin = Origin(started, [job.start] if job.start else [], told)
        try:
            ref = ref or publish(store, job.plan.name, job.plan, base, job.task, job.rows, trained, origin, on_event)
        except NoEffect as error:
            run.done = len(jobs) == 1  # it would be the same again
            failures.append(error)
            continue
        on_event(Note(f"stored {ref} ({(ref.digest or '')[:12]})"))
        refs.append(ref)
    if failures:
        first = failures[0]
        beside = f" Stored beside it: {', '.join(map(str, refs))}." if refs else ""
        raise type(first)(first.message + beside, first.hint)
    return refs


def _stored_before(store: Store, name: str, run: str, learner: int) -> Ref | None:
    """The version that this run stored before it was broken off, if it came so far."""
    for version in reversed(store.versions(name) if name in store.names() else []):
        ref = Ref(name, version=version)
        origin = store.card(ref).origin
        if origin.get("run") == run and origin.get("learner") == learner:
            return store.resolve(ref)
    return None


def _loaded(recipe: str | Path | Recipe, overrides: Overrides) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)


def _checkpointing(plans: Sequence[Recipe]) -> dict[str, Any]:
    """When checkpoints are written: as often as the most careful recipe wants."""
    configs = [plan.training for plan in plans]
    return {
        "steps": min((c.checkpoint_steps for c in configs if c.checkpoint_steps), default=None),
        "seconds": min((c.checkpoint_seconds for c in configs if c.checkpoint_seconds), default=None),
        "evaluations": any(c.checkpoints for c in configs),
    }


def _assignment(job: _Job, base: Base, store: Store, together: bool, on_event: Listener) -> Assignment:
    """What is trained, checked as far as it can be before the first step."""
    plan, task = job.plan, job.task
    _check_base(plan, base)
    _check_positions(plan, base)
    examples = {
        split: task.examples(part, base.tokenizer, base.kind, plan.training.max_length)
        for split, part in job.rows.items()
        if split != "test"
    }
    for remark in task.remarks if isinstance(task, Instruct) else ():
        on_event(Note(remark, "warning"))
    lines = job.rows["train"].lines
    return Assignment(
        plan,
        examples["train"],
        examples.get("validation", ()),
        labels=len(task.labels) if isinstance(task, Classify | Tag) else 0,
        start_text=_describe(task),
        start=_start(job, base, store, on_event) if job.start else None,
        name=plan.name if together else "",
        lines=lines if len(lines) == len(examples["train"]) else (),
    )


def _start(job: _Job, base: Base, store: Store, on_event: Listener) -> Adapter:
    """The adapter to start from, if it was made for this base."""
    assert job.start is not None
    card = store.card(job.start)
    remark = compare_base(str(job.start), card.base, base)
    if remark:
        on_event(Note(remark, "warning"))
    return stored_adapter(store.read(job.start))


def _check_base(plan: Recipe, base: Base) -> None:
    if base.name != plan.base and str(base.source.folder) != str(Path(plan.base).expanduser().absolute()):
        raise Unsupported(
            f"The recipe is for base {plan.base}, the loaded one is {base.name}.", "Load the recipe's base."
        )
    if base.quantization != plan.quantize:
        raise Unsupported(
            f"The recipe asks for quantize: {plan.quantize}, the base is loaded with {base.quantization}.",
            f"Load it with quantize={plan.quantize!r}, or override quantize={base.quantization}.",
        )


def _check_positions(plan: Recipe, base: Base) -> None:
    limit = position_limit(base)
    if limit is not None and plan.training.max_length > limit:
        raise Unsupported(
            f"training.max_length {plan.training.max_length} exceeds the {limit} positions of {base.name}.",
            f"Set training.max_length to {limit} or less.",
        )


def _describe(task: Task) -> str:
    """A text that says what the task is, for a prefix to start from."""
    if isinstance(task, Classify):
        words = ", ".join(task.words)
        return f"Read the text and decide which one of these describes it: {words}. Answer in one word: {words}."
    return str(
        task.config.get("system") or "Follow the instruction. Answer with the result alone, without explanation."
    )
