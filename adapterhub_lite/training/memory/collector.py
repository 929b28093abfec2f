"""Python's garbage collector leaves alone what a run found: it would look through a million objects of libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting_heap() -> Iterator[None]:
    """Within, only objects made within are collected; nothing is done where a program has frozen its objects itself."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
