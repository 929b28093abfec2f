"""Learning-rate schedules: a factor for each step, after a linear warm-up."""

from __future__ import annotations

import math


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
