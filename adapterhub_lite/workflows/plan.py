"""A plan before the first step: what a run will take, and the setup that loses least time of those that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..bases.load import Base, load_base
from ..errors import Unsupported
from ..events import Listener, Note, Stage, ignore
from ..recipe import FileData, Recipe, recipe_dict
from ..recipe.training import AUTO
from ..store import Store
from ..training.batches import Order
from ..training.planning.calibrate import TooLarge, calibrate, copies_dropped, drop_copies, heeded_by
from ..training.planning.plan import FIELDS, Plan, Setup, fits, ladder, memory_of, parse_size
from ..training.planning.room import room, settle
from ..training.train import Assignment
from .plan_refusal import refusal
from .plan_told import Tried, copies_there, is_hopeless, line, longest_row, plan_of

# Timing packs would take a notable part of a run with less to do: parameters times tokens times 6, its products.
_LONG = 1e13
_SMALL = 0.02  # a base of this share of the memory that there is can be trained on, whatever else there is
_ASKED = ("recompute_mlp", "offload", "table_on_host")  # what only some computations heed


def plan(
    *recipes: str | Path | Recipe,
    store: Store | None = None,
    base: Base | None = None,
    overrides: Mapping[str, object] | Sequence[str] = (),
    fit: int | str | None = None,
    on_event: Listener = ignore,
) -> Plan:
    """What training these recipes, together if several, takes on this machine. Nothing is trained or stored.

    Args:
        store: where `start_from` is looked up.
        base: a base that is loaded already; it is left as it was.
        fit: bytes, or text such as 8GB, that the process (the device, on a GPU) may hold at most.

    Raises:
        RecipeError, DataError, Unsupported: as training would.
        CapacityError: it does not fit, whichever setup is taken; the hint says what to change.
    """
    from .train import _assignment, _jobs, _loaded, check_together

    limit = None if fit is None else parse_size(fit)
    plans = [_loaded(recipe, overrides) for recipe in recipes]
    check_together(plans)
    store = store if store is not None else Store()
    jobs = _jobs(plans, store)
    base = base or load_base(plans[0].base, plans[0].quantize, working_copies=wanted_copies(plans), on_event=on_event)
    assignments = [_assignment(job, base, store, len(jobs) > 1, on_event) for job in jobs]
    on_event(Stage("trying a few packs"))
    return best_plan(assignments, base, limit)


def best_plan(
    assignments: Sequence[Assignment],
    base: Base,
    fit: int | None = None,
    *,
    may_drop: bool = True,
    keep_choice: bool = False,
    repeats: int = 2,
) -> Plan:
    """The plan with the setup that loses least time of those that fit.

    Args:
        may_drop: whether working copies may be done without.
        keep_choice: leave the base without them, if that was chosen.

    Raises:
        CapacityError: none fits.
    """
    has_copies = copies_there(base)
    tried: list[Tried] = []
    bare: int | None = None  # libraries' first use counts as what training takes, also where setups were tried before
    for setup, heeds in _setups(assignments, base, may_drop):
        if is_hopeless(setup, tried):
            continue
        drops = has_copies and not setup.working_copies
        chosen = False
        bare = bare if bare is not None and not drops else None
        with copies_dropped(base, lambda: not (chosen and keep_choice)) if drops else nullcontext():  # noqa: B023
            try:
                found = calibrate(assignments, base, setup.settings, fit, repeats, bare)
            except TooLarge as error:
                tried.append(Tried(setup, error.bytes, base=error.base, limit=error.limit))
                continue
            memory, bare = memory_of(found), found.base
            if fits(memory, fit):
                chosen = True
                settle(base.device)
                if drops and keep_choice:
                    base.memory = replace(base.memory, working_copies=0)
                return plan_of(assignments, base, setup, found, tried, fit, heeds)
            there = memory.base + memory.available
            tried.append(Tried(setup, memory.peak, memory, memory.base, there if fit is None else min(fit, there)))
    least = Tried(setup, 0) if fit is None else _without_limit(assignments, base, setup, has_copies)
    raise refusal(assignments, base, [*tried, least] if least.peak else tried, fit, heeds)


def _setups(assignments: Sequence[Assignment], base: Base, may_drop: bool) -> Iterator[tuple[Setup, frozenset[str]]]:
    """The setups to try, each with the settings that are known to change something; what costs time to know is asked
    for after the first one.
    """
    heeds = _known(assignments, base)
    first = _ladder(assignments, base, may_drop, heeds)[0]
    yield first, heeds
    heeds = heeded_by(assignments, base)
    for setup in _ladder(assignments, base, may_drop, heeds):
        if setup != first:
            yield setup, heeds


def _without_limit(assignments: Sequence[Assignment], base: Base, setup: Setup, has_copies: bool) -> Tried:
    """What the least of all setups takes, as far as there is room for it."""
    with copies_dropped(base, lambda: True) if has_copies and not setup.working_copies else nullcontext():
        try:
            memory = memory_of(calibrate(assignments, base, setup.settings, None, 0, None))
        except TooLarge as error:
            return Tried(setup, error.bytes)
    return Tried(setup, memory.peak, memory)


def chosen_setup(assignments: Sequence[Assignment], base: Base, own: bool, on_event: Listener) -> Setup:
    """How a new run is computed: by a plan, which is told, where the run is large enough for one.

    Args:
        own: whether the base was loaded for this run alone, and may lose its working copies.

    Raises:
        CapacityError: it does not fit.
    """
    is_long = _products(assignments, base) > _LONG
    if not is_long and base.memory.total < _SMALL * room(base.device):
        return setup_of(assignments, base)
    made = best_plan(assignments, base, may_drop=own, keep_choice=own, repeats=int(is_long))
    on_event(Note(line(made)))
    return made.setup


def kept_setup(assignments: Sequence[Assignment], base: Base, told: Mapping[str, Any], own: bool) -> Setup:
    """How a run goes on: as it was begun, but for what the recipe says now."""
    if own and told.get("working_copies") is False and copies_there(base):
        drop_copies(base)
        base.memory = replace(base.memory, working_copies=0)
    found = setup_of(assignments, base)
    configs = [one.recipe.training for one in assignments]
    for name in FIELDS:
        value = told.get(name)
        right = type(value) is int and value > 0 if name == "pack_tokens" else isinstance(value, bool)
        # Of working copies counts what is there: they may be another's.
        if right and name != "working_copies" and all(getattr(c, name) == AUTO for c in configs):
            found = replace(found, **{name: value})  # type: ignore[arg-type]  # `right` has looked
    return found


def wanted_copies(plans: Sequence[Recipe]) -> bool | None:
    """Whether recipes ask for working copies, or for none; None leaves it to what there is room for."""
    wanted = {plan.training.working_copies for plan in plans} - {AUTO}
    return None if not wanted else False not in wanted


def write_recipe(recipe: Recipe, made: Plan, path: Path) -> None:
    """Write the recipe with the plan's setup to a new file.

    Raises:
        Unsupported: the file is there already.
    """
    told = recipe_dict(recipe)
    for part, source in recipe.data.parts():
        if isinstance(source, FileData):
            told["data"][part] = str(source.resolve(recipe.folder))
    told["training"] |= made.chosen
    text = f"# {made.learnings[0].name}, computed so that it fits\n" + yaml.safe_dump(told, sort_keys=False)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise Unsupported(f"{path} is there already.", "Name a file that is not.") from error


def setup_of(assignments: Sequence[Assignment], base: Base) -> Setup:
    """The setup that recipes get where everything fits: the fastest, but for what they say themselves."""
    return _ladder(assignments, base, True, _known(assignments, base))[0]


def _known(assignments: Sequence[Assignment], base: Base) -> frozenset[str]:
    """The settings that change something here, as far as the fastest setup depends on it."""
    asked = any(getattr(one.recipe.training, name) is True for one in assignments for name in _ASKED)
    return heeded_by(assignments, base) if asked else frozenset()


def _ladder(assignments: Sequence[Assignment], base: Base, may_drop: bool, heeds: frozenset[str]) -> list[Setup]:
    configs = [one.recipe.training for one in assignments]
    dequantises = base.quantization != "none"
    longest, copies = longest_row(assignments), copies_there(base)
    return ladder(configs, longest, copies, base.device.type, may_drop, heeds, dequantises)


def _products(assignments: Sequence[Assignment], base: Base) -> float:
    """Additions and multiplications of a whole run, roughly."""
    tokens = sum(
        Order(one.recipe.training, one.train).total
        * one.recipe.training.batch_size
        * one.recipe.training.gradient_accumulation
        * sum(len(e.ids) for e in one.train)
        / len(one.train)
        for one in assignments
    )
    return 6 * sum(parameter.numel() for parameter in base.model.parameters()) * tokens
