"""Slots: the adapters resident on the device, keyed by digest, least recently used out first."""

from __future__ import annotations

import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from ..adapters.fit import Fitted
from ..errors import CapacityError


class Slots:
    """At most `capacity` adapters in at most `memory` bytes; one that is pinned or leased is never put out.

    Args:
        capacity: None for as many as the memory holds.
    """

    def __init__(self, capacity: int | None, memory: int = sys.maxsize) -> None:
        if capacity is not None and capacity < 1:
            raise CapacityError(f"A runtime needs at least one slot, not {capacity}.", "Give slots=1 or more.")
        self.capacity = sys.maxsize if capacity is None else capacity
        self.memory = memory
        self._held: OrderedDict[str, Fitted] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._leases: Counter[str] = Counter()
        self._lock = threading.RLock()  # leases end in other threads than the one that loads

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def used(self) -> int:
        """Bytes of the adapters held."""
        return sum(self._sizes.values())

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return self.memory - self.used

    def get(self, digest: str) -> Fitted | None:
        """The resident adapter, now the most recently used, or None."""
        with self._lock:
            if digest in self._held:
                self._held.move_to_end(digest)
            return self._held.get(digest)

    def size(self, digest: str) -> int | None:
        """Bytes of a resident adapter."""
        return self._sizes.get(digest)

    def put(self, fitted: Fitted) -> list[str]:
        """Make `fitted` resident; returns the digests that went out for it.

        Raises:
            CapacityError: what is pinned or leased leaves no room; nothing went out.
        """
        with self._lock:
            out = self.make_room(fitted.digest, fitted.name, fitted.nbytes)
            self._held[fitted.digest] = fitted
            self._held.move_to_end(fitted.digest)
            self._sizes[fitted.digest] = fitted.nbytes
            return out

    def make_room(self, digest: str, name: str, size: int) -> list[str]:
        """Put out what must go for an adapter of `size` bytes; returns its digests. Raises as `put`."""
        with self._lock:
            out = self._victims(digest, name, size)
            for other in out:
                self._remove(other)
            return out

    def check_room(self, digest: str, name: str, size: int) -> None:
        """Raise CapacityError if room for `size` bytes could not be made now; puts nothing out."""
        with self._lock:
            self._victims(digest, name, size)

    def has_room(self, size: int) -> bool:
        """Whether another adapter fits in and none goes out."""
        return len(self._held) < self.capacity and size <= self.free

    def hold(self, sizes: Mapping[str, int], beside_leases: bool = False) -> bool:
        """Whether adapters of these sizes can be resident at once, beside the pinned ones (and the leased ones)."""
        with self._lock:
            kept = self._pinned | (set(self._leases) if beside_leases else set())
            total = {**{d: size for d, size in self._sizes.items() if d in kept}, **sizes}
            return len(total) <= self.capacity and sum(total.values()) <= self.memory

    def pin(self, digest: str) -> None:
        """Keep a resident adapter until `unpin`."""
        with self._lock:
            assert digest in self._held
            self._pinned.add(digest)

    def unpin(self, digest: str) -> bool:
        """Let it go out again; False if it was not pinned."""
        with self._lock:
            found = digest in self._pinned
            self._pinned.discard(digest)
            return found

    def drop(self, digest: str) -> bool:
        """Free a slot; False if the adapter was not resident.

        Raises:
            CapacityError: a running batch uses it, or it is pinned.
        """
        with self._lock:
            if self._leases[digest]:
                raise CapacityError("A running batch uses this adapter.", "Unload it when the batch is done.")
            if digest in self._pinned:
                raise CapacityError(f"{self._held[digest].name} is pinned.", "Unpin it first.")
            return self._remove(digest)

    @contextmanager
    def lease(self, digests: set[str]) -> Iterator[None]:
        """Keep these adapters resident while the block runs."""
        with self._lock:
            self._leases.update(digests)
        try:
            yield
        finally:
            with self._lock:
                self._leases.subtract(digests)
                self._leases += Counter()

    def resident(self) -> list[Fitted]:
        """Least recently used first."""
        with self._lock:
            return list(self._held.values())

    def is_pinned(self, digest: str) -> bool:
        """Whether it is pinned."""
        return digest in self._pinned

    def leases(self, digest: str) -> int:
        """How many running batches use it."""
        return self._leases[digest]

    def _remove(self, digest: str) -> bool:
        self._sizes.pop(digest, None)
        return self._held.pop(digest, None) is not None

    def _victims(self, digest: str, name: str, size: int) -> list[str]:
        """The least recently used that must go out for an adapter, which takes the place of its like."""
        if size > self.memory:
            raise CapacityError(
                f"{name} needs {shown(size)}, more than all the {shown(self.memory)} for adapters.",
                "Give it more: memory=.",
            )
        others = [d for d in self._held if d != digest]
        count, used = len(others) + 1, sum(self._sizes[d] for d in others) + size
        out: list[str] = []
        for other in others:
            if count <= self.capacity and used <= self.memory:
                break
            if other not in self._pinned and not self._leases[other]:
                out.append(other)
                count, used = count - 1, used - self._sizes[other]
        if count > self.capacity or used > self.memory:
            raise self._full(name, size, others, count > self.capacity)
        return out

    def _full(self, name: str, size: int, others: Iterable[str], slots: bool) -> CapacityError:
        staying = [d for d in others if d in self._pinned or self._leases[d]]
        pinned = [self._held[d].name for d in staying if d in self._pinned]
        leased = [self._held[d].name for d in staying if d not in self._pinned]
        why = [f"pinned: {', '.join(pinned)}"] * bool(pinned) + [f"in use: {', '.join(leased)}"] * bool(leased)
        if slots:
            message = f"{name} needs a slot, and all {self.capacity} slots are in use by what stays ({'; '.join(why)})."
            return CapacityError(message, "Raise slots, mix fewer adapters in a batch, or unpin one.")
        free = self.memory - sum(self._sizes[d] for d in staying)
        return CapacityError(
            f"{name} needs {shown(size)}; of {shown(self.memory)} for adapters {shown(free)} are free or can be made "
            f"free ({'; '.join(why)}).",
            "Raise memory, unpin one, or mix fewer adapters in a batch.",
        )


def shown(size: int) -> str:
    """A number of bytes for people."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"
