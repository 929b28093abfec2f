"""Which adapter is meant: what a caller names becomes a version, a mix, or the bare base; and its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import NotFound, Unsupported
from ..names import Ref
from ..store import Store
from ..tasks.registry import make_task
from ..tasks.task import Task
from .mixes import Chosen, MixRef, resolve_mix


class References:
    """The part of an engine that knows names, until it is closed."""

    store: Store
    tasks: dict[str, Task | None]
    _closed: bool

    def check_open(self) -> None:
        """Raise Unsupported after `close`."""
        if self._closed:
            raise Unsupported("This runtime is closed.", "Make a new one.")

    def resolve(self, ref: Chosen) -> Ref | None:
        """The version a reference names now, or the mix that weights of some make; None is the bare base."""
        return self.resolve_all([ref])[0]

    def resolve_all(self, chosen: Sequence[Chosen]) -> list[Ref | None]:
        """`resolve` for some at once: what is named twice is the same version both times."""
        self.check_open()
        known: dict[str | Ref, Ref | None] = {}

        def one(ref: Any) -> Ref | None:
            if ref is None or (isinstance(ref, Ref) and ref.digest is not None):
                return ref
            if not isinstance(ref, str | Ref):
                raise Unsupported(
                    f"{ref!r} is not an adapter.", "Write name, name@3 or name:prod, or None for the base."
                )
            if ref not in known:
                known[ref] = self.store.resolve(ref)
            return known[ref]

        return [resolve_mix(ref, one) if isinstance(ref, Mapping) else one(ref) for ref in chosen]

    def named(self, ref: Chosen) -> tuple[Ref, str]:
        """A reference that must name an adapter, and its digest."""
        resolved = self.resolve(ref)
        if resolved is None:
            raise Unsupported("That is the bare base, which is always there.", "Name an adapter.")
        assert resolved.digest is not None
        return resolved, resolved.digest

    def task(self, ref: Chosen) -> Task | None:
        """The task an adapter was trained for, if its card says; a mix has that of its head, or heaviest member."""
        resolved, digest = self.named(ref)
        with suppress(KeyError):  # asked for once: another thread may forget it
            return self.tasks[digest]
        if isinstance(resolved, MixRef):
            return self.task(resolved.heaviest)
        if resolved.version is None:
            raise NotFound(f"{resolved} was never stored and has left its slot.", "Attach it again, or raise slots.")
        config = self.store.card(resolved).task
        found = self.tasks[digest] = make_task(config) if config.get("type") else None
        return found
