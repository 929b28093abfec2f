"""Bake a stored adapter into a standalone checkpoint, verified against base + adapter before it appears."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import stored_adapter
from ..bases.inputs import pad_rows
from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import MergeFailed, StoreError
from ..events import Listener, Stage, ignore
from ..formats.card import Card
from ..merging.checkpoint import Checkpoint
from ..merging.merge import check_out, staged_merge, write_report
from ..merging.plan import MergePlan, plan_merge
from ..merging.report import Difference, MergeReport, Thresholds, compare_logits
from ..names import Ref
from ..runtime.certificate import PROBES
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.registry import make_task
from ..tasks.tag import Tag
from .data import split_rows
from .own_base import load_own_base

_PROBE_ROWS = 24
_PROBE_TOKENS = 256
_HEADED = ("SEQ_CLS", "TOKEN_CLS")


def merge(
    ref: str | Ref,
    out: str | Path,
    *,
    store: Store | None = None,
    base: Base | None = None,
    bake: str = "auto",
    dtype: str = "auto",
    thresholds: Thresholds | None = None,
    on_event: Listener = ignore,
) -> MergeReport:
    """Merge an adapter into its base and write a checkpoint that plain transformers loads.

    The result is loaded with plain transformers and compared with base + adapter on rows of the version's own test data
    (fixed texts where the data is not at hand). Only then does `out` appear, with merge_report.json in it.

    Args:
        base: the adapter's base, if it is loaded already.
        bake: dequantised (the weights that the quantised base computed with), original (the checkpoint's), or auto.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.

    Raises:
        MergeFailed: the result is further from base + adapter than `thresholds`; nothing is left.
        BaseMismatch, AdapterMismatch, Unsupported: why it cannot be merged.
    """
    store = store if store is not None else Store()
    started = time.perf_counter()
    resolved = store.resolve(ref)
    card = store.card(resolved)
    check_out(Path(out).expanduser().absolute())
    base = base or load_own_base(card, on_event=on_event)
    _check_place(Path(out), store, base)
    runtime = Runtime(base, store, slots=1, on_event=on_event)
    try:
        runtime.load(resolved)
        plan = _plan(store, resolved, card, runtime, bake, dtype)
        on_event(Stage(f"merging {resolved} into {base.name}"))
        with staged_merge(plan, base.source.folder, Path(out), on_event=on_event) as staged:
            on_event(Stage("verifying the merged checkpoint with plain transformers"))
            report = MergeReport(
                adapter=str(resolved),
                digest=resolved.digest or "",
                base=base.name,
                out=str(Path(out).expanduser().absolute()),
                bake=plan.bake,
                quantization=plan.quantization,
                dtype=plan.dtype,
                changed_tensors=len(plan.changed),
                tensors=sum(map(len, plan.shards.values())),
                bytes=plan.nbytes,
                difference=_difference(runtime, resolved, card, staged),
                effect_kl=_effect(runtime, resolved, card),
                thresholds=thresholds or Thresholds(),
                seconds=round(time.perf_counter() - started, 3),
            )
            _require_passed(report)
            write_report(staged, report.to_dict())
    finally:
        runtime.close()
    return report


def _require_passed(report: MergeReport) -> None:
    if not report.passed:
        raise MergeFailed(
            f"The merged model differs too much from base + adapter. {report.lines()[1]}.",
            "Nothing was written. Try bake=dequantised or dtype=float32, or loosen the thresholds.",
        )


def _plan(store: Store, ref: Ref, card: Card, runtime: Runtime, bake: str, dtype: str) -> MergePlan:
    adapter = stored_adapter(store.read(ref))
    task = runtime.task(ref)
    base = runtime.base
    with quiet():
        return plan_merge(
            adapter,
            Checkpoint.open(base.source.folder),
            quantization=card.base.get("quantization") or base.quantization,
            bake=bake,
            dtype=dtype,
            labels=task.labels if isinstance(task, Classify | Tag) else None,
        )


def _effect(runtime: Runtime, ref: Ref, card: Card) -> float | None:
    """How far the bare base is from base + adapter; None for classifiers and taggers, which the bare base is not."""
    if runtime.store.spec(ref).task_type in _HEADED:
        return None
    rows = probe_rows(runtime.base, card)
    adapted, bare = (runtime.logits(rows, r, _decoder_rows(runtime.base, rows)) for r in (ref, None))
    return compare_logits(adapted, bare).mean_kl


def _check_place(out: Path, store: Store, base: Base) -> None:
    """A checkpoint written among a store's versions, or into its own base, would break them."""
    target = out.expanduser().absolute().parent.resolve() / out.name
    kept = [store.path.resolve() / part for part in ("adapters", "aliases", "objects", "tmp")]
    inside = next((k for k in (*kept, base.source.folder.resolve()) if target.is_relative_to(k)), None)
    if inside is not None:
        raise StoreError(f"{out} is inside {inside}.", "Name a folder outside the store and the base.")


def _difference(runtime: Runtime, ref: Ref, card: Card, staged: Path) -> Difference:
    base = runtime.base
    rows = probe_rows(base, card)
    expected = runtime.logits(rows, ref, _decoder_rows(base, rows))
    with quiet():
        merged = plain_logits(staged, base, rows, runtime.store.spec(ref).task_type)
    return compare_logits(expected, merged)


def probe_rows(base: Base, card: Card) -> list[list[int]]:
    """Token ids to compare on: questions of the version's own test data, or fixed texts."""
    rows = split_rows(card, "test")
    if rows is None or not card.task.get("type"):
        return [list(base.tokenizer(text)["input_ids"])[:_PROBE_TOKENS] for text in PROBES]
    task = make_task(card.task)
    texts = task.inputs(rows)[:_PROBE_ROWS]
    return [task.encode(text, base.tokenizer, base.kind, _PROBE_TOKENS)[:_PROBE_TOKENS] for text in texts]


def plain_logits(folder: Path, base: Base, rows: list[list[int]], task_type: str | None) -> list[torch.Tensor]:
    """Logits of a checkpoint folder by plain transformers: [tokens, vocabulary or labels] or [labels] a row."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    classifies = task_type == "SEQ_CLS"
    kind: Any = AutoModelForSeq2SeqLM if base.kind == "seq2seq" else AutoModelForCausalLM
    headed: dict[str | None, Any] = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
    }
    loader: Any = headed.get(task_type, kind)
    model = loader.from_pretrained(folder, dtype=base.dtype, use_safetensors=True, local_files_only=True)
    model = model.to(base.device).eval()
    if classifies and model.config.pad_token_id is None:
        model.config.pad_token_id = base.pad_id
    ids, mask = (t.to(base.device) for t in pad_rows(rows, base.pad_id, left=False))
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given = rows
    if base.kind == "seq2seq" and not classifies:
        given = [[base.config.decoder_start_token_id, *r] for r in _decoder_rows(base, rows) or []]
        arguments["decoder_input_ids"] = pad_rows(given, base.pad_id, left=False)[0].to(base.device)
    with torch.inference_mode():
        logits = model(**arguments).logits
    return list(logits) if classifies else [logits[i, : len(row)] for i, row in enumerate(given)]


def _decoder_rows(base: Base, rows: list[list[int]]) -> list[list[int]] | None:
    return [row[:16] for row in rows] if base.kind == "seq2seq" else None
