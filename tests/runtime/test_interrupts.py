"""Ctrl-C between any two steps, listeners that close or raise: no lock stays taken, nobody gets the bare base."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.texts import tokenizer_lock
from adapterhub_lite.store import Store
from tests.runtime import build


@pytest.fixture
def runtime(tiny_folder: Callable[..., Path], tmp_path: Path) -> Runtime:
    made = Runtime(load_base(str(tiny_folder("gpt2")), device="cpu"), Store(tmp_path / "store"))
    for seed, name in enumerate("ab"):
        build.stored(made.store, made.base, name, build.lora(made.base, seed))
    return made


def others_can_compute(runtime: Runtime) -> bool:
    """Whether another thread gets its text."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.extend(runtime.generate(["abc"], "a", max_new_tokens=3)), daemon=True)
    thread.start()
    thread.join(60)
    return bool(said)


@pytest.mark.parametrize("where", ["take", "_entered"])
def test_an_interrupt_just_after_a_lock_was_taken_gives_it_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    gate: Any = runtime._lock
    real = getattr(gate, where)

    def interrupted(*given: Any) -> None:
        real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.load("a")
    assert not gate.held
    assert others_can_compute(runtime)


def test_an_interrupt_of_who_is_next_lets_the_others_come(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    gate: Any = runtime._lock
    real = gate._next

    class Interrupted:
        """Taken, and interrupted before the caller hears of it."""

        release, _is_owned = real.release, real._is_owned

        def acquire(self, timeout: float) -> bool:
            real.acquire(timeout=timeout)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate, "_next", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            runtime.load("a")
    assert not real._is_owned()
    assert others_can_compute(runtime)


def test_an_interrupt_within_the_gate_leaves_it_with_who_had_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate: Any = runtime._lock
    with gate:
        with monkeypatch.context() as patch:
            patch.setattr(runtime._engine, "named", lambda ref: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                runtime.load("a")
        assert gate.held
    assert not gate.held
    assert others_can_compute(runtime)


def test_a_runtime_that_its_listener_closes_does_not_answer_as_the_bare_base(runtime: Runtime) -> None:
    """The listener hears of an adapter that does not say its base, while a row of it enters the batch."""
    files = dict(build.lora(runtime.base, 5).files())
    runtime.store.put("c", files, Card())
    closing: list[Runtime] = []
    other = Runtime(runtime.base, runtime.store, on_event=lambda event: closing[0].close())
    closing.append(other)
    call = other._ask([[50, 51, 52]], [other._engine.resolve("c")], 4, (), None)
    with pytest.raises(Unsupported, match="closed"):
        call.texts()
    assert call.rows[0].tokens == []


def test_a_listener_that_raises_puts_nobody_out(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Runtime(runtime.base, runtime.store, slots=1)
    small.load("a")

    def say(fitted: Any) -> None:
        raise ValueError("the listener")

    monkeypatch.setattr(small._engine, "_say_slow", say)
    with pytest.raises(ValueError, match="the listener"):
        small.load("b")
    assert small.resident() == ["a@1"]


# -- everywhere that CPython looks for signals ----------------------------------------------------------------------


class _Interrupt:
    """Ctrl-C at the n-th place where it can come: the first step of a Python function, the return from one in C."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        if event in ("call", "c_return"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def interrupted(n: int, work: Callable[[], object]) -> tuple[bool, BaseException | None]:
    """Whether `work` had an n-th such place, and what it raised."""
    interrupt, error = _Interrupt(n), None
    sys.setprofile(interrupt)
    try:
        work()
    except BaseException as raised:
        error = raised
    finally:
        sys.setprofile(None)
    return interrupt.left <= 0, error


def owned(runtime: Runtime) -> list[str]:
    """The locks that this thread has."""
    gate, owner = runtime._lock, runtime._owner
    locks = {"base": runtime.base.lock, "next": gate._next, "tokenizer": tokenizer_lock(runtime.base)}
    locks |= {"owner": owner._guard, "scheduler": owner._scheduler._mutex}
    return [name for name, lock in locks.items() if lock._is_owned()]


@pytest.mark.parametrize("work", ["load", "nested", "unpin"])
def test_an_interrupt_anywhere_keeps_no_lock(runtime: Runtime, work: str) -> None:
    """The last ones come while the gate is left."""
    runtime.pin("a")

    def nested() -> None:
        with runtime._lock:
            runtime.load("a")

    def unpin() -> None:
        runtime.pin("a")
        runtime.unpin("a")

    does = {"load": lambda: runtime.load("a"), "nested": nested, "unpin": unpin}[work]
    n, kinds = 0, set()
    while True:
        n += 1
        came, error = interrupted(n, does)
        assert owned(runtime) == [], f"at place {n}: {error!r}"
        kinds.add(type(error))
        if not came:
            break
    assert n > 20
    assert kinds == {KeyboardInterrupt, type(None)}
    assert others_can_compute(runtime)


def test_an_interrupt_anywhere_in_a_call_lets_others_write(runtime: Runtime) -> None:
    """In a call for a text, while it is begun, waited for, and ended."""
    expected = runtime.generate(["abc"], "a", max_new_tokens=2)
    n, raised = 0, 0
    while True:
        n += 1 if n < 60 else 7  # every place of the short way in, and some of the long wait
        came, error = interrupted(n, lambda: runtime.generate(["abc"], "a", max_new_tokens=2))
        assert owned(runtime) == [], f"at place {n}: {error!r}"
        raised += isinstance(error, KeyboardInterrupt)
        if not came:
            break
    assert raised > 20
    assert others_can_compute(runtime)
    assert runtime.generate(["abc"], "a", max_new_tokens=2) == expected
    with runtime._lock:
        assert not runtime._owner._scheduler.busy
        assert not runtime._engine.slots._leases
    for n in (1, 5, 20, 40):
        interrupted(n, runtime.close)
        assert owned(runtime) == []
    runtime.close()
