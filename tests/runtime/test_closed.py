"""What a closed runtime refuses and lets go, and what was unloaded on its way in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import NotFound, Unsupported
from adapterhub_lite.runtime.engine import Engine
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.classify import Classify
from tests.runtime import build
from tests.runtime.test_tiers import Gate, settle, with_host

ROW = [[5, 6, 7, 8]]
CONFIG = {"type": "classify", "text": "text", "label": "label", "labels": ["no", "yes"]}
INSTRUCT = {
    "type": "instruct",
    "prompt": "text",
    "completion": "label",
    "max_new_tokens": 8,
    "metrics": ["exact_match"],
}


@pytest.fixture
def base(tiny_base: Callable[..., Base]) -> Base:
    return tiny_base("llama")


@pytest.fixture
def store(base: Base) -> Store:
    made = Store()
    for seed, name in enumerate("abcd", 1):
        build.stored(made, base, name, build.lora(base, seed), INSTRUCT)
    return made


@pytest.fixture
def runtime(base: Base, store: Store) -> Iterator[Runtime]:
    made = Runtime(base, store)
    yield made
    made.close()


CALLS: dict[str, Callable[[Runtime], Any]] = {
    "load": lambda r: r.load("a"),
    "prefetch": lambda r: r.prefetch("a"),
    "pin": lambda r: r.pin("a"),
    "unpin": lambda r: r.unpin("a"),
    "fitted": lambda r: r.fitted("a"),
    "unload": lambda r: r.unload("a"),
    "use": lambda r: r.use("a"),
    "use none": lambda r: r.use(None),
    "using": lambda r: r.using("a").__enter__(),
    "attach": lambda r: r.attach(build.lora(r.base, 9)),
    "task": lambda r: r.task("a"),
    "generate": lambda r: r.generate("abc", "a"),
    "generate none": lambda r: r.generate([], None),
    "answer": lambda r: r.answer("abc"),
    "chat": lambda r: r.chat([{"role": "user", "content": "Hi."}]),
    "stream": lambda r: next(r.stream("abc")),
    "submit": lambda r: r.submit("abc", "a"),
    "generate_ids": lambda r: r.generate_ids(ROW, "a", 3),
    "logits": lambda r: r.logits(ROW, "a"),
    "predict": lambda r: r.predict("abc", "a"),
    "tag": lambda r: r.tag("abc", "a"),
    "label": lambda r: r.label("abc", "a"),
    "score_words": lambda r: r.score_words(["abc"], Classify(CONFIG)),
    "embed": lambda r: r.embed("abc", "a"),
}
SAY_WHAT_IS = {"close", "resident", "residency", "base", "store", "batch_size", "default"}


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_runtime_refuses(runtime: Runtime, call: str) -> None:
    runtime.use("a")
    runtime.close()
    with pytest.raises(Unsupported, match="closed"):
        CALLS[call](runtime)
    assert runtime.resident() == []
    assert not any(module._forward_hooks for module in runtime.base.model.modules())


def test_every_public_call_is_among_them() -> None:
    public = {name for name in dir(Runtime) if not name.startswith("_")}
    assert public - SAY_WHAT_IS == {name.partition(" ")[0] for name in CALLS}


def test_a_closed_runtime_keeps_no_adapter(runtime: Runtime) -> None:
    device = with_host(runtime)
    for name in "abc":
        runtime.load(name)
    runtime.pin("b")
    assert runtime.task("a") is not None
    assert runtime.task("d") is not None, "one that is not resident"
    engine = runtime._engine
    assert len(runtime.residency()) == len(engine.host.resident()) == 3
    assert device.copies == 0
    runtime.close()
    assert runtime.residency() == []
    assert engine.host.used == engine.slots.used == engine.composer.nbytes == len(engine.tasks) == 0


def test_what_left_the_host_too_is_forgotten(base: Base, store: Store) -> None:
    """Its task, and whether PEFT runs it; what is still in one of the two is not."""
    runtime = Runtime(base, store, slots=1)
    size = runtime.fitted("a").nbytes
    with_host(runtime, int(2.5 * size))
    engine = runtime._engine
    for name in "abcd":
        runtime.load(name)
        runtime.task(name)
    here = {engine.named(name)[1] for name in "cd"}
    assert {image.fitted.digest for image in engine.host.resident()} == here
    assert set(engine.tasks) == set(engine._alone) == here
    runtime.close()


# -- unloaded on the way in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loads", [True, False], ids=["loaded and unloaded", "unloaded"])
def test_what_is_unloaded_while_its_prefetch_waits_for_the_base_stays_out(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    waits = threading.Event()
    install = Engine._install
    monkeypatch.setattr(Engine, "_install", lambda *given: (waits.set(), install(*given)))
    with runtime.base.lock:
        runtime.prefetch("a")
        assert waits.wait(20)
        if loads:
            runtime.load("a")
        runtime.unload("a")
        with pytest.raises(NotFound):
            runtime.unload("a")
    settle(runtime)
    assert runtime.resident() == []
    runtime.prefetch("a")
    settle(runtime)
    assert runtime.resident() == ["a@1"]


def test_what_is_unloaded_while_it_is_read_stays_out(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    runtime.prefetch(["a", "b"])
    assert gate.reached.wait(20)
    runtime.unload("a")  # is being read
    runtime.unload("b")  # waits for that
    gate.open.set()
    settle(runtime)
    assert runtime.resident() == []
    assert gate.reads == ["a"]
