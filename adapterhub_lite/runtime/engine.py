"""The engine below `Runtime`: which adapters are resident, and how the rows of a call become batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from ..adapters.adapter import WEIGHTS_FILE
from ..adapters.fit import Fitted
from ..bases.load import Base
from ..bases.views import VIEWS
from ..errors import AdapterHubError, CapacityError, NotFound, SlowAdapter, Unsupported
from ..events import Listener
from ..formats.safetensors_header import read_header
from ..formats.specs import InjectedSpec, PromptSpec
from ..names import Ref
from ..store import Store
from ..tasks.task import Task
from .admit import Admitted, admit, prove
from .ahead import Ahead
from .batch import BatchPlan
from .budget import Budget
from .memo import Memo
from .mixes import MixRef, mix
from .own_forward import flattening
from .prefill import PIECE
from .references import References
from .remark import remark
from .sites import SiteHooks
from .static_rows import Static
from .texts import tokenizer_lock
from .tiers import BoundedComposer, HostTier, Prefetch, Residence, device_budget, host_tier


class Engine(References):
    """Base, store, slots and hooks of one runtime. Knows references and token rows, not texts."""

    def __init__(
        self,
        base: Base,
        store: Store,
        slots: int | None,
        batch_size: int,
        on_event: Listener,
        memory: int | str | None = None,
        host_memory: int | str | None = None,
        compile: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise CapacityError(f"A batch needs at least one row, not {batch_size!r}.", "Give batch_size=1 or more.")
        self.base = base
        self.store = store
        self.batch_size = batch_size
        self.piece = PIECE
        self.static = Static(base, compile, on_event, self._room_beside)
        self.slots = Budget(slots, device_budget(memory, base.device), lambda: self.static.nbytes)
        self.host = host_tier(host_memory, base.device)
        self.hooks = SiteHooks()
        self.composer = BoundedComposer(lambda: self.slots.free - self.ahead.nbytes)
        self.tasks: dict[str, Task | None] = {}
        self._prefetch = Prefetch()
        self.ahead = Ahead(self.slots, self.composer, self._prefetch, self.size, self._read_ahead)
        self._arriving: dict[str, Callable[[], None]] = {}
        self._sizes: dict[str, int] = {}
        self._memo = Memo()
        self._proven: set[str] = set()
        self._remarked: set[str] = set()
        self._alone: dict[str, bool] = {}  # whether an adapter runs through PEFT, in batches of its own
        self._on_event = on_event
        self._viewed: set[str | None] = set()  # PEFT's task types of what was fitted here
        self._closed = False

    def close(self) -> None:
        """Take the hooks off the base and refuse every later batch: without hooks it would answer as the bare base.

        Adapters are let go, but for those of a batch that runs.
        """
        self._closed = True
        self._prefetch.close()
        self.ahead.close()
        self.hooks.remove()
        self.static.close()
        held = {fitted.digest for fitted in self.slots.resident()}
        if self.host is not None:
            held |= {image.fitted.digest for image in self.host.resident()}
        for digest in held:
            self.slots.unpin(digest)
            with suppress(CapacityError):
                self._drop(digest)
        self.tasks.clear()

    # -- bringing in ---------------------------------------------------------------------------------------------

    def fitted(self, ref: Ref) -> Fitted:
        """The resident adapter, brought in if it is not. What fails changes nothing."""
        assert ref.digest is not None
        held = self.slots.get(ref.digest)
        if held is None:
            held = self._found(ref)
            self.keep(held)
        if ref.digest in self._arriving:
            self._arriving.pop(ref.digest)()
        return held

    def keep(self, fitted: Fitted) -> None:
        """Make a fitted adapter resident."""
        self._say_slow(fitted)  # first: a listener that raises must find nothing changed
        self.check_open()  # it may have been closed while this was on its way
        size = fitted.nbytes
        for out in self.slots.make_room(fitted.digest, fitted.name, size):
            self._forget(out)
        self.composer.trim(self.slots.free - size)
        self.slots.put(fitted)
        self._viewed.add(fitted.task_type)
        self.hooks.cover(fitted.sites)
        if self._closed:  # by the collector, in between
            self.hooks.remove()
        if self.host is not None and fitted.injected is None:  # layers of PEFT are bound to the device
            self._put_in_host(self.host, fitted)

    def drop(self, ref: Ref) -> bool:
        """Let an adapter leave the memory of device and host, and come in by no prefetch; False if it was nowhere."""
        assert ref.digest is not None
        dropped = self._drop(ref.digest)
        return self._prefetch.drop(ref.digest) or dropped

    def prefetch(self, refs: Iterable[Ref]) -> None:
        """Begin to bring adapters in beside what runs; see `Prefetch`."""
        self.check_open()
        for ref in refs:
            assert ref.digest is not None
            if isinstance(ref, MixRef):
                self.prefetch(member for member, _ in ref.members)
            if ref.digest not in self.slots:
                self._prefetch.start(ref.digest, partial(self._read_ahead, ref), partial(self._install, ref))

    def residency(self) -> list[Residence]:
        """Every adapter in memory, where it is nearest; least recently used first, the device's last."""
        held = self.slots.resident()
        here = {fitted.digest for fitted in held}
        images = [] if self.host is None else [i for i in self.host.resident() if i.fitted.digest not in here]
        found = [Residence(image.fitted.name, "host", image.nbytes, False, 0) for image in images]
        for fitted in held:
            digest = fitted.digest
            pinned, leases = self.slots.is_pinned(digest), self.slots.leases(digest)
            found.append(Residence(fitted.name, "device", fitted.nbytes, pinned, leases))
        return found

    def _found(self, ref: Ref) -> Fitted:
        """An adapter that is not in a slot: mixed, from the host's memory, or from the store."""
        assert ref.digest is not None
        if self.host is not None and ref.digest in self.host:
            self.slots.check_room(ref.digest, str(ref), self.host.size(ref.digest) or 0)
            held, self._arriving[ref.digest] = self.host.promote(ref.digest)
            return held
        if isinstance(ref, MixRef):
            return self._mixed(ref)
        if ref.version is None:
            raise NotFound(f"{ref} was never stored and has left its slot.", "Attach it again, or raise slots.")
        self.slots.check_room(ref.digest, str(ref), self.size(ref))
        ahead = self._prefetch.take(ref.digest) or self.ahead.take(ref.digest)
        admitted = ahead or admit(self.store, ref, self.base)
        self._prove(admitted, ref.digest)
        if admitted.remark and ref.digest not in self._remarked:
            self._remarked.add(ref.digest)
            remark(admitted.remark, ref.digest, self.base, self._on_event)
        return admitted.fitted

    def _mixed(self, ref: MixRef) -> Fitted:
        """Members are used where they are; one that is read for this stays only where that puts nothing out."""
        self._prefetch.take(str(ref.digest))
        members = []
        for member, _ in ref.members:
            held = self.slots.get(str(member.digest))
            if held is None:
                held = self._found(member)
                if self.slots.has_room(held.nbytes):
                    self.keep(held)
            if member.digest in self._arriving:
                self._arriving.pop(str(member.digest))()
            members.append(held)
        made = mix(ref, members, self.base.siblings)
        if made.head is not None:
            headed = next(m for (m, _), fitted in zip(ref.members, members, strict=True) if fitted.head is not None)
            self.tasks[made.digest] = self.task(headed)
        else:  # of a member that may leave before the mix does, or has left the store
            with suppress(AdapterHubError):
                self.tasks[made.digest] = self.task(ref.heaviest)
        return made

    def _prove(self, admitted: Admitted, digest: str) -> None:
        """Measure a version before anybody is served by it, unless that was done on this machine."""
        if digest in self._proven:
            return
        if not self._memo.holds(digest, self.base):
            self._memo.add(digest, self.base, prove(admitted, self.base))
        self._proven.add(digest)

    def _in_host(self, ref: Ref) -> bool:
        return self.host is not None and str(ref.digest) in self.host

    def _say_slow(self, fitted: Fitted) -> None:
        """Say once of an adapter that PEFT runs that it is slower."""
        if self._alone.setdefault(fitted.digest, fitted.injected is not None) and fitted.injected is not None:
            key = f"{fitted.digest} {fitted.injected.method}"
            if key not in self._remarked:
                self._remarked.add(key)
                text = (
                    f"{fitted.name} ({fitted.injected.method}) has no form of ours: PEFT's own layers compute with it, "
                    "in batches of its own. It is slower than other adapters."
                )
                remark(text, fitted.digest, self.base, self._on_event, SlowAdapter)

    def _runs_alone(self, ref: Ref) -> bool:
        """Whether PEFT runs an adapter, which need not be resident for that to be known."""
        digest = str(ref.digest)
        if digest not in self._alone and not isinstance(ref, MixRef) and ref.version is not None:
            self._alone[digest] = isinstance(self.store.spec(ref), InjectedSpec)
        return self._alone.get(digest, False)

    def _drop(self, digest: str) -> bool:
        resident = self.slots.drop(digest)
        in_host = self.host is not None and self.host.drop(digest)
        self._forget(digest)
        return in_host or resident

    def _put_in_host(self, host: HostTier, fitted: Fitted) -> None:
        """Keep a copy in the host's memory; what goes out for it and is nowhere else is forgotten."""
        before = [image.fitted.digest for image in host.resident()]
        host.put(fitted)
        for digest in before:
            if digest not in host and digest not in self.slots:
                self._forget(digest)

    def _forget(self, digest: str) -> None:
        self.composer.forget(digest)
        self._arriving.pop(digest, None)
        if self.host is None or digest not in self.host:  # else it comes back, also what was never stored
            self.tasks.pop(digest, None)
            self._alone.pop(digest, None)

    def _read_ahead(self, ref: Ref) -> Admitted | None:
        """What can be done for an adapter without the lock of the base: its bytes read, verified and fitted."""
        if isinstance(ref, MixRef) or ref.version is None or self._in_host(ref):
            return None
        spec = self.store.spec(ref)
        # The base itself reads a prompt; PEFT's layers, and the first view as another class, are made by one thread.
        if isinstance(spec, PromptSpec | InjectedSpec) or (
            spec.task_type in VIEWS and spec.task_type not in self._viewed
        ):
            return None
        self.slots.check_room(str(ref.digest), str(ref), self.size(ref))
        return admit(self.store, ref, self.base)

    def _install(self, ref: Ref) -> None:
        with self.base.lock, tokenizer_lock(self.base):
            # Whoever used it meanwhile took it from the prefetch, and may have unloaded it since.
            if not self._closed and str(ref.digest) in self._prefetch:
                self.base.check_free()
                self.fitted(ref)

    def _room_beside(self, size: int) -> None:
        """Raise CapacityError where buffers of a decode step cannot have so many bytes more."""
        self.slots.check_beside(size, self.ahead.nbytes)
        self.composer.trim(self.slots.free - self.ahead.nbytes - size)

    # -- batches -------------------------------------------------------------------------------------------------

    @contextmanager
    def plan(self, rows: Sequence[Ref | None]) -> Iterator[BatchPlan]:
        """The plan of one batch, whose adapters stay resident while the block runs."""
        self.check_open()
        self.base.check_free()
        digests = {r.digest for r in rows if r is not None and r.digest is not None}
        with self.slots.lease(digests):
            fitted = {r.digest: self.fitted(r) for r in rows if r is not None}
            if self._closed:  # by a listener of what came in: the hooks are gone, and this would be the bare base
                raise Unsupported("This runtime was closed meanwhile.", "Make a new one.")
            yield self.composer.compose([fitted[r.digest] if r else None for r in rows], self.base.device)

    def parts(self, prompts: Sequence[list[int]], rows: Sequence[Ref | None]) -> Iterator[list[int]]:
        """Cut the rows into batches, longest first: like lengths together, no more adapters than slots and memory hold.

        Where the base needs it, a batch has one prefix length.
        """
        order = sorted(range(len(prompts)), key=lambda i: (self.group(rows[i]), -len(prompts[i])))
        part: list[int] = []
        used: dict[str, Ref] = {}
        for i in order:
            row = rows[i]
            own = {row.digest: row} if row is not None and row.digest is not None else {}
            other_group = bool(part) and self.group(rows[part[0]]) != self.group(row)
            if part and (len(part) >= self.batch_size or other_group or not self.can_hold((used | own).values())):
                yield part
                part, used = [], {}
            part.append(i)
            used |= own
        if part:
            yield part

    def can_hold(self, refs: Iterable[Ref], *, beside_leases: bool = False) -> bool:
        """Whether these can be resident at once, beside what is pinned (and what running batches lease).

        For a caller that would rather wait, or cut its batch, than meet a CapacityError.
        """
        return self.slots.hold({str(ref.digest): self.size(ref) for ref in refs}, beside_leases)

    def size(self, ref: Ref) -> int:
        """Bytes of an adapter in memory; of one that is not there yet, by the header of its file, or 0 if it has none.

        The header is believed for this alone. A mix takes what its members take together, or less.
        """
        digest = str(ref.digest)
        held = self.slots.size(digest) or (self.host.size(digest) if self.host is not None else None)
        if held is not None:
            return held
        if isinstance(ref, MixRef):
            return sum(self.size(member) for member, _ in ref.members)
        if digest not in self._sizes:
            with suppress(AdapterHubError, OSError):
                header = read_header(self.store.folder(ref) / WEIGHTS_FILE)
                elements = sum(tensor.elements for tensor in header.tensors.values())
                self._sizes[digest] = elements * self.base.dtype.itemsize
        return self._sizes.get(digest, 0)

    def group(self, row: Ref | None) -> tuple[int, str]:
        """Rows of different groups cannot share a batch.

        An encoder-decoder's prefixes must have one length, layers of PEFT are those of one adapter, and so is a batch
        of a base with layers that see the tokens of all rows as one list.
        """
        apart = row is not None and (self._runs_alone(row) or flattening(self.base))
        prefix = self.fitted(row).prefix if self.base.kind == "seq2seq" and row is not None else None
        return (prefix.tokens if prefix else 0, str(row.digest) if row is not None and apart else "")
