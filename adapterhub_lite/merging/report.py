"""What was merged, how far it is from base + adapter, and whether that passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..formats.specs import HEADED
from .compare import Difference as Difference
from .compare import RowDifference as RowDifference
from .compare import compare_logits as compare_logits

TARGETS = ("auto", "float32", "bfloat16", "float16", "nf4", "int8", "gguf-f16", "gguf-q8_0")
"""What a merged checkpoint is written as; auto keeps each tensor's own type."""

# Largest ||stored - exact|| / ||exact|| that a format explains. Half a unit in the last place bounds floats (2^-9 of
# values in bfloat16, 2^-11 in float16), with room for sums in another order and for subnormal halves; the others are
# about twice what weights without outliers lose.
FORMAT_ERRORS = {
    "float64": 1e-5,
    "float32": 1e-5,
    "bfloat16": 4e-3,
    "float16": 2e-3,
    "q8_0": 2e-2,
    "int8": 5e-2,
    "nf4": 2e-1,
}
INFORMED_ERROR = 0.5
"""The same for 4-bit codes that were chosen by what a layer reads: they are near in its outputs, not in its weights.

A layer of zeros has an error of 1."""


@dataclass(frozen=True)
class Thresholds:
    """What a merge must keep.

    Attributes:
        max_kl: mean KL divergence from base + adapter, nats a token.
        min_top1: share of tokens with the same likeliest next token.
        max_lost: the divergence is at most this share of what the adapter itself causes (a weak adapter can drown in
            rounding); where no logits are compared, the share of its change that any layer may lose.
        max_metric_drop: how much worse the task's metric (0..1) may be.
        max_layer_error: relative error of a stored tensor; None: what its format explains (`FORMAT_ERRORS`).
    """

    max_kl: float = 0.01
    min_top1: float = 0.95
    max_lost: float = 0.25
    max_metric_drop: float = 0.02
    max_layer_error: float | None = None

    @classmethod
    def of(cls, target: str) -> Thresholds:
        """The defaults for a target: 4 and 8 bits a weight differ from base + adapter by their own rounding.

        Small models lose most. Of one with 135 million weights, int8 as bitsandbytes computes it, activations rounded
        too, measured 0.034 nats, 91 % and 3 % of the adapter's effect lost; nf4 by inputs 0.12, 82 % and 10 %. At 0.29
        nats, 77 % and 25 % its task's metric was halved.
        """
        if target == "nf4":
            return cls(max_kl=0.15, min_top1=0.8, max_metric_drop=0.05)
        if target == "int8":
            return cls(max_kl=0.05, min_top1=0.9)
        return cls()


@dataclass(frozen=True)
class Check:
    """One line of the verdict; `relation` is <= or >=. What is no number never passes."""

    name: str
    value: float
    relation: str
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit."""
        slack = 1e-9 * abs(self.limit)  # 0.8 - 0.1 is a little more than 0.7 in floating point
        return self.value <= self.limit + slack if self.relation == "<=" else self.value >= self.limit - slack

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} ({self.relation} {self.limit:g})"


@dataclass(frozen=True)
class Member:
    """One adapter of a merge: its version, digest and weight."""

    ref: str
    digest: str
    weight: float


@dataclass(frozen=True)
class TaskFigure:
    """A version's metric (0..1) on rows of its test data, of base + adapter and of the merged model."""

    ref: str
    metric: str
    rows: int
    of_rows: int
    reference: float
    merged: float

    @property
    def drop(self) -> float:
        """How much worse the merged model is; below 0 where it is better."""
        return self.reference - self.merged


@dataclass(frozen=True)
class LayerError:
    """A stored tensor, read back and made dense, against base + change in float32 (Frobenius norms).

    Attributes:
        format: what it is stored as.
        error: ||stored - exact|| / ||exact||.
        limit: what `error` may be.
        change: ||adapter's change|| / ||base||; 0 where the adapter leaves it.
        lost: ||stored - exact|| / ||adapter's change||, None without one.
        kept: the share of the adapter's change that is there: (stored - base) projected on it.
    """

    tensor: str
    format: str
    error: float
    limit: float
    change: float = 0.0
    lost: float | None = None
    kept: float | None = None

    @property
    def beyond(self) -> float:
        """The error as a multiple of its limit."""
        if math.isnan(self.error):
            return math.inf
        return _share(self.error, self.limit)


@dataclass(frozen=True)
class BakeFigures:
    """What baking into one kind of weights gives on the probe set; `metric` is that of the first version's task."""

    bake: str
    difference: Difference
    metric: str = ""
    value: float | None = None
    reference: float | None = None
    rows: int = 0


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what, how, and how the result compares.

    Attributes:
        adapter, digest: of the version, or of the mix.
        forward: how both models computed logits: "loaded" in memory, "streamed" from the disk, or "none".
        effect_kl: divergence of the bare base from base + adapter, where there is a bare one.
        bare_difference: of 4-bit weights without their residual adapter, where there is one.
        task_type: PEFT's, of the adapters: what the logits are of.
        notes: what a reader should know besides, such as why something was not measured.
    """

    adapter: str
    digest: str
    base: str
    out: str
    bake: str
    quantization: str
    dtype: str
    changed_tensors: int
    tensors: int
    bytes: int
    seconds: float
    difference: Difference | None
    effect_kl: float | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    to: str = "auto"
    adapters: tuple[Member, ...] = ()
    base_fingerprint: str = ""
    base_origin: str = ""
    verify: str = "full"
    forward: str = "loaded"
    metrics: tuple[TaskFigure, ...] = ()
    layers: tuple[LayerError, ...] = ()
    bakes: tuple[BakeFigures, ...] = ()
    residual_rank: int = 0
    bare_difference: Difference | None = None
    task_type: str | None = None
    notes: tuple[str, ...] = ()
    created: str = ""
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def likeliest(self) -> str:
        """What the likeliest class of a logit is called."""
        return likeliest(self.task_type)

    @property
    def checks(self) -> list[Check]:
        """Every figure that has a threshold."""
        limits, found = self.thresholds, []
        if self.difference is not None:
            found.append(Check("mean KL (nats)", self.difference.mean_kl, "<=", limits.max_kl))
            found.append(Check(self.likeliest, self.difference.top1_agreement, ">=", limits.min_top1))
            if self.effect_kl is not None:
                share = _share(self.difference.mean_kl, self.effect_kl)
                found.append(Check("KL as a share of the adapter's effect", share, "<=", limits.max_lost))
        for one in self.metrics:
            found.append(Check(f"drop in {one.metric} of {one.ref}", one.drop, "<=", limits.max_metric_drop))
        worst = self.worst_layer
        if worst is not None:
            found.append(Check(f"relative error of {worst.tensor} ({worst.format})", worst.error, "<=", worst.limit))
        kept = [layer for layer in self.layers if layer.kept is not None]
        if self.difference is None and kept:
            least = min(kept, key=lambda layer: _order(layer.kept))
            name = f"share of the change that {least.tensor} keeps"
            found.append(Check(name, _order(least.kept), ">=", 1 - limits.max_lost))
        return found

    @property
    def worst_layer(self) -> LayerError | None:
        """The tensor that is furthest beyond its limit, or nearest to it."""
        if not self.layers:
            return None
        return max(self.layers, key=lambda layer: layer.beyond)

    @property
    def kept(self) -> float | None:
        """Mean share of the adapter's change that the stored tensors keep."""
        shares = [layer.kept for layer in self.layers if layer.kept is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def passed(self) -> bool:
        """Whether something was compared, and every figure is within its threshold."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """What is beyond its threshold."""
        return [check for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        """Plain form, as in merge_report.json; what is no finite number is text there."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        found: dict[str, Any] = _plain({**asdict(self), "checks": checks, "passed": self.passed})
        return found

    def lines(self) -> list[str]:
        """What a person reads."""
        kind = f"{self.bake} {self.quantization} weights" if self.quantization != "none" else "the checkpoint's weights"
        as_what = "" if self.to == "auto" else f", as {self.to}"
        found = [
            f"{self.adapter} merged into {self.base} ({kind}{as_what}): {self.changed_tensors} of {self.tensors} "
            f"tensors changed, {self.bytes / 1e6:,.0f} MB, {self.seconds:.1f} s",
            *(_bake_line(one, self) for one in self.bakes),
            *self._difference_lines(),
        ]
        for one in self.metrics:
            rows = f"{one.rows}" if one.rows == one.of_rows else f"{one.rows} of {one.of_rows}"
            found.append(
                f"{one.metric} of {one.ref} on {rows} rows: base + adapter {one.reference:.1%}, merged "
                f"{one.merged:.1%} ({one.merged - one.reference:+.1%}){_weight_of(one, self.thresholds)}"
            )
        worst = self.worst_layer
        if worst is not None:
            repaired = ", the residual adapter counted in" if self.residual_rank else ""
            kept = "" if self.kept is None else f"; {self.kept:.1%} of the adapter's change is kept{repaired}"
            found.append(
                f"{len(self.layers)} tensors read back: largest relative error {worst.error:.2g} "
                f"({worst.tensor}, {worst.format}){kept}"
            )
        verdict = "passed" if self.passed else "FAILED"
        return [*found, *self.notes, f"{verdict}: " + ("; ".join(map(str, self.checks)) or "nothing was compared")]

    def _difference_lines(self) -> list[str]:
        if self.difference is None:
            return []
        effect = "" if self.effect_kl is None else f" (the adapter's own effect: KL {self.effect_kl:.2g})"
        streamed = ", weights streamed from the disk" if self.forward == "streamed" else ""
        found = [f"against base + adapter over {_difference_text(self.difference, self)}{effect}{streamed}"]
        if self.bare_difference is not None:
            found[0] = f"with the residual adapter of rank {self.residual_rank}, {found[0]}"
            found.append(f"without it: {_difference_text(self.bare_difference, self)}")
        return found


def likeliest(task_type: object) -> str:
    """How a share of equal likeliest classes is told, by PEFT's task type."""
    return "same label" if task_type in HEADED else "same next token"


def _difference_text(d: Difference, report: MergeReport) -> str:
    unit = "texts" if report.task_type == "SEQ_CLS" else "tokens"
    return (
        f"{d.tokens} {unit}: largest logit difference {d.max_logit:.3g}, mean {d.mean_logit:.3g}, "
        f"KL {d.mean_kl:.2g} nats, {report.likeliest} {d.top1_agreement:.1%}"
    )


def _weight_of(one: TaskFigure, limits: Thresholds) -> str:
    """What a metric cannot tell."""
    if one.reference == 0:
        return "; it decides nothing, since base + adapter has nothing to lose in it"
    if one.rows * limits.max_metric_drop < 1:
        return f"; a single row is {1 / one.rows:.1%} of them"
    return ""


def _bake_line(one: BakeFigures, report: MergeReport) -> str:
    metric = "" if one.value is None else f", {one.metric} {one.value:.1%} on {one.rows} rows"
    against = "" if one.reference is None else f" (base + adapter {one.reference:.1%})"
    mark = " <- taken" if one.bake == report.bake else ""
    return (
        f"baked into {one.bake} weights: KL {one.difference.mean_kl:.2g} nats, {report.likeliest} "
        f"{one.difference.top1_agreement:.1%}{metric}{against}{mark}"
    )


def _share(part: float, whole: float) -> float:
    """part / whole; 0 / 0 is 0, since nothing was lost of nothing."""
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else math.inf


def _order(share: float | None) -> float:
    """A share to order by: what is no number is the least."""
    return -math.inf if share is None or math.isnan(share) else share


def _plain(value: Any) -> Any:
    """JSON's own types: tuples as lists, and numbers that JSON does not have as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
