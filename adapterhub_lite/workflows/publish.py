"""A trained adapter becomes a stored version: proof of effect, metrics, card, store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..adapters.adapter import Adapter
from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import NoEffect
from ..evaluation.evaluate import evaluate
from ..events import Evaluated, Listener
from ..formats.card import Card, examples_of
from ..formats.specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec
from ..names import Ref
from ..recipe import Recipe, recipe_dict
from ..recipe.training import LEARNING_RATES
from ..runtime.certificate import measure
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.rows import Rows
from ..tasks.task import Task
from ..training.member import FINISHED, History
from ..training.train import Trained
from .rescue import rescued

_LIBRARIES = ("adapterhub-lite", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")
_SEVERAL = frozenset({"together", "search"})  # in an origin: others are trained beside it, or before and after


@dataclass(frozen=True)
class Origin:
    """How a version came to be, beside its recipe.

    Attributes:
        parents: the version that it started from.
        told: more that the card's origin says: the run, who was trained beside it.
        started: when, by `time.perf_counter`.
    """

    started: float
    parents: Sequence[Ref] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


def publish(
    store: Store,
    name: str,
    plan: Recipe,
    base: Base,
    task: Task,
    rows: Mapping[str, Rows],
    trained: Trained,
    origin: Origin,
    on_event: Listener,
) -> Ref:
    """Prove that the adapter does something, measure it, and store it with its card.

    Raises:
        NoEffect: it moves no logit.
        StoreError: it could not be stored; the message says where it is kept.
    """
    learner = name if origin.told.keys() & _SEVERAL else ""
    try:
        effect, metrics, examples = _measured(store, name, learner, base, task, rows, trained, on_event)
    except NoEffect as error:
        raise NoEffect(error.message, _what_to_try(error, plan, trained.history)) from error
    card = Card(
        adapter=adapter_summary(trained.adapter),
        base=base_summary(base),
        task={**task.config, "max_length": plan.training.max_length},
        recipe=recipe_dict(plan),
        data={split: part.summary() for split, part in rows.items()},
        seed=plan.training.seed,
        libraries=libraries(),
        metrics=metrics,
        effect=effect,
        examples=examples,
        parents=[str(parent) for parent in origin.parents],
        origin={"kind": "trained", **_history(trained.history), **origin.told},
        duration_seconds=round(time.perf_counter() - origin.started, 3),
    )
    files = trained.adapter.files()
    try:
        return store.put(name, dict(files), card)
    except OSError as error:  # also a StoreError: hours of work are not lost to a full disk
        raise rescued(name, files, card, base, store, error) from error


def _what_to_try(error: NoEffect, plan: Recipe, history: History) -> str:
    """What came of the training, and what to change of it."""
    training, losses = plan.training, history.losses
    went = f" took the loss from {losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""
    told = f"{len(losses)} steps at a rate of {training.learning_rate:g} at most{went}"
    if "not finite" in error.message:
        return f"{error.hint} {told}: lower training.learning_rate, or add training.warmup."
    usual = LEARNING_RATES[plan.adapter.type]
    return f"{error.hint} {told}: raise training.learning_rate (the default is {usual:g}) or training.epochs."


def libraries() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def adapter_summary(adapter: Adapter) -> dict[str, Any]:
    """What a card says of the adapter's shape and size."""
    size = {
        "tensors": len(adapter.tensors),
        "parameters": adapter.parameters,
        "bytes": sum(t.nbytes for t in adapter.tensors.values()),
    }
    if isinstance(adapter.spec, LoraSpec):
        kind = "dora" if adapter.spec.use_dora else "lora"
        return {"type": kind, "rank": adapter.spec.rank, "alpha": adapter.spec.alpha, **size}
    if isinstance(adapter.spec, FactoredSpec):
        return {"type": adapter.spec.method.lower(), "rank": adapter.spec.rank, "alpha": adapter.spec.alpha, **size}
    if isinstance(adapter.spec, Ia3Spec):
        return {"type": "ia3", **size}
    if isinstance(adapter.spec, InjectedSpec):
        return {"type": adapter.spec.method.lower(), **size}
    kind = "prefix" if isinstance(adapter.spec, PrefixSpec) else "prompt"
    return {"type": kind, "tokens": adapter.spec.num_virtual_tokens, **size}


def base_summary(base: Base) -> dict[str, Any]:
    """What a card says of the base; repo and commit only where its files came from the Hub."""
    kind, _, repo = base.source.origin.partition(" ")
    from_hub = {"repo": repo, "commit": base.source.revision} if kind == "hub" else {}
    return {
        "name": base.name,
        "revision": base.source.revision,
        "kind": base.kind,
        "fingerprint": base.fingerprint.to_dict(),
        "quantization": base.quantization,
        "dtype": base.choices["dtype"].value,
        **from_hub,
    }


def _measured(
    store: Store,
    name: str,
    learner: str,
    base: Base,
    task: Task,
    rows: Mapping[str, Rows],
    trained: Trained,
    on_event: Listener,
) -> tuple[dict[str, Any], dict[str, dict[str, float]], dict[str, Any]]:
    """Effect, metrics and example answers, from a runtime as it would be served by."""
    metrics: dict[str, dict[str, float]] = {}
    examples: dict[str, Any] = {}
    runtime = Runtime(base, store, slots=1, batch_size=64, on_event=on_event)
    try:
        with quiet():
            held = runtime.attach(trained.adapter, task)
            effect = measure(runtime, held)
            split = next((s for s in ("test", "validation") if s in rows), None)
            if split is not None:
                title = f"measuring {name} on {split}"
                found = evaluate(runtime, task, rows[split], held, on_event, title)
                metrics[split], examples[split] = found.metrics, examples_of(found.answers)
                on_event(Evaluated(split, len(trained.history.losses), metrics[split], learner))
    finally:
        runtime.close()
    return effect, metrics, examples


def _history(history: History) -> dict[str, Any]:
    told = {
        "steps": len(history.losses),
        "tokens": history.tokens,
        "training_seconds": round(history.seconds, 3),
        "losses": [round(v, 5) for v in history.losses],
        "evaluations": history.evaluations,
    }
    if history.ended != FINISHED:
        told["ended"] = history.ended
    if history.kept_step is not None:
        told["kept_step"] = history.kept_step
    return told
