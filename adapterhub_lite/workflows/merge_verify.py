"""A merged folder against base + adapters: its tensors, its logits, its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..bases.load import Base
from ..errors import Unsupported
from ..events import Listener, Stage, ignore
from ..merging.plan import MergePlan
from ..merging.report import Difference, LayerError, TaskFigure, compare_logits
from ..store import Store
from .merge_base import fits
from .merge_expected import Expected
from .merge_layers import layer_errors
from .merge_probe import Measured, Probe
from .merge_reference import Reference
from .merge_request import Request
from .merge_served import GGUF, Merged, answers, logits_of, plain_model, served
from .merge_stream import streamed_model
from .merge_tensors import GgufFile, Repaired, Stored, Tensors


@dataclass(frozen=True)
class Verified:
    """What was found."""

    difference: Difference | None
    effect_kl: float | None
    bare_difference: Difference | None
    forward: str
    metrics: tuple[TaskFigure, ...]
    layers: tuple[LayerError, ...]
    notes: tuple[str, ...]


@dataclass
class Verifier:
    """Compares merged folders with one reference.

    Args:
        reference, probe: None where no logits are to be compared.
        measured: rows of tasks to measure both on.
    """

    base: Base
    store: Store
    reference: Reference | None
    probe: Probe | None
    measured: Sequence[Measured]
    task_type: str | None
    on_event: Listener = ignore
    _notes: list[str] = field(default_factory=list)

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """Logits of base + adapters on the probe."""
        assert self.reference is not None
        assert self.probe is not None
        return self.reference.logits(self.probe.rows)

    @cached_property
    def effect(self) -> float | None:
        """How far the bare base is from base + adapters (KL); None where it is no model of the same kind."""
        assert self.reference is not None
        assert self.probe is not None
        bare = self.reference.bare(self.probe.rows)
        return None if bare is None else compare_logits(self.expected, bare).mean_kl

    def verify(
        self,
        folder: Path,
        request: Request,
        floats: MergePlan,
        expected: Expected,
        residual: Adapter | None = None,
        informed: bool = False,
    ) -> Verified:
        """Everything that the request asks for.

        Args:
            floats: the plan before it was quantised: which tensors there must be.
            expected: what they must be.
            informed: 4-bit codes were chosen by what the layers read.
        """
        self._notes = []
        merged = Merged(folder, request.kind, self.task_type, residual, floats.config)
        stored, wanted = self._stored(merged, floats, expected)
        most = request.thresholds.max_layer_error
        layers = layer_errors(stored, expected, wanted, most, informed, self.on_event)
        if self.reference is None or self.probe is None:
            self._notes.append(
                "No logits were compared, as asked for (--verify weights): each tensor was read back alone."
            )
            return Verified(None, None, None, "none", (), layers, tuple(self._notes))
        if not self.reference.loaded or not fits(self.base, 1):
            return self._streamed(stored, floats, layers)
        if self.effect is None:
            self._notes.append("The adapter's own effect was not measured: the bare base has no such head.")
        model = plain_model(merged, self.base)
        plain = compare_logits(
            self.expected, logits_of(model, self.base, self.probe.rows, self.task_type, self.on_event)
        )
        difference, bare = plain, None
        if residual is not None:
            difference, bare = self._with_residual(merged), plain.named(self.probe.texts)
        metrics = self._metrics(merged, model)
        named = difference.named(self.probe.texts)
        return Verified(named, self.effect, bare, "loaded", metrics, layers, tuple(self._notes))

    def _stored(self, merged: Merged, floats: MergePlan, expected: Expected) -> tuple[Tensors, Sequence[str]]:
        """The merged tensors as they are on the disk, and the names of those that must be there."""
        names = [one.name for tensors in floats.shards.values() for one in tensors]
        if merged.kind in ("f16", "q8_0"):
            file = GgufFile(merged.folder / GGUF, floats.config, names)
            return file, file.wanted
        stored: Tensors = Stored.in_folder(merged.folder, expected.turned)
        if merged.residual is not None:
            stored = Repaired(stored, merged.residual, expected.turned)
        return stored, names

    def _streamed(self, stored: Tensors, floats: MergePlan, layers: tuple[LayerError, ...]) -> Verified:
        """Without loading the merged model: transformers' class with tensors as they are read back."""
        assert self.probe is not None
        self.on_event(Stage("the merged model, streamed from the disk"))
        self._notes.append("The merged model was not loaded in one piece: it has no room in memory.")
        base = self.base
        model = streamed_model(floats.config, self.task_type, base.kind, stored, device=base.device)
        if self.task_type == "SEQ_CLS" and model.config.pad_token_id is None:
            model.config.pad_token_id = base.pad_id
        got = logits_of(model, base, self.probe.rows, self.task_type, self.on_event)
        difference = compare_logits(self.expected, got).named(self.probe.texts)
        return Verified(difference, self.effect, None, "streamed", (), layers, tuple(self._notes))

    def _with_residual(self, merged: Merged) -> Difference:
        """With the adapter of what rounding lost, as the runtime serves it."""
        assert self.probe is not None
        rows, model = self.probe.rows, plain_model(merged, self.base)
        with served(model, self.base, merged, self.store) as (runtime, residual):
            got = [t.float().cpu() for row in rows for t in runtime.logits([row], residual)]
        return compare_logits(self.expected, got)

    def _metrics(self, merged: Merged, model: Any) -> tuple[TaskFigure, ...]:
        found = []
        for one in self.measured:
            assert self.reference is not None
            metric = one.task.primary_metric
            try:
                own = self.reference.measure(one.task, one.rows)
                if own is None:
                    continue
                if merged.kind in ("nf4", "int8"):
                    model = plain_model(merged, self.base)  # a forward of bitsandbytes' own has repacked the weights
                said = answers(model, self.base, merged, self.store, one.task, one.rows, self.on_event)
            except Unsupported as error:
                self._notes.append(f"{metric} of {one.ref} was not measured: {error.message}")
                continue
            figures = own.metrics[metric], said.metrics[metric]
            found.append(TaskFigure(str(one.ref), metric, len(one.rows), one.of_rows, *figures))
        return tuple(found)
