"""The whole life of two adapters on one base, measured as it happens."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..bases.inputs import pad_rows
from ..bases.load import Base, load_base
from ..bases.quiet import quiet
from ..errors import StoreError
from ..evaluation.evaluate import evaluate
from ..events import Listener, Progress, Stage, ignore
from ..names import Ref
from ..recipe import load_recipe, recipe_dict
from ..runtime.generate import end_tokens
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.prompts import prompt_ids
from ..tasks.registry import make_task
from ..tasks.rows import Rows
from ..tasks.task import Task
from .merge import merge
from .merge_base import MERGED
from .train import libraries, read_data, train

BASE = "smollm2-135m-instruct"
RECIPES = ("sql", "sentiment")
Print = Callable[[str], None]


@dataclass
class _Subject:
    """One adapter of the demo with the task it is measured on."""

    ref: Ref
    task: Task
    test: Rows
    metric: str
    scores: dict[str, float] = field(default_factory=dict)


def run_demo(
    json_path: Path | None = None, *, store: Store | None = None, say: Print = print, on_event: Listener = ignore
) -> dict[str, Any]:
    """Load, train, store, compare, swap, mix, merge; returns every figure, and writes them to `json_path` if given.

    Raises:
        StoreError: `json_path` cannot be written (found before the work begins).
    """
    started = time.perf_counter()
    _check_writable(json_path)
    store = store if store is not None else Store()
    base = load_base(BASE, quantize="nf4", on_event=on_event)
    figures: dict[str, Any] = {"libraries": libraries(), "base": _say_base(base, say)}
    subjects = {name: _train(name, store, base, say, on_event) for name in RECIPES}
    figures["adapters"] = {name: _facts(store, s) for name, s in subjects.items()}
    runtime = Runtime(base, store, slots=4, batch_size=64)
    figures["quality"] = _compare(runtime, subjects, say, on_event)
    figures["swap"] = _swap(runtime, subjects, say)
    figures["mixed_batch"] = _mix(runtime, subjects, say)
    runtime.close()
    figures["merge"] = _merge(store, base, subjects["sql"], say, on_event)
    figures["frozen"] = {"digest_before": figures["base"]["live_digest"], "digest_after": base.live_digest()}
    unmoved = figures["frozen"]["digest_before"] == figures["frozen"]["digest_after"]
    figures["seconds"] = round(time.perf_counter() - started, 1)
    say(
        f"\nThe base {'did not move' if unmoved else 'MOVED'}: its weights' digest is {base.live_digest()[:12]} "
        f"{'before and after' if unmoved else 'now'}. Took {figures['seconds']:.0f} s."
    )
    _say_next(store, figures["merge"]["out"], say)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", "utf-8")
    return figures


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.", "Name another file for --json.") from error


def _say_base(base: Base, say: Print) -> dict[str, Any]:
    say(f"\n1. Base {base.name}, frozen, {base.quantization} ({base.source.origin})")
    say(f"   fingerprint {base.fingerprint.digest[:12]}  {base.memory}")
    for name, choice in base.choices.items():
        say(f"   {name} {choice.value}: {choice.reason}")
    memory = {
        "quantized": base.memory.quantized,
        "other": base.memory.other,
        "working_copies": base.memory.working_copies,
    }
    return {
        "name": base.name,
        "origin": base.source.origin,
        "fingerprint": base.fingerprint.to_dict(),
        "memory_bytes": memory,
        "live_digest": base.live_digest(),
    }


def _train(name: str, store: Store, base: Base, say: Print, on_event: Listener) -> _Subject:
    recipe = load_recipe(name)
    ref = train(recipe, store=store, base=base, on_event=on_event)
    card = store.card(ref)
    origin = card.origin
    say(
        f"\n{2 + RECIPES.index(name)}. Trained and stored {ref}  ({card.adapter['type']}, "
        f"{card.adapter['parameters']:,} parameters, {card.adapter['bytes'] / 1e6:.1f} MB)"
    )
    say(
        f"   {origin['steps']} steps, {origin['tokens']:,} tokens in {origin['training_seconds']:.0f} s "
        f"({origin['tokens'] / origin['training_seconds']:.0f} tokens/s), "
        f"loss {origin['losses'][0]:.2f} -> {statistics.mean(origin['losses'][-10:]):.2f}"
    )
    say(f"   moves logits by up to {card.effect['max_logit_change']:.1f}; digest {(ref.digest or '')[:12]}")
    task = make_task(recipe_dict(recipe)["task"])
    rows = read_data(recipe)
    task.prepare(rows["train"])
    return _Subject(ref, task, rows["test"], task.primary_metric, dict(card.metrics["test"]))


def _facts(store: Store, subject: _Subject) -> dict[str, Any]:
    card = store.card(subject.ref)
    keys = ("steps", "tokens", "training_seconds")
    return {
        "ref": str(subject.ref),
        "digest": subject.ref.digest,
        **card.adapter,
        **{k: card.origin[k] for k in keys},
        "effect": card.effect,
        "metrics": card.metrics,
    }


def _compare(runtime: Runtime, subjects: dict[str, _Subject], say: Print, on_event: Listener) -> dict[str, Any]:
    say("\n4. On the untouched test parts")
    say(f"   {'task':<12}{'metric':<18}{'rows':>5}{'base alone':>14}{'base + adapter':>17}")
    found = {}
    for name, s in subjects.items():
        alone = evaluate(runtime, s.task, s.test, None, on_event, f"measuring the bare base on {name}").metrics
        metric = s.metric
        say(f"   {name:<12}{metric:<18}{len(s.test):>5}{alone[metric]:>14.1%}{s.scores[metric]:>17.1%}")
        found[name] = {"metric": metric, "rows": len(s.test), "base": alone, "adapter": s.scores}
    return found


def _swap(runtime: Runtime, subjects: dict[str, _Subject], say: Print) -> dict[str, Any]:
    """base -> sql -> sentiment -> base on the live model, the first test row of each task as the question."""
    sql, sentiment = subjects["sql"], subjects["sentiment"]
    question, review = sql.task.inputs(sql.test)[0], sentiment.task.inputs(sentiment.test)[0]
    asked = sentiment.task.encode(review, runtime.base.tokenizer, "causal", 0)
    for s in subjects.values():
        runtime.load(s.ref)
    say("\n5. Swapping on the live model (adapters resident, so a swap is an index)")
    say(f"   question: {question.splitlines()[-1]}\n   review:   {review}")
    answers = []
    for ref in (None, sql.ref, sentiment.ref, None):
        micros = _swap_time(runtime, ref)
        # The base and the SQL adapter answer the question, the sentiment adapter the review.
        ids = asked if ref is sentiment.ref else sql.task.encode(question, runtime.base.tokenizer, "causal", 0)
        text = runtime.generate_ids([ids], ref, 40)[0]
        answers.append({"adapter": str(ref) if ref else None, "swap_microseconds": micros, "answer": text})
        say(f"   {ref or 'base'!s:<14}{micros:>6.1f} us   {' '.join(text.split())[:84]}")
    runtime.use(None)
    return {"steps": answers}


def _swap_time(runtime: Runtime, ref: Ref | None, rounds: int = 200) -> float:
    """Median microseconds of `use(ref)`, coming from another adapter each time."""
    other = None if ref is not None else runtime.store.resolve("sql")
    times = []
    for _ in range(rounds):
        runtime.use(other)
        begun = time.perf_counter()
        runtime.use(ref)
        times.append(time.perf_counter() - begun)
    return round(statistics.median(times) * 1e6, 2)


def _mix(runtime: Runtime, subjects: dict[str, _Subject], say: Print) -> dict[str, Any]:
    """One batch whose rows use sql, sentiment and no adapter, against each row alone."""
    tokenizer = runtime.base.tokenizer
    prompts, rows = [], []
    for i in range(4):
        for s in subjects.values():
            prompts.append(s.task.encode(s.task.inputs(s.test)[i], tokenizer, "causal", 0))
            rows.append(s.ref)
    for text in ("What is the capital of France?", "Name three colours.", "Write one sentence about rain."):
        prompts.append(prompt_ids(tokenizer, text))
        rows.append(None)  # type: ignore[arg-type]
    begun = time.perf_counter()
    mixed = runtime.generate_ids(prompts, rows, 32)
    seconds = time.perf_counter() - begun
    alone = [runtime.generate_ids([p], r, 32)[0] for p, r in zip(prompts, rows, strict=True)]
    equal = sum(a == b for a, b in zip(mixed, alone, strict=True))
    say(f"\n6. One batch of {len(rows)} rows (4 sql, 4 sentiment, 3 without adapter) in {seconds:.2f} s")
    for row in (0, 1, len(rows) - 3):
        say(f"   {rows[row] or 'base'!s:<14}{' '.join(mixed[row].split())[:98]}")
    say(f"   {equal} of {len(rows)} rows equal their solo answers, token for token")
    return {"rows": len(rows), "equal": equal, "seconds": round(seconds, 3), "answers": mixed, "solo": alone}


def _merge(store: Store, base: Base, sql: _Subject, say: Print, on_event: Listener) -> dict[str, Any]:
    out = _new_folder(store.path / MERGED, str(sql.ref).replace("@", "-"))
    # The metric is measured below by plain transformers' own generate.
    report = merge(sql.ref, out, store=store, base=base, metric_rows=0, on_event=on_event)
    say(f"\n7. Merged into a standalone checkpoint, loaded with plain transformers: {out}")
    for line in report.lines():
        if line not in report.notes:  # they tell that no metric was asked for, and it follows
            say(f"   {line}")
    on_event(Stage("measuring the merged checkpoint with plain transformers"))
    with quiet():
        answers = plain_answers(out, base, sql.task, sql.test, on_event)
    merged = dict(sql.task.metrics(sql.test, answers))
    metric = sql.metric
    say(
        f"   {metric} on {len(sql.test)} test rows: base + adapter {sql.scores[metric]:.1%}, "
        f"merged {merged[metric]:.1%} (difference {merged[metric] - sql.scores[metric]:+.1%})"
    )
    return {**report.to_dict(), "metrics": merged}


def plain_answers(folder: Path, base: Base, task: Task, rows: Rows, on_event: Listener) -> list[str]:
    """Greedy answers of a checkpoint folder by plain transformers' own `generate`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype, local_files_only=True)
    model = model.to(base.device).eval()
    prompts = [task.encode(t, base.tokenizer, base.kind, 0) for t in task.inputs(rows)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        on_event(Progress("generating with plain transformers", start, len(order), "rows"))
        ids, mask = (t.to(base.device) for t in pad_rows([prompts[i] for i in part], base.pad_id, left=True))
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=int(task.config["max_new_tokens"]),
                do_sample=False,
                pad_token_id=base.pad_id,
                eos_token_id=sorted(end_tokens(base)),
            )
        for i, row in zip(part, out[:, ids.shape[1] :], strict=True):
            answers[i] = base.tokenizer.decode(row, skip_special_tokens=True)
    on_event(Progress("generating with plain transformers", len(order), len(order), "rows"))
    return answers


def _new_folder(parent: Path, name: str) -> Path:
    """A path in `parent` that does not exist yet."""
    found = parent / name
    count = 1
    while found.exists():
        count += 1
        found = parent / f"{name}-{count}"
    return found


def _say_next(store: Store, merged: str, say: Print) -> None:
    say(f"\nThe store is {store.path}\nThe merged checkpoint is {merged}\nTry next:")
    say("   ahl list")
    say(r"   ahl run --adapter sql $'CREATE TABLE boats (id INTEGER, name TEXT)\n\nHow many boats are there?'")
    say("   ahl chat")
