"""Small steps on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread inside.

    Blocks of rows stay in the second cache, and a step on one takes less time than waking a second thread for it and
    waiting till both are done: waiting threads spin, which took ten times the time of the steps.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
