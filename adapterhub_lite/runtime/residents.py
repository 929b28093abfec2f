"""The part of `Runtime` that says which adapters are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..adapters.fit import Fitted
from ..errors import NotFound
from ..names import Ref
from .engine import Engine
from .mixes import Chosen
from .tiers import Residence


class Residents:
    """Loads, keeps and frees the adapters of an engine."""

    _engine: Engine
    _lock: Any

    def load(self, ref: Chosen) -> Ref:
        """Make an adapter or a mix resident; returns its resolved reference. A failed load puts nothing out.

        Raises:
            NotFound, StoreCorrupt, BaseMismatch, AdapterMismatch, CapacityError: why it cannot be served.
        """
        with self._lock:
            resolved, _ = self._engine.named(ref)
            self._engine.fitted(resolved)
            return resolved

    def prefetch(self, refs: Chosen | Sequence[Chosen]) -> None:
        """Begin to make adapters resident in the background, and return at once.

        A load of one on its way waits for it. One that fails is not there; using it says why.

        Raises:
            NotFound: there is no such version.
        """
        some: Sequence[Chosen] = refs if isinstance(refs, list | tuple) else [refs]  # type: ignore[list-item]
        self._engine.prefetch(r for r in self._engine.resolve_all(some) if r is not None)

    def pin(self, ref: Chosen) -> Ref:
        """`load`, and keep it resident until `unpin`: nothing that is loaded later puts it out."""
        with self._lock:
            resolved, digest = self._engine.named(ref)
            self._engine.fitted(resolved)
            self._engine.slots.pin(digest)
            return resolved

    def unpin(self, ref: Chosen) -> None:
        """Let a pinned adapter go out again when others need its place."""
        with self._lock:
            resolved, digest = self._engine.named(ref)
            if not self._engine.slots.unpin(digest):
                raise NotFound(f"{resolved} is not pinned.", "See runtime.residency().")

    def fitted(self, ref: Chosen) -> Fitted:
        """An adapter with every tensor in its place in this base, made resident if it is not."""
        with self._lock:
            return self._engine.fitted(self._engine.named(ref)[0])

    def unload(self, ref: Chosen) -> None:
        """Free the memory of an adapter.

        Raises:
            NotFound: it is not resident.
            CapacityError: it is pinned, or a running batch uses it.
        """
        with self._lock:
            resolved, _ = self._engine.named(ref)
            if not self._engine.drop(resolved):
                raise NotFound(f"{resolved} is not resident.", f"Resident: {', '.join(self.resident()) or 'none'}.")

    def resident(self) -> list[str]:
        """Names of the adapters in slots, least recently used first."""
        return [fitted.name for fitted in self._engine.slots.resident()]

    def residency(self) -> list[Residence]:
        """Every adapter and mix in memory, where it is nearest; least recently used first, those on the device last."""
        return self._engine.residency()
