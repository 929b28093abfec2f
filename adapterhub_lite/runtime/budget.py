"""The memory that adapters share with the buffers of decode steps that stand still."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..errors import CapacityError
from .slots import Slots, shown


class Budget(Slots):
    """Slots whose memory is what `beside` leaves of it.

    Args:
        beside: bytes of windows and lanes of decode steps (`StaticRows`), which keep their place while steps are there.
    """

    def __init__(self, capacity: int | None, memory: int = sys.maxsize, beside: Callable[[], int] = lambda: 0) -> None:
        self._beside = beside
        super().__init__(capacity, memory)

    @property
    def memory(self) -> int:
        """Bytes for adapters."""
        return max(0, self._all - self._beside())

    @memory.setter
    def memory(self, value: int) -> None:
        self._all = value

    def _victims(self, digest: str, name: str, size: int) -> list[str]:
        try:
            return super()._victims(digest, name, size)
        except CapacityError as error:
            beside = self._beside()
            if not beside:
                raise
            held = f"{shown(beside)} of {shown(self._all)} hold the windows and lanes of decode steps."
            hint = "Give it more (memory=), or use no captured steps: compile=False, AHL_CUDA_GRAPHS=0."
            raise CapacityError(f"{error.message} {held}", hint) from None

    def check_beside(self, size: int, other: int) -> None:
        """Raise CapacityError where `size` bytes more of buffers do not fit beside what is held and `other` bytes."""
        free = self.free - other
        if size > free:
            raise CapacityError(
                f"windows and lanes of a decode step need {shown(size)} more; {shown(max(0, free))} of "
                f"{shown(self._all)} for adapters and these are free.",
                "Raise memory, or lower batch_size.",
            )
