"""How many steps there are, and the learning rate of each: a factor, after a linear warm-up."""

from __future__ import annotations

import math


def step_counts(
    examples: int, batch_size: int, accumulation: int, epochs: float, max_steps: int | None = None
) -> tuple[int, int]:
    """Optimiser steps of an epoch, none of which goes over its end, and of all epochs."""
    each = math.ceil(math.ceil(examples / batch_size) / accumulation)
    total = max(1, round(each * epochs))
    return each, total if max_steps is None else min(total, max_steps)


def rate_factor(schedule: str, step: int, total: int, warmup: float) -> float:
    """The factor of step 0..total-1: rises linearly over `warmup` (a fraction of the steps), then falls to 0.

    After the warm-up these are transformers' schedules of those names; its warm-up begins at 0, which wastes a step.
    """
    rising = math.ceil(total * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
