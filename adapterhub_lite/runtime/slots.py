"""Slots: the adapters resident on the device, keyed by digest, least recently used out first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from ..adapters.fit import Fitted
from ..errors import CapacityError


class Slots:
    """At most `capacity` adapters; one that a running batch leases is never put out."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise CapacityError(f"A runtime needs at least one slot, not {capacity}.", "Give slots=1 or more.")
        self.capacity = capacity
        self._held: OrderedDict[str, Fitted] = OrderedDict()
        self._leases: Counter[str] = Counter()

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, digest: str) -> Fitted | None:
        """The resident adapter, now the most recently used, or None."""
        if digest in self._held:
            self._held.move_to_end(digest)
        return self._held.get(digest)

    def put(self, fitted: Fitted) -> str | None:
        """Make `fitted` resident; returns the digest that went out for it, if one did.

        Raises:
            CapacityError: every slot is leased.
        """
        out = None
        if fitted.digest not in self._held and len(self._held) >= self.capacity:
            out = next((d for d in self._held if not self._leases[d]), None)
            if out is None:
                raise CapacityError(
                    f"All {self.capacity} slots are in use by running batches.", "Raise slots, or mix fewer adapters."
                )
            del self._held[out]
        self._held[fitted.digest] = fitted
        self._held.move_to_end(fitted.digest)
        return out

    def drop(self, digest: str) -> bool:
        """Free a slot; False if the adapter was not resident.

        Raises:
            CapacityError: a running batch uses it.
        """
        if self._leases[digest]:
            raise CapacityError("A running batch uses this adapter.", "Unload it when the batch is done.")
        return self._held.pop(digest, None) is not None

    @contextmanager
    def lease(self, digests: set[str]) -> Iterator[None]:
        """Keep these adapters resident while the block runs."""
        self._leases.update(digests)
        try:
            yield
        finally:
            self._leases.subtract(digests)
            self._leases += Counter()

    def resident(self) -> list[Fitted]:
        """Least recently used first."""
        return list(self._held.values())
