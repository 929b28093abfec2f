"""From a recipe to a stored version: data, base, training, proof of effect, metrics, card, store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..bases.load import Base, load_base
from ..bases.quiet import quiet
from ..errors import Unsupported
from ..evaluation.evaluate import evaluate
from ..events import Evaluated, Listener, Note, Stage, ignore
from ..formats.card import Card, examples_of
from ..formats.specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec
from ..names import Ref, check_name
from ..recipe import FileData, Recipe, load_recipe, recipe_dict
from ..runtime.certificate import measure
from ..runtime.prompting import position_limit
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.registry import make_task
from ..tasks.rows import Rows, read_hub, read_jsonl
from ..tasks.tag import Tag
from ..tasks.task import Task
from ..training.loop import History
from ..training.train import Trained, train_adapter
from .rescue import rescued

_LIBRARIES = ("adapterhub-lite", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")


def train(
    recipe: str | Path | Recipe,
    *,
    store: Store | None = None,
    base: Base | None = None,
    overrides: Mapping[str, object] | Sequence[str] = (),
    name: str | None = None,
    on_event: Listener = ignore,
) -> Ref:
    """Train what a recipe describes and store it as a new version.

    Args:
        recipe: a built-in recipe's name, the path of a YAML file, or a loaded recipe.
        base: a base that is loaded already; it must be the recipe's, in the recipe's quantisation.
        overrides: {"training.epochs": 1} or ["training.epochs=1"].
        name: the adapter's name in the store, instead of the recipe's.

    Raises:
        RecipeError, DataError: found before the first step.
        TrainingFailed, NoEffect: nothing is published.
        StoreError: it was trained, but could not be stored; the message says where it is kept.
    """
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    name = check_name(name or plan.name)
    store = store if store is not None else Store()
    started = time.perf_counter()
    rows = read_data(plan)
    store.prepare()
    task = make_task(recipe_dict(plan)["task"])
    task.prepare(rows["train"])
    base = base or load_base(plan.base, plan.quantize, on_event=on_event)
    _check_base(plan, base)
    _check_positions(plan, base)
    examples = {
        split: task.examples(part, base.tokenizer, base.kind, plan.training.max_length)
        for split, part in rows.items()
        if split != "test"
    }
    on_event(Stage(f"training {name} on {base.name}: {len(examples['train'])} examples"))
    trained = train_adapter(
        plan,
        base,
        examples["train"],
        examples.get("validation", ()),
        labels=len(task.labels) if isinstance(task, Classify | Tag) else 0,
        start_text=_describe(task),
        on_event=on_event,
    )
    ref = _publish(store, name, plan, base, task, rows, trained, started, on_event)
    on_event(Note(f"stored {ref} ({(ref.digest or '')[:12]})"))
    return ref


def read_data(recipe: Recipe) -> dict[str, Rows]:
    """The rows of each part a recipe names.

    Raises:
        DataError: a file or dataset cannot be read.
    """
    parts = {}
    for split, source in recipe.data.parts():
        if isinstance(source, FileData):
            parts[split] = read_jsonl(source.resolve(recipe.folder))
        else:
            parts[split] = read_hub(source.hub, source.split, source.config, source.revision)
    return parts


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


def _publish(
    store: Store,
    name: str,
    plan: Recipe,
    base: Base,
    task: Task,
    rows: dict[str, Rows],
    trained: Trained,
    started: float,
    on_event: Listener,
) -> Ref:
    runtime = Runtime(base, store, slots=1, batch_size=64, on_event=on_event)
    try:
        with quiet():
            held = runtime.attach(trained.adapter, task)
            effect = measure(runtime, held)
            metrics: dict[str, dict[str, float]] = {}
            examples: dict[str, Any] = {}
            split = next((s for s in ("test", "validation") if s in rows), None)
            if split is not None:
                title = f"measuring {name} on {split}"
                found = evaluate(runtime, task, rows[split], held, on_event, title)
                metrics[split], examples[split] = found.metrics, examples_of(found.answers)
                on_event(Evaluated(split, len(trained.history.losses), metrics[split]))
    finally:
        runtime.close()
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
        origin={"kind": "trained", **_history(trained.history)},
        duration_seconds=round(time.perf_counter() - started, 3),
    )
    files = trained.adapter.files()
    try:
        return store.put(name, dict(files), card)
    except OSError as error:  # also a StoreError: hours of work are not lost to a full disk
        raise rescued(name, files, card, base, store, error) from error


def _history(history: History) -> dict[str, Any]:
    return {
        "steps": len(history.losses),
        "tokens": history.tokens,
        "training_seconds": round(history.seconds, 3),
        "losses": [round(v, 5) for v in history.losses],
        "evaluations": history.evaluations,
    }
