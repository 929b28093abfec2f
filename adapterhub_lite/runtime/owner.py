"""Who computes with a base: one at a time and in turn; the texts of a runtime are written by one thread of its own."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

import torch

from ..bases.load import Base
from ..errors import Unsupported
from ..kernels.threads import release_pool
from .engine import Engine
from .requests import Call
from .scheduler import Scheduler

# How often somebody who waits for a base looks whether an adapter is trained on it now, in seconds.
_LOOK = 0.02
# A thread that steps for longer than `_LONG` seconds sleeps for `_PAUSE`: training takes the base's lock out of turn.
_LONG, _PAUSE = 0.05, 0.001
_LIVE: weakref.WeakSet[Owner] = weakref.WeakSet()


class Gate:
    """The lock of a base, in the order of asking: who steps again and again does not keep it from the others.

    It is a context manager that a thread may enter twice.

    Args:
        entered: called whenever the gate has been entered, but for a thread that is within it already.
        taken: called again and again while somebody else has the lock; it may raise. Left out: raises Unsupported while
            an adapter is trained on the base.
    """

    def __init__(
        self, base: Base, entered: Callable[[], None] | None = None, taken: Callable[[], None] | None = None
    ) -> None:
        self._base, self._entered, self._taken = base, entered, taken or base.check_free
        self._next: Any = base.derived.setdefault("next", threading.RLock())

    @property
    def held(self) -> bool:
        """Whether this thread holds the base's lock."""
        return bool(self._base.lock._is_owned())

    def take(self, timeout: float) -> bool:
        """Take the base's lock; False where it was not free within `timeout` seconds. For a thread without signals."""
        if self.held:
            return bool(self._base.lock.acquire())
        if not self._next.acquire(timeout=timeout):
            return False
        try:
            return bool(self._base.lock.acquire(timeout=timeout))
        finally:
            self._next.release()

    def release(self) -> None:
        """Give back what `take` took."""
        self._base.lock.release()

    def __enter__(self) -> None:
        if self.held:
            return
        try:
            while not self.take(_LOOK):
                self._taken()
            if self._entered is not None:
                self._entered()
        except BaseException:
            # Ctrl-C comes between any two steps, also just after a lock was taken: what this thread has is the truth.
            for lock in (self._next, self._base.lock):
                while lock._is_owned():
                    lock.release()
            raise

    @property
    def __exit__(self) -> Callable[..., None]:
        """The lock's own, which is no Python code: Ctrl-C cannot come between the end of a block and the release.

        `with` asks for it before it enters; a thread that has the lock by then gives nothing back.
        """
        leave: Callable[..., None] = _nothing if self.held else self._base.lock.__exit__
        return leave


class Owner:
    """The thread that writes the texts of one runtime. It starts at the first call and does not keep the runtime alive.

    It holds the base's lock for one step at a time. While an adapter is trained on the base, new calls are refused, and
    rows that run wait for the end of it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scheduler = Scheduler(engine)
        self.gate = Gate(engine.base, self._sweep)
        self._briefly = Gate(engine.base, taken=_busy)
        self._at_last = Gate(engine.base, taken=_nothing)
        self._guard = threading.RLock()  # entered by itself: a condition's own way out is Python, as `Gate` says
        self._changed = threading.Condition(self._guard)
        self._thread: threading.Thread | None = None
        self._threads = torch.get_num_threads()
        self._closed = False
        self._turning = False

    def submit(self, call: Call) -> None:
        """Let a call's rows wait for their turn.

        A thread that holds the base's lock, as a listener does, drives its rows itself, apart from all others.
        """
        self.check_open()
        if self.gate.held:
            apart = Scheduler(self._engine)
            call.drive, call.wake = lambda: self._turn_apart(apart), lambda: self._give_up(apart, call)
            apart.submit(call)
            return
        try:
            self._hand_over(call)
        except BaseException:
            call.cancel()  # nobody waits for what was begun
            raise

    def _hand_over(self, call: Call) -> None:
        call.wake, call.guard = self._wake, self._check_free_to_wait
        self._scheduler.read_ahead(call)
        release_pool()  # the caller only waits from here on
        with self._guard:
            self.check_open()
            self._threads = call.threads
            self._scheduler.submit(call)
            if self._thread is None or not self._thread.is_alive():  # it does not outlive a fork
                self._thread = threading.Thread(target=self._run, name="adapterhub-runtime", daemon=True)
                self._thread.start()
                _LIVE.add(self)
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raise Unsupported after `close`."""
        if self._closed:
            raise _closed()

    def close(self) -> None:
        """Fail all rows that wait or run with Unsupported, end the thread when its step is done, and close the engine.

        It waits for whoever computes with the base now: hooks are not taken from under a forward pass.
        """
        self.stop()
        if self.gate.held:
            self._end()
        elif self._thread is not None:
            self._thread.join()
        with self._at_last:
            self._engine.close()

    def stop(self) -> None:
        """`close` without waiting for it."""
        with self._guard:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread."""
        if self._thread is not None:
            self._thread.join(timeout)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        rested = time.monotonic()
        while True:
            with self._guard:
                while not (self._closed or self._scheduler.busy):
                    release_pool()
                    self._changed.wait()
                    rested = time.monotonic()
                threads = self._threads
            if threads != torch.get_num_threads():  # torch keeps it for each thread
                torch.set_num_threads(threads)
            if self.gate.take(_LOOK):
                try:
                    if self._closed:
                        self._end()
                        return
                    self._turn()
                finally:
                    self.gate.release()
                if time.monotonic() - rested > _LONG:
                    time.sleep(_PAUSE)
                    rested = time.monotonic()
            elif self._closed:
                self._scheduler.refuse(_closed())
                return
            else:
                self._refuse_in_training()

    def _turn(self) -> None:
        self._turning = True
        try:
            self._scheduler.turn()
        except BaseException as error:  # what no row is to blame for; the thread goes on
            self._scheduler.refuse(error)
        finally:
            self._turning = False

    def _refuse_in_training(self) -> None:
        try:
            self._engine.base.check_free()
        except Unsupported as error:
            self._scheduler.refuse(error, running=False)

    def _end(self) -> None:
        if not self._turning:
            self._scheduler.refuse(_closed())

    # -- other threads -------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._guard:
            self._changed.notify_all()

    def _sweep(self) -> None:
        """What has been cancelled before somebody enters leases nothing any more."""
        if not self._turning:
            self._scheduler.sweep()

    def _turn_apart(self, scheduler: Scheduler) -> None:
        with self.gate:
            if self._closed:
                scheduler.refuse(_closed())
            scheduler.turn()

    def _give_up(self, scheduler: Scheduler, call: Call) -> None:
        """Let go of the cancelled rows of a call that its own thread drives, also where an interrupt left them."""
        with suppress(_Busy), self._briefly:
            scheduler.sweep()
            for row in call.rows:
                if row.cancelled and not row.done:
                    row.close(CancelledError())

    def _check_free_to_wait(self) -> None:
        if self.gate.held:
            self._engine.base.check_free()
            raise Unsupported(
                "This thread holds the base, so that nobody can write the text it waits for.", "Wait outside."
            )


class _Busy(Exception):
    """Somebody else computes with the base."""


def _busy() -> None:
    raise _Busy


def _nothing(*_: object) -> None:
    """Wait on, or leave things as they are."""


def _closed() -> Unsupported:
    return Unsupported("This runtime is closed.", "Make a new one.")


def _stop_all() -> None:
    """A thread that computes while the interpreter ends may take the process down with it."""
    owners = list(_LIVE)
    for owner in owners:
        owner.stop()
    for owner in owners:
        owner.join(10.0)


atexit.register(_stop_all)
