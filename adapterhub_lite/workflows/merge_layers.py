"""Stored tensors read back, each against what it must be: relative errors, and how much of the change is there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from ..events import Listener, Progress, ignore
from ..merging.report import FORMAT_ERRORS, INFORMED_ERROR, LayerError
from .merge_expected import Expected
from .merge_tensors import Tensors

_BLOCK = 1 << 22  # elements that are compared at a time, in float64
_EXACT = FORMAT_ERRORS["float32"]


def layer_errors(
    stored: Tensors,
    expected: Expected,
    names: Sequence[str],
    most: float | None = None,
    informed: bool = False,
    on_event: Listener = ignore,
) -> tuple[LayerError, ...]:
    """Compare every stored tensor with base + change, one at a time.

    Args:
        names: tensors that must be there; one that is missing, or that nobody knows, has an infinite error.
        most: what any relative error may be; None: what the tensor's format explains.
        informed: 4-bit codes were chosen by what the layers read.
    """
    there = set(stored.names)
    limits = {**FORMAT_ERRORS, "nf4": INFORMED_ERROR} if informed else FORMAT_ERRORS
    found = [
        LayerError(name, "missing", math.inf, _EXACT if most is None else most) for name in names if name not in there
    ]
    for done, name in enumerate(stored.names):
        on_event(Progress("reading tensors back", done, len(stored.names), "tensors"))
        limit = limits.get(stored.format(name), _EXACT) if most is None else most
        found.append(_layer_error(stored, expected, name, limit))
    on_event(Progress("reading tensors back", len(stored.names), len(stored.names), "tensors"))
    return tuple(found)


def _layer_error(stored: Tensors, expected: Expected, name: str, limit: float) -> LayerError:
    kind = stored.format(name)
    if not expected.knows(name):
        return LayerError(name, kind, math.inf, limit)
    base, got = expected.base(name), stored.dense(name)
    if got.shape != base.shape:
        return LayerError(name, kind, math.inf, limit)
    if not base.is_floating_point():
        return LayerError(name, kind, 0.0 if torch.equal(got, base) else math.inf, _EXACT)
    change = expected.change(name, base)
    sums = _sums(got, base, change)
    error = _ratio(sums["error"], sums["exact"])
    if change is None or sums["change"] == 0:
        return LayerError(name, kind, error, limit)
    kept = sums["moved"] / sums["change"]
    size = _ratio(sums["change"], sums["base"]) if sums["base"] else 1.0  # a head is the adapter's own
    return LayerError(name, kind, error, limit, size, _ratio(sums["error"], sums["change"]), kept)


def _sums(got: torch.Tensor, base: torch.Tensor, change: torch.Tensor | None) -> dict[str, float]:
    """Sums of squares in float64, and of (got - base) * change, block by block."""
    sums = dict.fromkeys(("error", "exact", "base", "change", "moved"), 0.0)
    for g, b, c in _blocks(got, base, change):
        exact = b + c
        sums["error"] += float((g - exact).square().sum())
        sums["exact"] += float(exact.square().sum())
        if change is not None:
            sums["base"] += float(b.square().sum())
            sums["change"] += float(c.square().sum())
            sums["moved"] += float(((g - b) * c).sum())
    return sums


def _blocks(
    got: torch.Tensor, base: torch.Tensor, change: torch.Tensor | None
) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    flat = [t.contiguous().flatten() for t in (got, base)]
    extra = None if change is None else change.contiguous().flatten()
    for start in range(0, len(flat[0]), _BLOCK):
        g, b = (t[start : start + _BLOCK].double() for t in flat)
        yield g, b, torch.zeros_like(b) if extra is None else extra[start : start + _BLOCK].double()


def _ratio(part: float, whole: float) -> float:
    """Square root of part / whole: of nothing, 0 where the part is nothing too."""
    if whole > 0 or math.isnan(part):
        return math.sqrt(part / whole) if part == part else math.nan
    return 0.0 if part == 0 else math.inf
