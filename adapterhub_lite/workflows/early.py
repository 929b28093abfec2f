"""What is wrong with a recipe beyond its own text, known before its base is loaded: its PEFT method, and its start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..adapters.injected import check_options
from ..errors import AdapterMismatch, FormatError, NotFound, Problem, RecipeError, Unsupported
from ..formats.card import Card
from ..formats.peft_config import parse_adapter_config
from ..formats.specs import HEADED, LoraSpec, PrefixSpec, Spec
from ..names import Ref
from ..recipe import LoraAdapter, PrefixAdapter, Recipe
from ..recipe.options import PeftAdapter
from ..store import Store
from ..tasks.task import Task
from ..training.trainable_peft import check_method, option_problems

_AS_TRAINED = "Give the recipe the adapter part that it was trained with (`ahl show` tells it)."


def check_adapter(plan: Recipe) -> None:
    """Make sure that there is the PEFT method that a recipe names, with these options.

    Raises:
        RecipeError: there is not; with the lines.
    """
    adapter = plan.adapter
    if not isinstance(adapter, PeftAdapter):
        return
    try:
        check_method(adapter.method)
    except Unsupported as error:
        raise _wrong(plan, ("adapter.method", error.message, error.hint)) from error
    found = [
        (f"adapter.options.{key}", told, hint) for key, told, hint in option_problems(adapter.method, adapter.options)
    ]
    if not found:
        try:
            check_options(adapter.method, adapter.options)
        except AdapterMismatch as error:
            found = [("adapter.options", error.message, error.hint)]
    if found:
        raise _wrong(plan, *found)


def found_start(plan: Recipe, store: Store) -> Ref | None:
    """The version that a recipe starts from.

    Raises:
        RecipeError: it is not in the store.
    """
    if plan.start_from is None:
        return None
    try:
        return store.resolve(plan.start_from)
    except NotFound as error:
        raise _wrong(plan, ("start_from", error.message, error.hint)) from error


def check_start(plan: Recipe, store: Store, start: Ref | None, task: Task) -> None:
    """Make sure that the version which a recipe starts from is of its adapter's type and size, and has its labels.

    Layers and widths are compared when the base is there.

    Raises:
        RecipeError: it is not.
        StoreCorrupt: its bytes are not those that were stored.
    """
    if start is None:
        return
    stored = store.read(start)
    try:
        spec = parse_adapter_config(stored.config)
    except (FormatError, Unsupported) as error:
        raise _wrong(plan, ("start_from", error.message, error.hint)) from error
    found = [*_unlike(plan.adapter, spec, str(start)), *_other_labels(spec, stored.card, task, str(start))]
    if found:
        raise _wrong(plan, *(("start_from", told, hint) for told, hint in found))


def _unlike(adapter: Any, spec: Spec, name: str) -> Iterator[tuple[str, str]]:
    """What differs, and what to do; nothing where only the base can tell."""
    other_kind = (
        f"{name} is no adapter of type {adapter.type}, which the recipe trains.", "Start from one of that type."
    )  # fmt: skip
    if isinstance(adapter, PrefixAdapter):
        if not isinstance(spec, PrefixSpec):
            yield other_kind
        elif adapter.projection:
            yield (
                f"The network of a prefix with a projection is not stored, so {name} cannot be its start.",
                "Set adapter.projection: false to go on with its keys and values.",
            )
        elif spec.num_virtual_tokens != adapter.tokens:
            yield f"{name} has {spec.num_virtual_tokens} tokens, the recipe's {adapter.tokens}.", _AS_TRAINED
    elif isinstance(adapter, LoraAdapter):
        if not isinstance(spec, LoraSpec) or spec.use_dora != (adapter.type == "dora"):
            yield other_kind
        else:
            yield from _other_lora(adapter, spec, name)
    else:
        yield "Adapters of type peft cannot start from a stored version.", "Leave start_from out."


def _other_lora(adapter: LoraAdapter, spec: LoraSpec, name: str) -> Iterator[tuple[str, str]]:
    if spec.lora_bias:
        yield f"{name} has biases, which are not trained here.", "Start from an adapter without lora_bias."
    if adapter.rank_pattern or adapter.alpha_pattern or spec.rank_pattern or spec.alpha_pattern:
        return  # patterns of two makers may say the same in other words
    if spec.rank != adapter.rank:
        yield f"{name} has rank {spec.rank}, the recipe's {adapter.rank}.", _AS_TRAINED
        return
    theirs = spec.scaling("", spec.rank)
    ours = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
    if abs(theirs - ours) > 1e-9 * abs(ours):
        yield f"{name} is scaled by {theirs:g}, the recipe's by {ours:g} (alpha, rslora).", _AS_TRAINED


def _other_labels(spec: Spec, card: Card, task: Task, name: str) -> Iterator[tuple[str, str]]:
    before, now = card.task.get("labels"), task.config.get("labels")
    if spec.task_type in HEADED and before and list(before) != list(now or ()):
        yield (
            f"{name} has {len(before)} labels ({', '.join(before[:5])}), "
            f"this task {len(now or ())} ({', '.join((now or ())[:5])}).",
            "Give the recipe the same labels in the same order, as task.labels.",
        )


def _wrong(plan: Recipe, *found: tuple[str, str, str]) -> RecipeError:
    """An error of (path, what, hint)."""
    problems = [Problem(path, told, hint, plan.line_of(path)) for path, told, hint in found]
    return RecipeError(plan.source or plan.name, problems)
