"""What a call is served by while aliases move, versions go, and adapters are on their way in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import NotFound, StoreCorrupt
from adapterhub_lite.runtime.requests import Call
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.scheduler import Scheduler
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.registry import make_task
from tests.runtime import build
from tests.runtime.test_scheduler import ask
from tests.runtime.test_tiers import Gate, spoil

WIDE = {"hidden_size": 64, "intermediate_size": 128}
LONG = 400
SHORT = 20


@pytest.fixture
def base(tiny_base: Callable[..., Base]) -> Base:
    return tiny_base("llama", **WIDE)


@pytest.fixture
def store(base: Base) -> Store:
    """Two versions of `a`, of which `prod` is the first; one of b and of c."""
    made = Store()
    for seed, name in enumerate(["a", "a", "b", "c"], 1):
        build.stored(made, base, name, build.lora(base, seed))
    made.alias("a", "prod", 1)
    return made


@pytest.fixture
def runtime(base: Base, store: Store) -> Iterator[Runtime]:
    made = Runtime(base, store, slots=3, batch_size=2)
    yield made
    made.close()


PROMPT = [[5, 6, 7, 8]]


class Line:
    """A scheduler that is driven by hand; two places."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.scheduler = runtime, Scheduler(runtime._engine)

    def ask(self, *names: str | None, most: int = SHORT) -> Call:
        refs = self.runtime._engine.resolve_all(names)
        return ask(self.scheduler, self.runtime.base, PROMPT * len(refs), refs, most)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.scheduler.turn()

    def finish(self) -> None:
        while self.scheduler.busy:
            self.turn()

    def settle(self) -> None:
        """Wait until everything that was begun is read."""
        pool = self.runtime._engine.ahead._pool
        if pool is not None:
            pool.submit(lambda: None).result(20)


@pytest.fixture
def line(runtime: Runtime) -> Line:
    return Line(runtime)


def alone(base: Base, store: Store, name: str | None) -> str:
    runtime = Runtime(base, store)
    try:
        return runtime.generate_ids(PROMPT, [runtime._engine.resolve(name)], SHORT)[0]
    finally:
        runtime.close()


def system(says: str) -> Any:
    return make_task(
        {
            "type": "instruct",
            "system": says,
            "prompt": "text",
            "completion": "label",
            "max_new_tokens": 8,
            "metrics": ["exact_match"],
        }
    )


def test_the_same_weights_with_another_task_are_another_adapter(runtime: Runtime) -> None:
    adapter = build.lora(runtime.base, 9)
    first = runtime.attach(adapter, system("You are A."))
    said = runtime.answer("hi", first, max_new_tokens=SHORT)
    second = runtime.attach(adapter, system("You are B."))
    plain = runtime.attach(adapter)
    answers = [runtime.answer("hi", ref, max_new_tokens=SHORT) for ref in (first, second, plain)]
    assert answers[0] == said
    assert len({answer[0] for answer in answers}) == 3
    assert runtime.task(plain) is None
    assert runtime.attach(adapter, system("You are A.")) == first


# -- versions that go and aliases that move --------------------------------------------------------------------------


def test_an_alias_that_moves_changes_no_row_that_was_asked_before(line: Line, store: Store, base: Base) -> None:
    first, second = alone(base, store, "a@1"), alone(base, store, "a@2")
    running, blocking = line.ask("a:prod"), line.ask(None)
    waiting = line.ask("a:prod")
    line.turn()
    store.alias("a", "prod", 2)
    later = line.ask("a:prod")
    line.turn(3)
    assert not waiting.rows[0].entered
    line.finish()
    assert [call.texts()[0] for call in (running, waiting, later)] == [first, first, second]
    assert first != second
    assert blocking.texts() == [alone(base, store, None)]


def test_a_version_that_is_removed_serves_who_has_it(line: Line, store: Store, base: Base) -> None:
    expected = alone(base, store, "b")
    running = line.ask("b")
    line.turn(2)
    store.remove("b@1")
    line.finish()
    assert running.texts() == [expected]


def test_a_version_that_is_removed_serves_who_waits_if_it_was_read(line: Line, store: Store, base: Base) -> None:
    expected = alone(base, store, "b")
    blocking = line.ask(None, None)
    line.turn()
    waiting = line.ask("b", {"b": 0.5, "c": 0.5})
    line.settle()
    mixed = alone(base, store, {"b": 0.5, "c": 0.5})
    store.remove("b@1")
    line.finish()
    assert waiting.texts() == [expected, mixed]
    assert blocking.error is None
    assert len(line.runtime._engine.ahead) == 0


def test_a_version_that_is_removed_unread_fails_its_rows_alone(line: Line, store: Store, base: Base) -> None:
    expected = alone(base, store, "c")
    line.runtime._engine.slots.memory = 1  # no room to read ahead
    blocking = line.ask(None, None)
    line.turn()
    gone, good = line.ask("b"), line.ask("c")
    store.remove("b@1")
    line.runtime._engine.slots.memory = 10**9
    line.finish()
    with pytest.raises(NotFound):
        gone.texts()
    assert good.texts() == [expected]
    assert blocking.error is None


# -- adapters on their way in ----------------------------------------------------------------------------------------


def test_running_rows_get_tokens_while_an_adapter_is_on_its_way(
    runtime: Runtime, store: Store, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(runtime)
    expected = {name: alone(base, store, name) for name in ("b", None)}
    gate = Gate(monkeypatch)
    running = line.ask(None, most=LONG)
    line.turn()
    coming = line.ask("b")
    assert gate.reached.wait(20)
    line.turn(10)
    other = line.ask(None)  # overtakes the one that must wait
    line.turn(SHORT + 1)
    assert len(running.rows[0].tokens) == SHORT + 12
    assert other.texts() == [expected[None]]
    assert coming.rows[0].tokens == []
    gate.open.set()
    line.settle()
    line.turn(2)
    assert len(coming.rows[0].tokens) == 2
    line.finish()
    assert coming.texts() == [expected["b"]]
    assert gate.reads == ["b"], "what was read ahead is not read again"


def test_texts_go_on_beside_a_slow_store(
    runtime: Runtime, store: Store, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runtime.generate("abc", "b", max_new_tokens=SHORT)[0]
    runtime.unload("b")
    gate = Gate(monkeypatch)
    running = runtime.submit("the quick", raw=True, max_new_tokens=LONG)
    next(running)
    coming = runtime.submit("abc", "b", raw=True, max_new_tokens=SHORT)
    assert gate.reached.wait(20)
    if not running.done():
        assert running.result(20)
    assert not coming.done()
    gate.open.set()
    assert coming.result(20) == expected


def test_who_waits_last_waits_for_the_store(
    line: Line, store: Store, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to do meanwhile the row that is first in line waits for its adapter, and turns no wheel."""
    expected = [alone(base, store, name) for name in ("b", "c", "a@2")]
    gate = Gate(monkeypatch)
    blocking = line.ask(None, None, most=2)
    line.turn()
    coming = line.ask("b", "c", "a@2")
    while blocking.remaining:
        line.turn()
    assert not any(row.entered for row in coming.rows)
    threading.Timer(0.05, gate.open.set).start()
    line.turn()
    assert coming.rows[0].entered
    line.finish()
    assert coming.texts() == expected


def test_nothing_goes_out_for_what_is_read_ahead(base: Base, store: Store) -> None:
    size = (measuring := Runtime(base, store)).fitted("b").nbytes
    measuring.close()
    runtime = Runtime(base, store, slots=None, memory=int(2.5 * size), batch_size=2)
    line, engine = Line(runtime), runtime._engine
    runtime.pin("a@2")
    line.ask("b", "b", most=6)
    line.turn()
    waiting = line.ask("c")
    assert len(engine.ahead) == 0, "there is no room for it"
    assert runtime.resident() == ["a@2", "b@1"]
    line.finish()
    assert waiting.texts() == [alone(base, store, "c")]
    assert sorted(runtime.resident()) == ["a@2", "c@1"]
    runtime.close()


def test_what_nobody_waits_for_any_more_is_forgotten(line: Line) -> None:
    line.ask(None, None, most=LONG)
    line.turn()
    calls = [line.ask("b"), line.ask("b", "c")]
    line.settle()
    ahead = line.runtime._engine.ahead
    assert len(ahead) == 2
    assert ahead.nbytes > 0
    calls[0].cancel()
    line.turn()
    assert len(ahead) == 2
    calls[1].cancel()
    line.turn()
    assert len(ahead) == 0
    line.ask("b")
    line.runtime.close()
    assert len(ahead) == 0
    line.scheduler.refuse(NotFound("Over."))


def test_what_fails_while_it_is_read_ahead_fails_alone(line: Line, store: Store, base: Base) -> None:
    expected = alone(base, store, "c")
    spoil(store, "b")
    running = line.ask(None)
    line.turn()
    bad, good = line.ask("b"), line.ask("c")
    line.finish()
    with pytest.raises(StoreCorrupt):
        bad.texts()
    assert good.texts() == [expected]
    assert running.texts() == [alone(base, store, None)]


def test_a_conversation_ends_at_a_stop_string(runtime: Runtime) -> None:
    said = [{"role": "user", "content": "hi"}]
    whole = runtime.chat(said, max_new_tokens=40)
    stop = next(letter for letter in whole[3:] if letter.isalnum())
    assert runtime.chat(said, max_new_tokens=40, stop=stop) == whole.partition(stop)[0]
