"""Which rows run: whoever waits enters as places get free, whoever is done leaves, all others go on by one token.

Rows of all calls and all adapters share one batch where the base has a forward of our own; elsewhere the rows that a
call brings in together stay together to their end. Nothing here knows of threads but `submit`: the scheduler is driven
by whoever holds the base's lock.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError

from ..errors import CapacityError
from .engine import Engine
from .generate import Batch, decoder_for
from .prompting import check_lengths
from .remark import held_back
from .requests import Call, Request


class Scheduler:
    """The rows of one runtime: those that wait and those that run, at most `engine.batch_size` at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._arrived: deque[Call] = deque()
        self._calls: list[Call] = []
        self._batches: list[Batch] = []
        self._mutex = threading.RLock()
        self._full = False  # the row that is next had no slot; nothing has left since

    @property
    def busy(self) -> bool:
        """Whether a turn would do something."""
        return bool(self._arrived or self._calls or self._batches)

    @property
    def running(self) -> list[Request]:
        """The rows that are in a batch."""
        return [row for batch in self._batches for row in batch.rows if not row.done]

    def submit(self, call: Call) -> None:
        """Let the rows of a call wait for their turn; any thread may."""
        self._arrived.append(call)

    def read_ahead(self, call: Call) -> None:
        """Begin to read the adapters of a call that comes while others run, or that has to wait; any thread may."""
        if self.busy or len(call.rows) > self._engine.batch_size:
            for ref in {row.ref.digest: row.ref for row in call.rows if row.ref is not None}.values():
                self._engine.ahead.begin(ref)

    def turn(self) -> None:
        """Who was cancelled leaves, who waits enters, every other row gets a token."""
        with self._mutex:
            self.sweep()
            writing = [batch for batch in self._batches if not batch.unread]
            self._enter()
            self._read(beside=bool(writing))
            for batch in writing:
                self._step(batch)
            self._merge()

    def sweep(self) -> None:
        """Let go of rows that were cancelled."""
        with self._mutex:
            while self._arrived:
                self._calls.append(self._arrived.popleft())
            waiting = [row for call in self._calls for row in call.waiting if row.cancelled]
            for row in waiting:
                row.call.waiting.remove(row)
            for row in (*waiting, *self.running):
                if row.cancelled:
                    self._leave(row, CancelledError())
            self._forget()

    def refuse(self, error: BaseException, running: bool = True) -> None:
        """Fail the rows that wait, and those that run."""
        with self._mutex:
            self.sweep()
            for call in self._calls:
                while call.waiting:
                    self._leave(call.waiting.popleft(), error)
            if running:
                for row in self.running:
                    self._leave(row, error)
                self._batches = []
            self._forget()

    # -- entering ------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Bring in rows while there are places, those together that can be; prompts of others than ours are read."""
        groups: dict[object, list[Request]] = {}
        for row, ours in self._admitted(self._engine.batch_size - len(self.running)):
            # An encoder-decoder has one prefix length a batch.
            virtual = row.fitted.prefix.tokens if row.fitted and row.fitted.prefix else 0
            alone = row.fitted.digest if row.fitted and row.fitted.injected else ""
            groups.setdefault(None if ours else (id(row.call), virtual, alone), []).append(row)
        for key, rows in groups.items():
            rows.sort(key=lambda row: row.fitted.digest if row.fitted else "")  # neighbours of one adapter are faster
            for some in [rows] if key is not None else self._packs(rows):
                self._begin(some, read=key is not None)
        self._forget()

    def _packs(self, rows: list[Request]) -> list[list[Request]]:
        """Newcomers whose prompts are read at once: a piece of tokens together while others are there.

        A prompt that is longer than a piece is alone.
        """
        piece, packs, total = self._engine.piece, list[list[Request]](), 0
        for row in rows:
            length = len(row.prompt)
            if length <= piece:
                total += length
                if not packs or (self._batches and total > piece):
                    packs.append([])
                    total = length
                packs[-1].append(row)
        return packs + [[row] for row in rows if len(row.prompt) > piece]

    def _read(self, beside: bool) -> None:
        """Read a piece of the prompts that came first, and what is short of the others, the shortest first.

        Args:
            beside: other rows are being written, which wait for this: it is two pieces at most.
        """
        unread = [batch for batch in self._batches if batch.unread and batch.alive]
        piece = self._engine.piece
        left = piece if beside else sys.maxsize
        for batch in unread[:1] + sorted(unread[1:], key=lambda batch: batch.unread):
            if batch is not unread[0]:
                if batch.unread > min(left, piece):
                    return
                left -= batch.unread
            self._step(batch)

    def _admitted(self, places: int) -> Iterator[tuple[Request, bool]]:
        """Up to so many rows that wait, and whether a forward of ours knows them; what cannot be served fails alone.

        The call with the fewest rows running comes first, then the one that came first: a long list holds up nobody.
        """
        while places > 0 and not self._full:
            row, skipped = self._next()
            if row is None:
                return
            place = row.call.waiting.index(row)
            del row.call.waiting[place]
            try:
                fits = self._lease(row)
                ours = fits and decoder_for(self._engine.base, row.fitted) is not None
            except BaseException as error:  # of a listener, too: the caller must hear of it
                self._leave(row, error)
                continue
            if not fits or (not ours and self._runs_apart(row.call)):
                row.lease.close()
                row.call.waiting.insert(place, row)
                if not fits and skipped:
                    return
                self._full, row.call.closed = not fits, fits
            elif row.most < 1:
                self._leave(row)
            else:
                row.entered, places = True, places - 1
                row.call.running += 1
                yield row, ours

    def _next(self) -> tuple[Request | None, bool]:
        """Who is to enter, and whether somebody before him waits for an adapter that is being read.

        While rows run, nothing is waited for: who comes after enters before. If none run, the first in line does wait.
        """
        calls = sorted((c for c in self._calls if c.waiting and not c.closed), key=lambda call: call.running)
        ahead, skipped = self._engine.ahead, False
        for call in calls:
            for row in call.waiting:
                if row.ref is None or not (ahead.begin(row.ref, True) if self._batches else ahead.coming(row.ref)):
                    return row, skipped
                skipped = True
        return (calls[0].waiting[0] if calls and not self._batches else None), False

    def _lease(self, row: Request) -> bool:
        """Bring in a row's adapter, to stay until the row leaves; False if a slot gets free for it later."""
        some = [] if row.ref is None else [row.ref]
        others = any(call.running for call in self._calls)
        if others and not self._engine.can_hold(some, beside_leases=True):
            return False
        try:
            with held_back(row.call.notes):
                plan = row.lease.enter_context(self._engine.plan([row.ref]))
        except CapacityError:
            if others:
                return False
            raise
        if row.ref is not None:
            self._engine.ahead.leave(row.ref)
        check_lengths(self._engine.base, plan, [row.prompt], max(row.most, 0))
        row.fitted = plan.rows[0]
        return True

    def _runs_apart(self, call: Call) -> bool:
        """Whether a batch that nobody can join has rows of this call; the others wait, to be a batch together."""
        return any(not batch.ours and batch.rows[0].call is call for batch in self._batches)

    def _begin(self, rows: list[Request], read: bool = True) -> None:
        """Make a batch of rows, and read a piece of their prompts if asked to; what fails together is tried alone."""
        try:
            batch = Batch(self._engine, rows, decoder_for(self._engine.base, rows[0].fitted))
        except Exception as error:
            self._retry(rows, error)
            return
        self._batches.append(batch)
        if read:
            self._step(batch)

    # -- going on ------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> None:
        """A token for every row of a batch, or a piece of their prompts, the last of which gives the first token."""
        try:
            if batch.unread:
                outcomes = batch.read()
            else:
                batch.cut()
                outcomes = batch.step() if batch.alive else []
        except Exception as error:
            self._batches.remove(batch)
            self._retry([row for row in batch.rows if not row.done], error)
            return
        self._settle(outcomes)

    def _merge(self) -> None:
        """One batch of all rows that can be together."""
        for batch in [batch for batch in self._batches if not batch.alive]:
            self._batches.remove(batch)
            for call in self._calls:
                call.closed = False
        ours = [batch for batch in self._batches if batch.ours and not batch.unread]
        for batch in ours[1:]:
            first = ours[0]
            self._batches.remove(batch)
            rows = [row for row in (*first.rows, *batch.rows) if not row.done]
            try:
                first.join(batch)
            except Exception as error:
                self._batches.remove(first)
                self._retry(rows, error)
                return

    def _retry(self, rows: list[Request], error: Exception) -> None:
        """After what a batch failed of, go on with each row alone from where it is: only its cause fails again."""
        apart = len(rows) == 1 or decoder_for(self._engine.base, rows[0].fitted) is None
        for row in rows:
            if apart:
                self._leave(row, error)
            else:
                self._begin([row])

    def _settle(self, outcomes: list[tuple[Request, bool | Exception]]) -> None:
        for row, outcome in outcomes:
            if outcome is not True:
                self._leave(row, outcome or None)
        self._forget()

    def _leave(self, row: Request, error: BaseException | None = None) -> None:
        if row.entered:
            row.call.running -= 1
            self._full = False
        elif row.ref is not None and not any(r.ref == row.ref for call in self._calls for r in call.waiting):
            self._engine.ahead.leave(row.ref)
        row.close(error)

    def _forget(self) -> None:
        """Calls whose rows are all done are no longer ours."""
        self._calls = [call for call in self._calls if call.remaining]
