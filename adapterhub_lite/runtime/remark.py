"""Say that a base is not exactly an adapter's own, or how it is served: to who listens, else as a Python warning."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from ..bases.load import Base
from ..errors import BaseDiffers
from ..events import Listener, Note, ignore

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_warned: set[tuple[str, str, str, type[Warning]]] = set()
"""Adapter, base, dtype and kind of what this process was warned of."""
_held: ContextVar[list[Callable[[], None]] | None] = ContextVar("held", default=None)


def remark(text: str, digest: str, base: Base, on_event: Listener, category: type[Warning] = BaseDiffers) -> None:
    """Give `text` to a listener as a Note; without one, warn of the adapter with this digest once on this base."""
    if on_event is not ignore:
        on_event(Note(text, "warning"))
        return
    seen = (digest, base.fingerprint.digest, base.choices["dtype"].value, category)
    if seen not in _warned:
        _warned.add(seen)
        held = _held.get()
        if held is None:
            _warn(text, category)
        else:
            held.append(partial(_warn, text, category))


@contextlib.contextmanager
def held_back(warns: list[Callable[[], None]]) -> Iterator[None]:
    """Within the block warnings are added to `warns`: they are for another thread to give, that of the caller."""
    token = _held.set(warns)
    try:
        yield
    finally:
        _held.reset(token)


def _warn(text: str, category: type[Warning]) -> None:
    warnings.warn(text, category, stacklevel=_caller())


def _caller() -> int:
    """The `stacklevel` for the function that called this one: the first frame outside this package.

    Ours may lie on both sides of a frame of contextlib.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, contextlib.__file__)):
        level, frame = level + 1, frame.f_back
    return level
