"""A weighted sum as text."""

from __future__ import annotations

from collections.abc import Iterable


def weighted_sum(terms: Iterable[tuple[object, float]]) -> str:
    """`1 * a - 0.5 * b` of names with their weights."""
    text = ""
    for name, weight in terms:
        sign = "-" if weight < 0 else "+"
        text += f" {sign} {abs(weight):g} * {name}" if text else f"{weight:g} * {name}"
    return text
