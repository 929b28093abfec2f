"""Into which weights to bake an adapter that was trained on quantised ones: measured on both, and the better is taken.

No checkpoint is written for it: the merged model computes with tensors as the plan makes them, rounded as they would be
stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..bases.load import Base
from ..errors import Unsupported
from ..events import Listener, Stage, ignore
from ..formats.card import spread
from ..merging.plan import MergePlan
from ..merging.report import BakeFigures, Thresholds, compare_logits
from ..store import Store
from .merge_probe import Measured, Probe
from .merge_reference import Reference
from .merge_served import Merged, answers, logits_of
from .merge_stream import streamed_model
from .merge_tensors import Stored

BOTH = ("dequantised", "original")
_ROWS = 64  # of a task, to choose by; the verdict is on more


@dataclass(frozen=True)
class Trial:
    """What bakes are compared on, and by.

    Attributes:
        plan: makes the plan of a bake as it would be written.
        expected: logits of base + adapters on the probe.
        keep: whether a model of the merged size has room in memory: then the task's metric may be measured too.
        limits: what a bake must keep to be taken by its metric.
    """

    plan: Callable[[str], MergePlan]
    turned: set[str]
    task_type: str | None
    probe: Probe
    expected: Sequence[torch.Tensor]
    measured: Sequence[Measured]
    keep: bool
    limits: Thresholds


def measure_bakes(
    trial: Trial, base: Base, store: Store, reference: Reference, on_event: Listener = ignore
) -> tuple[BakeFigures, ...]:
    """The figures of both bakes, each against base + adapters as they were trained.

    The task's metric is measured where both keep to the limits of logits: else it would decide nothing.

    Raises:
        Unsupported: the merged model's class has a parameter that no tensor of the plan fills.
    """
    found = []
    for bake in BOTH:
        on_event(Stage(f"measuring what baking into the {bake} weights gives"))
        found.append(_figures(trial, bake, base, store, None, on_event))
    first = _first(trial.measured)
    if first is None or not trial.keep or len(_close(found, trial.limits)) < len(found):
        return tuple(found)  # logits alone decide
    reference.measure(first.task, trial.measured[0].rows)  # the verdict's, of which these are some
    own = reference.measure(first.task, first.rows)
    if own is None:
        return tuple(found)
    value = own.metrics[first.task.primary_metric]
    answered = []
    for bake in BOTH:
        on_event(Stage(f"both are near: measuring what the one baked into the {bake} weights answers"))
        answered.append(replace(_figures(trial, bake, base, store, first, on_event), reference=value))
    return tuple(answered)


def better(found: Sequence[BakeFigures], limits: Thresholds) -> str:
    """The bake to take: of those within the thresholds the one of the better metric, of equals that of the least KL."""
    close = _close(found, limits)
    some = close or list(found)
    best = max(one.value or 0.0 for one in some)
    tied = [one for one in some if (one.value or 0.0) >= best - 1e-9] if close else some
    return min(tied, key=lambda one: one.difference.mean_kl).bake


def _close(found: Sequence[BakeFigures], limits: Thresholds) -> list[BakeFigures]:
    """Those that keep to the limits of logits."""
    return [
        one
        for one in found
        if one.difference.mean_kl <= limits.max_kl and one.difference.top1_agreement >= limits.min_top1
    ]


def _figures(
    trial: Trial, bake: str, base: Base, store: Store, first: Measured | None, on_event: Listener
) -> BakeFigures:
    plan = trial.plan(bake)
    tensors = Stored.of_plan(plan, trial.turned, on_event)
    model = streamed_model(
        plan.config, trial.task_type, base.kind, tensors, keep=first is not None, dtype=base.dtype, device=base.device
    )
    if trial.task_type == "SEQ_CLS" and model.config.pad_token_id is None:
        model.config.pad_token_id = base.pad_id
    got = logits_of(model, base, trial.probe.rows, trial.task_type, on_event)
    found = BakeFigures(bake, compare_logits(trial.expected, got))
    if first is None:
        return found
    _finish(model)
    merged = Merged(base.source.folder, "float", trial.task_type)
    metric = first.task.primary_metric
    said = answers(model, base, merged, store, first.task, first.rows, on_event)
    return replace(found, metric=metric, value=said.metrics[metric], rows=len(first.rows))


def _finish(model: torch.nn.Module) -> None:
    """After a forward that kept what it read, nothing may be left to be read."""
    left = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if left is not None:
        raise Unsupported(f"No forward of the merged model reads {left}.", "Say which bake: --bake dequantised.")


def _first(measured: Sequence[Measured]) -> Measured | None:
    if not measured:
        return None
    one = measured[0]
    return replace(one, rows=one.rows.at(spread(len(one.rows), _ROWS)))
