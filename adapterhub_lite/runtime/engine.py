"""The engine below `Runtime`: which adapters are resident, and how the rows of a call become batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..adapters.fit import Fitted
from ..bases.load import Base
from ..errors import NotFound, Unsupported
from ..events import Listener
from ..names import Ref
from ..store import Store
from ..tasks.registry import make_task
from ..tasks.task import Task
from .admit import Admitted, admit, prove
from .batch import BatchPlan, Composer
from .memo import Memo
from .remark import remark
from .sites import SiteHooks
from .slots import Slots


class Engine:
    """Base, store, slots and hooks of one runtime. Knows references and token rows, not texts."""

    def __init__(self, base: Base, store: Store, slots: int, batch_size: int, on_event: Listener) -> None:
        self.base = base
        self.store = store
        self.batch_size = batch_size
        self.slots = Slots(slots)
        self.hooks = SiteHooks()
        self.composer = Composer()
        self.tasks: dict[str, Task | None] = {}
        self._memo = Memo()
        self._proven: set[str] = set()
        self._remarked: set[str] = set()
        self._on_event = on_event
        self._closed = False

    def close(self) -> None:
        """Take the hooks off the base and refuse every later batch: without hooks it would answer as the bare base."""
        self._closed = True
        self.hooks.remove()

    def resolve(self, ref: str | Ref | None) -> Ref | None:
        """The version a reference names now; None is the bare base."""
        if ref is None or (isinstance(ref, Ref) and ref.digest is not None):
            return ref  # type: ignore[return-value]
        if not isinstance(ref, str | Ref):
            raise Unsupported(f"{ref!r} is not an adapter.", "Write name, name@3 or name:prod, or None for the base.")
        return self.store.resolve(ref)

    def fitted(self, ref: Ref) -> Fitted:
        """The resident adapter, brought in if it is not."""
        assert ref.digest is not None
        held = self.slots.get(ref.digest)
        if held is None:
            if ref.version is None:
                raise NotFound(f"{ref} was never stored and has left its slot.", "Attach it again, or raise slots.")
            admitted = admit(self.store, ref, self.base)
            self._prove(admitted, ref.digest)
            held = admitted.fitted
            self.keep(held)
            if admitted.remark and ref.digest not in self._remarked:
                self._remarked.add(ref.digest)
                remark(admitted.remark, ref.digest, self.base, self._on_event)
        return held

    def _prove(self, admitted: Admitted, digest: str) -> None:
        """Measure a version before anybody is served by it, unless that was done on this machine."""
        if digest in self._proven:
            return
        if not self._memo.holds(digest, self.base):
            self._memo.add(digest, self.base, prove(admitted, self.base))
        self._proven.add(digest)

    def keep(self, fitted: Fitted) -> None:
        """Make a fitted adapter resident."""
        out = self.slots.put(fitted)
        if out is not None:
            self.composer.forget(out)
        self.hooks.cover(fitted.sites)

    def task(self, ref: str | Ref) -> Task | None:
        """The task a stored adapter was trained for, if its card says."""
        resolved = self.resolve(ref)
        assert resolved is not None
        assert resolved.digest is not None
        if resolved.digest not in self.tasks:
            config = self.store.card(resolved).task
            self.tasks[resolved.digest] = make_task(config) if config.get("type") else None
        return self.tasks[resolved.digest]

    @contextmanager
    def plan(self, rows: Sequence[Ref | None]) -> Iterator[BatchPlan]:
        """The plan of one batch, whose adapters stay resident while the block runs."""
        if self._closed:
            raise Unsupported("This runtime is closed.", "Make a new one.")
        self.base.check_free()
        digests = {r.digest for r in rows if r is not None and r.digest is not None}
        with self.slots.lease(digests):
            fitted = {r.digest: self.fitted(r) for r in rows if r is not None}
            yield self.composer.compose([fitted[r.digest] if r else None for r in rows], self.base.device)

    def parts(self, prompts: Sequence[list[int]], rows: Sequence[Ref | None]) -> Iterator[list[int]]:
        """Cut the rows into batches, longest first: like lengths together, no more adapters than slots.

        Where the base needs it, a batch has one prefix length.
        """
        order = sorted(range(len(prompts)), key=lambda i: (self.group(rows[i]), -len(prompts[i])))
        part: list[int] = []
        used: set[str | None] = set()
        for i in order:
            row = rows[i]
            more = used | ({row.digest} if row else set())
            other_group = bool(part) and self.group(rows[part[0]]) != self.group(row)
            if part and (len(part) >= self.batch_size or len(more) > self.slots.capacity or other_group):
                yield part
                part, more = [], {row.digest} if row else set()
            part.append(i)
            used = more
        if part:
            yield part

    def group(self, row: Ref | None) -> int:
        """Rows of different groups cannot share a batch: an encoder-decoder's prefixes must have one length."""
        if self.base.kind != "seq2seq" or row is None:
            return 0
        prefix = self.fitted(row).prefix
        return prefix.tokens if prefix else 0
