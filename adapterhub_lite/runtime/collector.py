"""Work that makes many lasting objects, without Python's cycle collector looking through them meanwhile."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_state = {"inside": 0, "was_on": False}


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the cycle collector off while any thread is in such a block; after the last it is what it was before.

    An adapter is thousands of objects that stay. They make the collector look through all objects of the process again
    and again, which came to more than the rest of a load once some dozen adapters were there.
    """
    with _LOCK:
        if _state["inside"] == 0:
            _state["was_on"] = gc.isenabled()
            gc.disable()
        _state["inside"] += 1
    try:
        yield
    finally:
        with _LOCK:
            _state["inside"] -= 1
            if _state["inside"] == 0 and _state["was_on"]:
                gc.enable()
