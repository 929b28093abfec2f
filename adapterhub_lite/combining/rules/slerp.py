"""Spherical interpolation of two changes: along the great circle between their directions, its length between theirs.

Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), of the whole changes as vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...errors import NoEffect, Unsupported
from .rule import Rule

_PARALLEL = 1e-6  # radians; the circle is then a line to 1e-13


def great_circle(products: torch.Tensor, weights: Sequence[float]) -> tuple[list[float], str]:
    """The factors of two changes at t = w2 / (w1 + w2) of the way, from their inner products [2, 2].

    Raises:
        Unsupported: a negative weight, or changes in opposite directions, between which no way is the shortest.
        NoEffect: a change that is zero has no direction.
    """
    if min(weights) < 0 or not sum(weights) > 0:
        raise Unsupported(
            f"slerp goes from the first adapter to the second, and {weights[0]:g} and {weights[1]:g} are no shares.",
            "Give weights from 0 up, such as 0.7 and 0.3; task_arithmetic takes negative ones.",
        )
    t = weights[1] / (weights[0] + weights[1])
    one, two = (math.sqrt(max(float(products[i, i]), 0.0)) for i in (0, 1))
    if not (one and two):
        raise NoEffect("One of the two changes is zero, so it has no direction to turn to.", "Use linear.")
    cosine = float(products[0, 1]) / one / two
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    length = (1 - t) * one + t * two
    told = f"{math.degrees(angle):.1f} degrees between them, t = {t:g}"
    if angle < _PARALLEL:
        return [length * (1 - t) / one, length * t / two], f"they are parallel, so the way between is a line; t = {t:g}"
    if math.pi - angle < _PARALLEL and 0 < t < 1:
        raise Unsupported(
            "The two changes point in opposite directions: no way between them is the shortest.",
            "Use linear, or another adapter.",
        )
    if math.pi - angle < _PARALLEL:
        return [1 - t, t], told
    sines = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [length * sines[0] / one, length * sines[1] / two], told


SLERP = Rule(
    "slerp",
    "from one adapter to another along the great circle; of the weights only the ratio counts",
    "Shoemake, SIGGRAPH 1985",
    keeps="lossless",
    share=great_circle,
    members=2,
)
