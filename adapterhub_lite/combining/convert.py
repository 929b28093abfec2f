"""One adapter in another form: any additive method as LoRA, and LoRA of another rank."""

from __future__ import annotations

import math
from dataclasses import replace

from ..adapters.adapter import Adapter
from ..events import Listener, ignore
from ..formats.specs import Ia3Spec, LoraSpec
from .changes import BiasOf, Changes, WeightOf, changes_of
from .combine import Combined, Options, combine


def to_lora(
    adapter: Adapter,
    *,
    weight_of: WeightOf | None = None,
    bias_of: BiasOf | None = None,
    rank: int | None = None,
    error: float | None = None,
    on_event: Listener = ignore,
) -> Combined:
    """An additive adapter as a plain LoRA adapter, the error of each layer being that to what it really adds.

    Args:
        weight_of, bias_of: of the frozen base, for DoRA and IA3: see `changes_of`.
        rank: at most this one in every layer.
        error: the least rank within this relative error. With neither: exact; DoRA and IA3, which are of full rank,
            at the rank that `changes_of` gives them.

    Raises:
        Unsupported: an adapter that is no sum with weights, or DoRA and IA3 without their base.
        NoEffect: it changes nothing.
    """
    spec, options = adapter.spec, Options(rank=rank, error=error)
    full = isinstance(spec, Ia3Spec) or (isinstance(spec, LoraSpec) and spec.use_dora)
    plain = rank is None and error is None
    kept = full or (plain and isinstance(spec, LoraSpec))
    method = "cat" if kept else "linear" if plain else "svd"
    options.check_size()
    changes = changes_of(adapter, weight_of, rank=rank, error=error, bias_of=bias_of)
    made = combine([(changes, 1.0)], method, Options() if kept else options, on_event=on_event)
    return _with_errors(made, changes, adapter)


def _with_errors(made: Combined, changes: Changes, adapter: Adapter) -> Combined:
    """What was lost on the way into factors, too: both are projections, one inside the other, so squares add up."""
    layers, whole, lost = [], 0.0, 0.0
    for layer in made.layers:
        change = changes.modules[layer.module]
        kept = 1 - change.error**2
        total = math.sqrt(change.error**2 + kept * layer.error**2)
        square = change.matrix.norm() ** 2 / kept
        whole, lost = whole + square, lost + square * total**2
        layers.append(replace(layer, error=total))
    return replace(
        made,
        adapter=replace(made.adapter, name=adapter.name),
        layers=layers,
        error=math.sqrt(lost / whole) if whole else 0.0,
        method="convert",
    )
