"""Which stored versions are combined, with which weights, and whether they are of one base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from ..adapters.adapter import Adapter, stored_adapter
from ..bases.load import Base
from ..errors import BaseMismatch, Unsupported
from ..formats.card import Card
from ..names import Ref
from ..runtime.admit import compare_base
from ..store import Store

Weighted = Mapping[str, float] | Sequence[str | Ref | tuple[str | Ref, float]]
"""What a caller may name: `{"sql": 0.7, "style": 0.3}`, a list of references, or of pairs with weights."""
_SAME_BASE = ("weights", "config", "tokenizer")  # fields of a fingerprint that make a base what it is


@dataclass(frozen=True)
class Member:
    """A stored version with its weight; `str()` gives name@version."""

    ref: Ref
    card: Card
    weight: float

    def __str__(self) -> str:
        return f"{self.ref.name}@{self.ref.version}"

    @property
    def mark(self) -> Mapping[str, Any]:
        """The fingerprint of its base, as far as its card tells one."""
        found = self.card.base.get("fingerprint")
        return found if isinstance(found, dict) else {}

    def adapter(self, store: Store) -> Adapter:
        """Its tensors, from verified bytes."""
        return replace(stored_adapter(store.read(self.ref)), name=str(self))


def members_of(
    store: Store, given: Weighted | str | Ref, weights: Sequence[float] | None, default: float | None = None
) -> list[Member]:
    """The versions that are named now, each once.

    Args:
        default: the weight of each where none is given; None: equal ones that add up to 1.

    Raises:
        Unsupported: nothing is named, a version twice, weights that are too few, too many or no numbers.
        NotFound, InvalidName, StoreCorrupt: from the store.
    """
    named, own = _split(given)
    if not named:
        raise Unsupported("No adapter is named.", "Name one or more, such as sql@1.")
    shares = _weights(named, own, weights, default)
    members: dict[str, Member] = {}
    for name, weight in zip(named, shares, strict=True):
        ref = store.resolve(name)
        assert ref.digest is not None
        if ref.digest in members:
            again = f", as {members[ref.digest]}" if str(members[ref.digest]) != str(name) else ""
            raise Unsupported(f"{name} is named twice{again}.", "Name it once, with the sum of its weights.")
        members[ref.digest] = Member(ref, store.card(ref), weight)
    return list(members.values())


def _split(given: Weighted | str | Ref) -> tuple[list[str | Ref], list[float | None]]:
    if isinstance(given, str | Ref):
        return [given], [None]
    if isinstance(given, Mapping):
        return list(given), list(given.values())
    pairs = [one if isinstance(one, tuple) else (one, None) for one in given]
    return [name for name, _ in pairs], [weight for _, weight in pairs]


def _weights(
    named: Sequence[str | Ref], own: Sequence[float | None], given: Sequence[float] | None, default: float | None
) -> list[float]:
    told = [weight for weight in own if weight is not None]
    if told and given is not None:
        raise Unsupported("Weights are given twice, beside the names and as a list.", "Give them once.")
    if given is not None and len(given) != len(named):
        raise Unsupported(
            f"{len(named)} adapters have {len(given)} weights.", "Give one for each adapter, in the order of the names."
        )
    if told and len(told) < len(named):
        lacking = next(name for name, weight in zip(named, own, strict=True) if weight is None)
        raise Unsupported(f"{lacking} has no weight, and others have one.", "Give each a weight, or none.")
    chosen = list(given) if given is not None else told
    if not chosen:
        return [1 / len(named) if default is None else default] * len(named)
    return [_number(name, weight) for name, weight in zip(named, chosen, strict=True)]


def _number(name: object, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise Unsupported(f"The weight of {name} is {weight!r}, not a finite number.", "Negative ones subtract.")
    return float(weight)


def check_one_base(members: Sequence[Member], base: Base | None) -> None:
    """Make sure that all members were made for one base: by the fingerprints in their cards, or by the given base.

    Raises:
        BaseMismatch: two of them, or one and the base, have other weights, configuration or tokenizer.
        Unsupported: a card tells no fingerprint, and no base is given to stand for it.
    """
    if base is not None:
        for member in members:
            compare_base(str(member), member.card.base, base)
        return
    unknown = next((member for member in members if not member.mark.get("weights")), None)
    if unknown is not None and len(members) > 1:
        named = unknown.card.base.get("name") or next(
            (member.card.base.get("name") for member in members if member.card.base.get("name")), "NAME"
        )
        raise Unsupported(
            f"The card of {unknown} tells no fingerprint of its base, so nothing says that it is the others' base.",
            f"If it is, say which: --base {named}",
        )
    first = members[0]
    for other in members[1:]:
        differing = [key for key in _SAME_BASE if _differ(first.mark.get(key), other.mark.get(key))]
        if differing:
            raise BaseMismatch(
                f"{_made_for(first)}, {_made_for(other)}: their {' and '.join(differing)} differ.",
                "Changes of one base add up, those of two do not. Choose adapters of one base.",
            )


def _differ(one: object, other: object) -> bool:
    return bool(one) and bool(other) and one != other


def _made_for(member: Member) -> str:
    name = member.card.base.get("name") or "a base without a name"
    return f"{member} was made for {name} ({str(member.mark.get('digest') or '?')[:12]})"


def primary_of(members: Sequence[Member]) -> Member:
    """The member whose task a mix has: the heaviest that has one, as of a runtime's mixes; the first of equals."""
    able = [member for member in members if member.card.task.get("type")] or members
    return max(able, key=lambda member: member.weight)
