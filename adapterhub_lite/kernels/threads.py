"""OpenMP's pools of threads: every thread that computes has one of its own, and two of them get in each other's way.

libgomp's threads wait for their next piece of work by spinning, but almost not at all while there are more of them than
processors. A step of a small model has hundreds of pieces; with a second pool at rest it took half as long again.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_SOFT = 1  # omp_pause_soft of OpenMP 5.0: what the threads hold for the program stays


def release_pool() -> None:
    """End the pool of the calling thread; it gets a new one when it computes again (libgomp only)."""
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause() -> Any:
    import torch  # the library that torch has loaded is meant, not another one of that name

    assert torch.get_num_threads() > 0
    try:
        return ctypes.CDLL("libgomp.so.1").omp_pause_resource_all
    except (OSError, AttributeError):
        return None
