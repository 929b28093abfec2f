"""Adapters of rows that wait, read on a thread of their own while other rows run; nothing is resident by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from ..errors import CapacityError
from ..kernels.threads import release_pool
from ..names import Ref
from .admit import Admitted
from .mixes import MixRef
from .slots import Slots
from .tiers import BoundedComposer, Prefetch


class Ahead:
    """What is being read, and what was read and nobody has taken yet, each with its size in bytes.

    Args:
        slots, composer: whose memory it shares.
        prefetch: what is on its way there is not read twice.
        size: bytes of an adapter.
        read: what can be done without the base's lock; None for what another thread must read.
    """

    def __init__(
        self,
        slots: Slots,
        composer: BoundedComposer,
        prefetch: Prefetch,
        size: Callable[[Ref], int],
        read: Callable[[Ref], Admitted | None],
    ) -> None:
        self._slots, self._composer, self._prefetch = slots, composer, prefetch
        self._size, self._read = size, read
        self._lock = threading.RLock()  # a runtime may be collected, and close this, at any line of that thread
        self._pool: ThreadPoolExecutor | None = None
        self._flights: dict[str, tuple[Future[Admitted | None], int]] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is here or on its way here."""
        with self._lock:
            return sum(size for _, size in self._flights.values())

    def begin(self, ref: Ref, beyond: bool = False) -> bool:
        """Begin to read an adapter for a row that waits, where memory has room; whether it is on its way now.

        Nothing goes out for it. It is taken by who brings it in, or dropped by `leave`.

        Args:
            beyond: read one without room for it, as a load does until it puts another out.
        """
        for part in self._missing(ref):
            digest = str(part.digest)
            if part.version is not None and digest not in self._flights and digest not in self._prefetch:
                self._start(ref, part, beyond)
        return self.coming(ref)

    def coming(self, ref: Ref) -> bool:
        """Whether it is being read, here or as a prefetch."""
        return any(self._reading(str(part.digest)) for part in self._missing(ref))

    def leave(self, ref: Ref) -> None:
        """Forget what was read: it is resident, or nobody waits for it any more."""
        for part in _parts(ref):
            with self._lock:
                flight, _ = self._flights.pop(str(part.digest), (None, 0))
            if flight is not None:
                flight.cancel()

    def take(self, digest: str) -> Admitted | None:
        """What was read, waiting for it; None if nothing was, or there was no room then. Raises what reading raised."""
        with self._lock:
            flight, _ = self._flights.pop(digest, (None, 0))
        if flight is None or flight.cancel():
            return None
        try:
            return flight.result()
        except CapacityError:
            return None

    def close(self) -> None:
        """Read nothing more, and keep nothing."""
        with self._lock:
            self._closed = True
            self._flights.clear()
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def _missing(self, ref: Ref) -> list[Ref]:
        here = self._slots
        return [part for part in _parts(ref) if str(ref.digest) not in here and str(part.digest) not in here]

    def _start(self, ref: Ref, part: Ref, beyond: bool) -> None:
        size = self._size(part)
        room = self._slots.free - self._composer.nbytes - self.nbytes
        fits = size <= room and len(self) < self._slots.capacity
        alone = beyond and not len(self) and self._slots.hold({str(ref.digest): self._size(ref)}, beside_leases=True)
        if not fits and not alone:
            return
        with self._lock:
            if str(part.digest) not in self._flights and not self._closed:
                self._pool = self._pool or ThreadPoolExecutor(1, "adapterhub-ahead")
                with suppress(RuntimeError):  # the process is ending
                    self._flights[str(part.digest)] = self._pool.submit(partial(self._run, part)), size

    def _run(self, ref: Ref) -> Admitted | None:
        try:
            return self._read(ref)
        finally:
            release_pool()

    def _reading(self, digest: str) -> bool:
        with self._lock:
            return self._prefetch.reading(digest) or (digest in self._flights and not self._flights[digest][0].done())


def _parts(ref: Ref) -> list[Ref]:
    """What is read for an adapter: itself, or the members of a mix."""
    return [member for member, _ in ref.members] if isinstance(ref, MixRef) else [ref]
