"""What is asked of the scheduler: a call with its rows, each row's settings and text, and the handle on one answer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from typing import Any

import torch

from ..adapters.fit import Fitted
from ..bases.load import Base
from ..errors import Unsupported
from ..names import Ref
from .sampling import RowSampler, Sampling, row_seeds
from .texts import TextStream, tokenizer_lock

Stop = str | Sequence[str] | Sequence[Sequence[str]]
Samplings = Sampling | Sequence[Sampling | None] | None


class Call:
    """The rows that one caller asks for together, and where it waits for them.

    `lock` guards what both sides see. Who drives the rows is the owner thread, or the caller itself (`drive`).
    """

    def __init__(self, streams: bool = False) -> None:
        self.streams = streams
        self.lock = threading.RLock()  # entered by itself: the way out of a condition is Python, where Ctrl-C comes in
        self.changed = threading.Condition(self.lock)
        self.waiting: deque[Request] = deque()
        self.rows: list[Request] = []
        self.running = 0
        self.closed = False  # its next row waits for the batch of its rows that nobody can join
        self.remaining = 0
        self.error: BaseException | None = None
        self.threads = torch.get_num_threads()
        self.notes: list[Callable[[], None]] = []
        self.drive: Callable[[], None] | None = None
        self.wake: Callable[[], None] = _nothing
        self.guard: Callable[[], None] = _nothing

    def add(self, rows: Sequence[Request], by_adapter: bool = False) -> None:
        """Take rows in, the longest first, so that like lengths are read together.

        Args:
            by_adapter: those of one adapter after those of another, because not all fit into memory at once.
        """
        self.rows = list(rows)
        self.remaining = len(self.rows)
        place: dict[str | None, int] = {}
        for row in self.rows if by_adapter else ():
            place.setdefault(_digest(row), len(place))
        self.waiting.extend(sorted(self.rows, key=lambda row: (place.get(_digest(row), 0), -len(row.prompt))))

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Until `ready()`; False after `timeout` seconds without it.

        Raises:
            Unsupported: this thread holds the base, so that nobody could compute what it waits for.
        """
        if not ready():
            if self.drive is not None:
                while not ready():
                    self.drive()
            else:
                self.guard()
                with self.lock:
                    if not self.changed.wait_for(ready, timeout):
                        return False
        while self.notes:
            self.notes.pop(0)()
        return True

    def texts(self) -> list[str]:
        """The answers of all rows; the first error ends all of them, and so does an interrupt of this thread."""
        try:
            self.wait(lambda: self.error is not None or self.remaining == 0)
            if self.error is None:
                return [row.text for row in self.rows]
        except BaseException:
            self.cancel()
            raise
        self.cancel()
        self.wait(lambda: self.remaining == 0)  # what the rows lease is free when the caller hears of the error
        raise self.error

    def cancel(self) -> None:
        """Give up all rows that are not done."""
        for row in self.rows:
            row.cancelled = True
        self.wake()


class Request:
    """One row: its prompt and settings, and what has become of it.

    Attributes:
        ref: its adapter as the caller named it; `fitted` the version it began with, leased until it leaves.
        tokens: what was written so far.
    """

    def __init__(
        self, call: Call, prompt: list[int], ref: Ref | None, most: int, text: TextStream, row: RowSampler
    ) -> None:
        self.call, self.prompt, self.ref, self.most, self.sampler = call, prompt, ref, most, row
        self.tokens: list[int] = []
        self.text = ""
        self.pieces: list[str] = []
        self.fitted: Fitted | None = None
        self.lease = ExitStack()
        self.cancelled = False
        self.entered = False
        self.done = False
        self.error: BaseException | None = None
        self._stream = text

    def take(self, token: int, ends: set[int]) -> bool:
        """Add a token; returns whether more are wanted."""
        if token in ends or token in self.sampler.sampling.stop_token_ids:
            return False
        self.tokens.append(token)
        self.sampler.note(token)
        if self.call.streams or self._stream.stops:
            self._give(self._stream.push(token))
        else:
            self._stream.add(token)
        return not self._stream.done and len(self.tokens) < self.most

    def close(self, error: BaseException | None = None) -> None:
        """The row has left: tell who waits for it."""
        try:
            self.lease.close()
            if error is None:
                self._give(self._stream.finish())
        except Exception as wrong:
            error = wrong
        call = self.call
        with call.lock:
            self.done, self.error = True, error
            call.remaining -= 1
            if error is not None and call.error is None:
                call.error = error
            if call.streams or call.error is not None or call.remaining == 0:
                call.changed.notify_all()

    def _give(self, piece: str) -> None:
        if piece:
            self.text += piece
            if self.call.streams:
                with self.call.lock:
                    self.pieces.append(piece)
                    self.call.changed.notify_all()


class Answer:
    """One answer that is being written: like a future, and an iterator of its pieces as they come."""

    def __init__(self, request: Request, runtime: object) -> None:
        self._request = request
        self._runtime = runtime  # stays alive until nobody waits for the answer
        self._next = 0

    def result(self, timeout: float | None = None) -> str:
        """The whole text.

        Raises:
            TimeoutError: not there after `timeout` seconds; it goes on.
            CancelledError: it was cancelled.
        """
        if not self._request.call.wait(lambda: self._request.done, timeout):
            raise TimeoutError(f"No answer after {timeout} seconds.")
        if self._request.error is not None:
            raise self._request.error
        return self._request.text

    def done(self) -> bool:
        """Whether it is complete, failed or cancelled."""
        return self._request.done

    def cancel(self) -> bool:
        """Give it up; False if it was done already."""
        if self._request.done:
            return False
        self._request.cancelled = True
        self._request.call.wake()
        return True

    def cancelled(self) -> bool:
        """Whether it was given up before it was complete."""
        return isinstance(self._request.error, CancelledError)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids so far, without an end token."""
        return tuple(self._request.tokens)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        row = self._request
        row.call.wait(lambda: row.done or len(row.pieces) > self._next)
        if len(row.pieces) > self._next:
            self._next += 1
            return row.pieces[self._next - 1]
        if row.error is not None:
            raise row.error
        raise StopIteration


def requests(
    call: Call,
    base: Base,
    prompts: Sequence[list[int]],
    refs: Sequence[Ref | None],
    most: int | Sequence[int],
    stop: Stop,
    sampling: Samplings,
) -> list[Request]:
    """The rows of a call. Each of the last three is one value for all rows, or a list with one a row.

    Raises:
        Unsupported: a list of another length, or what is no setting.
    """
    count = len(prompts)
    mosts = _spread(most, count, "max_new_tokens", int)
    if (few := next((m for m in mosts if m < 0 or isinstance(m, bool)), None)) is not None:
        raise Unsupported(f"max_new_tokens {few} is no number of tokens.", "Give 0 or more.")
    settings = _spread(Sampling() if sampling is None else sampling, count, "sampling", Sampling)
    seeds = row_seeds(settings, shared=not isinstance(sampling, list | tuple))
    stops = _stops(stop, count)
    before = [[base.config.decoder_start_token_id]] * count if base.kind == "seq2seq" else prompts
    samplers = [RowSampler(*each) for each in zip(settings, seeds, before, strict=True)]
    texts = [TextStream(base.tokenizer, row, tokenizer_lock(base)) for row in stops]
    return [Request(call, *each) for each in zip(prompts, refs, mosts, texts, samplers, strict=True)]


def _digest(row: Request) -> str | None:
    return None if row.ref is None else row.ref.digest


def _spread(value: Any, count: int, name: str, kind: type) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise Unsupported(f"{len(values)} {name} for {count} rows.", f"Give one {name} a row, or a single one.")
    if kind is Sampling:
        values = [Sampling() if one is None else one for one in values]
    for one in values:
        if not isinstance(one, kind):
            raise Unsupported(f"{name} {one!r} is no {kind.__name__}.", f"Give a {kind.__name__}, or one a row.")
    return values


def _stops(stop: Any, count: int) -> list[Sequence[str]]:
    """A list of strings is for all rows; a list that holds lists has one entry a row."""
    per_row = isinstance(stop, list | tuple) and any(not isinstance(one, str) for one in stop)
    rows = list(stop) if per_row else [stop] * count
    if len(rows) != count:
        raise Unsupported(f"{len(rows)} lists of stop strings for {count} rows.", "Give one a row, or one for all.")
    found = [(row,) if isinstance(row, str) else row or () for row in rows]
    if not all(isinstance(row, list | tuple) and all(isinstance(text, str) for text in row) for row in found):
        raise Unsupported(f"stop {stop!r} does not hold strings.", "Give strings that end an answer.")
    return found


def _nothing() -> None:
    """What a call does that nobody drives yet."""
