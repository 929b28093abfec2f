"""Bake stored adapters into a standalone checkpoint, verified against base + adapters before it appears."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, stored_adapter
from ..bases.load import Base
from ..errors import MergeFailed, Unsupported
from ..events import Listener, Stage, ignore
from ..formats.card import Card, utc_now
from ..merging.besides import besides
from ..merging.checkpoint import Checkpoint
from ..merging.inputs import Inputs
from ..merging.merge import check_out
from ..merging.plan import MergePlan
from ..merging.report import BakeFigures, Member, MergeReport, Thresholds
from ..merging.residual import Factors
from ..names import Ref
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.registry import make_task
from ..tasks.tag import Tag
from .data import split_rows
from .merge_bakes import BOTH, Trial, better, measure_bakes
from .merge_base import check_base, check_place, fits, is_loaded, known_base, place_of
from .merge_card import merged_card
from .merge_expected import Expected
from .merge_probe import Measured, Probe, measured_of, probe_of
from .merge_reference import Reference, Served, Streamed, headed_type
from .merge_request import Refs, Request, check_distinct, request_of
from .merge_served import plain_logits as plain_logits
from .merge_verify import Verified, Verifier
from .merge_write import Maker, keep, report_files, staged, write_beside
from .own_base import load_own_base
from .publish import libraries

_CALIBRATION, _CALIBRATION_TOKENS = 32, 256  # training rows that say what layers read, tokens of each


def merge(
    refs: Refs,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    to: str | None = None,
    dtype: str | None = None,
    bake: str = "auto",
    residual: int = 0,
    verify: str = "full",
    thresholds: Thresholds | None = None,
    prompts: str | Path | None = None,
    metric_rows: int = 256,
    store: Store | None = None,
    base: Base | None = None,
    base_name: str | None = None,
    quantize: str | None = None,
    device: str = "auto",
    on_event: Listener = ignore,
) -> MergeReport:
    """Merge adapters into their base and write a model that plain transformers loads.

    The result is loaded with plain transformers and compared with base + adapters on rows of the versions' own test
    data (fixed texts where the data is not at hand). Only then does `out` appear, with merge_report.json and
    merge_report.html in it; the store keeps both too, also of a merge that failed.

    Args:
        refs: `sql@1`, `a@1,b@2`, `a@1=0.7,b@2=0.3`, a list, or a mapping to weights.
        weights: one an adapter; 1 each where left out.
        to: auto (each tensor keeps its type), float32, bfloat16, float16, nf4, int8, gguf-f16 or gguf-q8_0; `dtype` is
            another name of it.
        bake: of a base that was quantised, into the weights it computed with (dequantised) or the checkpoint's
            (original); auto and measured try both and take the better.
        residual: rank of an adapter beside 4-bit weights that adds what rounding lost; 0: none.
        verify: full, or weights: each tensor is read back and compared, and no logits are.
        prompts: a file to compare logits on: a prompt a line, or JSON Lines as the task reads them.
        metric_rows: most test rows to measure each version's task on; 0: none.
        base: the adapters' base, if it is loaded already; else `base_name`, `quantize` and `device` say what to load.

    Raises:
        MergeFailed: the result is further from base + adapters than `thresholds`; nothing is left at `out`.
        BaseMismatch, AdapterMismatch, Unsupported: why it cannot be merged.
    """
    if to is not None and dtype is not None and to != dtype:
        raise Unsupported(f"to={to!r} and dtype={dtype!r} are two names of one thing.", "Give one of them.")
    target = to or dtype or "auto"
    request = request_of(refs, weights, target, bake, residual, verify, thresholds, prompts, metric_rows)
    place = place_of(out)
    check_out(place)
    store = store if store is not None else Store()
    job = _Job(request, place, store, on_event)
    named = base is not None or base_name is not None
    given = base or known_base(job.cards[0][1], base_name, quantize, device, on_event)
    check_place(job.out, store, given)
    job.notes += check_base(job.cards, given, named)
    return job.run(given, base_name, quantize, device)


@dataclass
class _Job:
    """One merge on its way."""

    request: Request
    out: Path
    store: Store
    on_event: Listener
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        found = [(self.store.resolve(ref), weight) for ref, weight in self.request.members]
        check_distinct([ref for ref, _ in found])
        self.members: list[tuple[Ref, float]] = found
        self.cards: list[tuple[Ref, Card]] = [(ref, self.store.card(ref)) for ref, _ in found]
        self.adapters: list[tuple[Adapter, float]] = [(stored_adapter(self.store.read(r)), w) for r, w in found]
        self.task_type = headed_type([adapter for adapter, _ in self.adapters])

    def run(self, base: Base, name: str | None, quantize: str | None, device: str) -> MergeReport:
        """Plan, write, verify, publish."""
        checkpoint = Checkpoint.open(base.source.folder)
        self._maker(base, checkpoint, None).check()  # what cannot be merged is told before a base is loaded
        full = self.request.verify == "full"
        if full and not is_loaded(base) and self._servable() and fits(base, 2):
            base = load_own_base(self.cards[0][1], name=name, quantize=quantize, device=device, on_event=self.on_event)
        reference = self._reference(base, checkpoint) if full else None
        try:
            return self._merged(base, checkpoint, reference)
        finally:
            if reference is not None:
                reference.close()

    def _merged(self, base: Base, checkpoint: Checkpoint, reference: Reference | None) -> MergeReport:
        request, probe = self.request, None
        measured: list[Measured] = []
        if reference is not None:
            probe = probe_of(self.cards, base, request.prompts)
            measured, remarks = measured_of(self.cards, request.metric_rows, request.prompts)
            self.notes += remarks
        maker = self._maker(base, checkpoint, reference)
        verifier = Verifier(base, self.store, reference, probe, measured, self.task_type, self.on_event)
        bakes: tuple[BakeFigures, ...] = ()
        bake = request.bake
        if reference is not None and probe is not None and self._measures(base):
            bakes = self._bakes(base, reference, probe, measured, maker, verifier)
            bake = better(bakes, request.thresholds)
        floats = maker.floats("auto" if bake == "measured" else bake)
        plan = maker.final(floats)
        self.notes += plan.notes
        if not request.gguf:
            self.notes += filter(None, [besides(base.source.folder).remark])
        self.on_event(Stage(f"merging {self._name} into {base.name}"))
        with staged(request, plan, base, self.out, self.on_event) as (folder, residual):
            self.on_event(Stage("verifying the merged model"))
            expected = self._expected(checkpoint, base, floats.bake)
            informed = request.kind == "nf4" and maker.inputs() is not None
            found = verifier.verify(folder, request, floats, expected, residual, informed)
            report = self._report(base, floats, plan, folder, found, bakes)
            files = report_files(report)
            if not report.passed:
                raise _failure(report, self._keep(files))
            chats = bool(base.tokenizer.chat_template)
            write_beside(folder, files, merged_card(report, plan.config, self.cards[0][1].task, chats))
        self._keep(files)
        return report

    def _keep(self, files: Mapping[str, bytes]) -> list[Path]:
        return keep(self.store, [ref for ref, _ in self.members], files, self.on_event)

    @property
    def _name(self) -> str:
        if len(self.members) == 1 and self.members[0][1] == 1.0:
            return str(self.members[0][0])
        return " + ".join(f"{weight:g}*{ref}" for ref, weight in self.members)

    def _servable(self) -> bool:
        """Whether a runtime serves these adapters: it has no place for changes of embeddings."""
        return not any(".lora_embedding_" in key for adapter, _ in self.adapters for key in adapter.tensors)

    def _reference(self, base: Base, checkpoint: Checkpoint) -> Reference:
        if is_loaded(base) and self._servable():
            return Served(base, self.store, self.members, self.task_type, self.on_event)
        why = (
            "its adapters change embeddings" if not self._servable() else "two models of its size do not fit in memory"
        )
        self.notes.append(
            f"Base + adapters were computed with weights streamed from the disk, since {why}; no metric was measured."
        )
        return Streamed(
            base, self.adapters, lambda: Expected(checkpoint, self.adapters, base.quantization), self.on_event
        )

    def _expected(self, checkpoint: Checkpoint, base: Base, bake: str) -> Expected:
        """What must be written: into which weights, the bake says."""
        return Expected(checkpoint, self.adapters, base.quantization if bake == "dequantised" else "none")

    def _measures(self, base: Base) -> bool:
        """Whether to try both bakes: where there are two."""
        asked = self.request.bake in ("auto", "measured")
        if self.request.bake == "measured" and base.quantization == "none":
            self.notes.append("The base is not quantised, so there is one kind of weights to bake into.")
        return asked and base.quantization != "none"

    def _bakes(
        self,
        base: Base,
        reference: Reference,
        probe: Probe,
        measured: list[Measured],
        maker: Maker,
        verifier: Verifier,
    ) -> tuple[BakeFigures, ...]:
        turned = Expected(maker.checkpoint, self.adapters).turned
        room = reference.loaded and fits(base, 1)
        trial = Trial(
            maker.trial,
            turned, self.task_type, probe, verifier.expected, measured, room, self.request.thresholds,
        )  # fmt: skip
        try:
            return measure_bakes(trial, base, self.store, reference, self.on_event)
        except Unsupported as error:
            if self.request.bake == "measured":
                raise
            self.notes.append(f"The bakes {' and '.join(BOTH)} could not be measured: {error.message}")
            return ()

    def _maker(self, base: Base, checkpoint: Checkpoint, reference: Reference | None) -> Maker:
        @cache
        def inputs() -> dict[str, Inputs] | None:
            rows = self._calibration(base)
            if not isinstance(reference, Served) or not rows:
                return None
            self.on_event(Stage("looking at what the layers read"))
            return reference.inputs(rows)

        def factors() -> dict[str, Factors] | None:
            return reference.factors() if isinstance(reference, Served) else None

        return Maker(self.request, self.adapters, checkpoint, base, self._labels(), inputs, factors)

    def _calibration(self, base: Base) -> list[list[int]]:
        """Training rows, none that the verdict is on."""
        found: list[list[int]] = []
        for _, card in self.cards:
            rows = split_rows(card, "train") if card.task.get("type") else None
            if rows is not None:
                task = make_task(card.task)
                texts = task.inputs(rows)[: _CALIBRATION // len(self.cards)]
                found += [task.encode(t, base.tokenizer, base.kind, _CALIBRATION_TOKENS) for t in texts]
        return [ids[:_CALIBRATION_TOKENS] for ids in found if ids]

    def _labels(self) -> list[str] | None:
        """Names of the classes of the adapter that brings a head."""
        for (adapter, _), (_, card) in zip(self.adapters, self.cards, strict=True):
            if adapter.spec.task_type == self.task_type and card.task.get("type"):
                task = make_task(card.task)
                if isinstance(task, Classify | Tag):
                    return task.labels or None
        return None

    def _report(
        self, base: Base, floats: MergePlan, plan: MergePlan, folder: Path, found: Verified, bakes: Any
    ) -> MergeReport:
        members = tuple(Member(str(ref), ref.digest or "", weight) for ref, weight in self.members)
        return MergeReport(
            adapter=self._name,
            digest=members[0].digest if len(members) == 1 else "",
            base=base.name,
            out=str(self.out),
            bake=floats.bake,
            quantization=floats.quantization,
            dtype=floats.dtype,
            changed_tensors=len(floats.changed),
            tensors=sum(map(len, floats.shards.values())),
            bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            seconds=round(time.perf_counter() - self._started, 3),
            difference=found.difference,
            effect_kl=found.effect_kl,
            thresholds=self.request.thresholds,
            to=self.request.to,
            adapters=members,
            base_fingerprint=base.fingerprint.digest,
            base_origin=base.source.origin,
            verify=self.request.verify,
            forward=found.forward,
            metrics=found.metrics,
            layers=found.layers,
            bakes=tuple(bakes),
            residual_rank=self.request.residual,
            bare_difference=found.bare_difference,
            task_type=self.task_type,
            notes=tuple(dict.fromkeys([*self.notes, *found.notes])),
            created=utc_now(),
            libraries=libraries(),
        )


def _failure(report: MergeReport, kept: Sequence[Path]) -> MergeFailed:
    failed = "; ".join(map(str, report.failures)) or "nothing could be compared"
    where = f" The report is kept in {kept[0]}." if kept else ""
    repair = "--residual 8, " if report.to == "nf4" and not report.residual_rank else ""
    return MergeFailed(
        f"The merged model differs too much from base + adapter: {failed}.",
        f"Nothing was written.{where} Try {repair}another --bake or --to, or loosen the thresholds.",
    )
