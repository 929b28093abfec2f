"""Versions that came from elsewhere with the card their maker wrote: the identity stays, and trust does not come along.

The stored card is the maker's, byte for byte. What this package acts on is a view of it, in which nothing leads to a
file, a data set or a version of this store, and what was told of origin and parents is kept as told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..formats.card import Card

CLAIMED = ("claimed_origin", "claimed_parents", "claimed_recipe")


def trusted_view(card: Card, received: Mapping[str, Any] | None) -> Card:
    """The card to act on; the card itself for a version that was made here."""
    if received is None:
        return card
    return claimed(card, received.get("base") or {}, {key: value for key, value in received.items() if key != "base"})


def claimed(card: Card, base: Mapping[str, Any], origin: Mapping[str, Any]) -> Card:
    """A card from another store as what it is, somebody's word."""
    data = {split: {k: v for k, v in facts.items() if k != "path"} for split, facts in card.data.items()}
    told = {
        "claimed_origin": card.origin,
        "claimed_parents": list(card.parents),
        "claimed_recipe": card.recipe,
    }
    return replace(
        card,
        base={**card.base, **base},
        data=data,
        recipe=None,
        parents=[],
        origin={**origin, "kind": "imported", **told},
    )
