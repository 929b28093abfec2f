"""What a merge is asked for, checked before anything is read: adapters with weights, target, bake, thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

from ..errors import Unsupported
from ..merging.report import TARGETS, Thresholds
from ..names import Ref

BAKES = ("auto", "measured", "dequantised", "original")
VERIFY = ("full", "weights")
_FORM = "Write sql@1,style@2 with --weights 0.7,0.3, or sql@1=0.7,style@2=0.3."

Refs = str | Ref | Sequence[str | Ref] | Mapping[str, float] | Mapping[Ref, float] | Mapping[str | Ref, float]


@dataclass(frozen=True)
class Request:
    """A merge as it was asked for.

    Attributes:
        members: references with weights, in order.
        kind: "float", "nf4", "int8", "f16" or "q8_0".
        dtype: of what is stored as floats: auto, float32, bfloat16 or float16.
    """

    members: tuple[tuple[Ref, float], ...]
    to: str
    bake: str
    residual: int
    verify: str
    thresholds: Thresholds
    prompts: Path | None = None
    metric_rows: int = 256
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The form of the output."""
        if self.to in ("nf4", "int8"):
            return self.to
        return self.to.removeprefix("gguf-") if self.gguf else "float"

    @property
    def gguf(self) -> bool:
        """Whether the output is a GGUF file."""
        return self.to.startswith("gguf-")

    @property
    def dtype(self) -> str:
        """The dtype option of the plan."""
        return self.to if self.kind == "float" else "auto"


def request_of(
    refs: Refs,
    weights: Sequence[float] | None,
    to: str,
    bake: str,
    residual: int,
    verify: str,
    thresholds: Thresholds | None,
    prompts: str | Path | None = None,
    metric_rows: int = 256,
) -> Request:
    """Check a request.

    Raises:
        Unsupported: what is wrong with it, with the nearest name where one is unknown.
        InvalidName: a reference that is none.
    """
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise Unsupported(f"{thresholds!r} are no thresholds.", "Give Thresholds(max_kl=0.05), or leave them out.")
    check_choice(to, TARGETS, "a target of a merge")
    check_choice(bake, BAKES, "a way to bake")
    check_choice(verify, VERIFY, "a way to verify")
    check_count(residual, "residual")
    check_count(metric_rows, "metric_rows")
    if residual and to != "nf4":
        raise Unsupported(
            f"A residual adapter repairs what 4 bits lose, and {to} has more.", "Use --to nf4, or leave out --residual."
        )
    if verify == "weights" and bake == "measured":
        raise Unsupported(
            "Which weights to bake into is measured on logits, which --verify weights leaves out.",
            "Use --bake dequantised or original, or leave out --verify.",
        )
    members = members_of(refs, weights)
    given = Path(prompts).expanduser() if prompts is not None else None
    limits = thresholds or Thresholds.of(to)
    check_limits(limits)
    return Request(members, to, bake, residual, verify, limits, given, metric_rows)


def check_count(value: object, what: str) -> None:
    """Raise Unsupported unless a value is a whole number, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise Unsupported(f"{what} is {value!r}, not a whole number.", "Give 0 or more.")
    if value < 0:
        raise Unsupported(f"{what} is {value}, which is less than nothing.", "Give 0 or more.")


def check_limits(limits: Thresholds) -> None:
    """Raise Unsupported for a threshold that nothing could pass, or that is none; infinity lets everything pass."""
    for one in fields(Thresholds):
        value = getattr(limits, one.name)
        if value is None and one.name == "max_layer_error":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or value < 0:
            raise Unsupported(f"The threshold {one.name} is {value!r}.", "Give a number, 0 or more.")
    if limits.min_top1 > 1:
        raise Unsupported(f"The threshold min_top1 is {limits.min_top1}.", "It is a share of tokens: give 0 to 1.")


def check_choice(value: str, known: Sequence[str], what: str) -> None:
    """Raise Unsupported, naming the nearest, for a value that is not one of `known`."""
    if value in known:
        return
    near = get_close_matches(str(value).lower(), known, 1, 0.5)
    meant = f"Did you mean {near[0]}? " if near else ""
    raise Unsupported(f"{value!r} is not {what}.", f"{meant}There are: {', '.join(known)}.")


def members_of(refs: Refs, weights: Sequence[float] | None = None) -> tuple[tuple[Ref, float], ...]:
    """References with weights: `a@1,b@2`, `a@1=0.7,b@2=0.3`, a list of these, or a mapping.

    Raises:
        Unsupported: weights that are not as many as the adapters, given twice, 0 or no numbers; an adapter named twice.
    """
    pairs: list[tuple[Ref, float | None]]
    if isinstance(refs, Mapping):
        pairs = [(Ref.parse(ref), _number(ref, weight)) for ref, weight in refs.items()]
    else:
        parts = [refs] if isinstance(refs, str | Ref) else list(refs)
        pairs = [pair for part in parts for pair in _split(part)]
    if not pairs:
        raise Unsupported("A merge of no adapters.", _FORM)
    if weights is not None:
        if any(weight is not None for _, weight in pairs):
            raise Unsupported("Weights are given twice: behind the adapters and by themselves.", _FORM)
        if len(weights) != len(pairs):
            raise Unsupported(f"{len(weights)} weights for {len(pairs)} adapters.", f"Give one each. {_FORM}")
        pairs = [(ref, _number(ref, weight)) for (ref, _), weight in zip(pairs, weights, strict=True)]
    found = tuple((ref, 1.0 if weight is None else weight) for ref, weight in pairs)
    check_distinct([ref for ref, _ in found])
    return found


def check_distinct(refs: Sequence[Ref]) -> None:
    """Raise Unsupported if a version is named twice; of resolved references the version counts, not its alias."""
    names = [(ref.name, ref.version, None if ref.version else ref.alias) for ref in refs]
    twice = next((ref for ref, name in zip(refs, names, strict=True) if names.count(name) > 1), None)
    if twice is not None:
        raise Unsupported(f"{twice} is named twice.", "Name it once, with the sum of its weights.")


def numbers_of(text: str) -> list[float]:
    """`0.7,0.3` as numbers.

    Raises:
        Unsupported: a part is none.
    """
    return [_number("an adapter", part.strip()) for part in text.split(",")]


def _split(part: str | Ref) -> list[tuple[Ref, float | None]]:
    if isinstance(part, Ref):
        return [(part, None)]
    if not isinstance(part, str):
        return [(Ref.parse(part), None)]
    found: list[tuple[Ref, float | None]] = []
    for one in part.split(","):
        name, equals, weight = one.strip().partition("=")
        found.append((Ref.parse(name.strip()), _number(name, weight.strip()) if equals else None))
    return found


def _number(ref: object, weight: object) -> float:
    try:
        if isinstance(weight, bool):
            raise TypeError
        value = float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise Unsupported(f"The weight of {ref} is {weight!r}, not a number.", _FORM) from None
    if not math.isfinite(value):
        raise Unsupported(f"The weight of {ref} is {value}.", "Give a finite number; negative ones subtract.")
    if value == 0:
        raise Unsupported(f"The weight of {ref} is 0, which leaves it out.", "Leave it out, or give another weight.")
    return value
