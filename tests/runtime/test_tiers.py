"""Tiers: a budget that is kept, pins and leases that hold, adapters on their way in, and back from the host."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from adapterhub_lite.errors import AdapterHubError, AdapterMismatch, CapacityError, NotFound, StoreCorrupt, Unsupported
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.engine import Engine
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.tiers import HostTier, host_tier, image_of, parse_bytes, remade
from adapterhub_lite.store import Store
from tests.runtime import build

ROW = [[5, 6, 7, 8]]


@pytest.fixture
def base(tiny_base):
    made = tiny_base("llama")
    before = made.live_digest()
    yield made
    assert made.live_digest() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules()), "a hook was left"


@pytest.fixture
def make(base):
    """Runtimes on one store with LoRA adapters a, b, c, d of one size; closed in the end."""
    store = Store()
    for seed, name in enumerate("abcd", 1):
        build.stored(store, base, name, build.lora(base, seed))
    with ExitStack() as stack:

        def runtime(**changes: Any) -> Runtime:
            made = Runtime(base, store, **changes)
            stack.callback(made.close)
            return made

        yield runtime


@pytest.fixture
def size(make) -> int:
    runtime = make()
    return runtime.fitted("a").nbytes


def logits(runtime: Runtime, chosen: Any) -> torch.Tensor:
    return runtime.logits(ROW, chosen)[0]


def held(runtime: Runtime) -> int:
    """Bytes of all that is kept for adapters."""
    return runtime._engine.slots.used + runtime._engine.composer.nbytes


@contextmanager
def leased(runtime: Runtime, *names: str):
    """A running batch that uses these adapters; its plan."""
    with runtime._engine.plan([runtime._engine.resolve(name) for name in names]) as plan:
        yield plan


@pytest.mark.parametrize(
    ("text", "expected"),
    [(5, 5), ("7", 7), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("500mb", 5 * 10**8), (" 3k ", 3000), ("1TB", 10**12)],
)
def test_amounts_of_memory(text, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", [0, -1, True, 1.5, "", "GB", "2 XB", "-2GB", "1e9", "0", "two", [], "9" * 30, "٣GB"])
def test_what_is_no_amount_of_memory(base, text):
    for argument in ("memory", "host_memory"):
        with pytest.raises(Unsupported, match="amount of memory"):
            Runtime(base, Store(), **{argument: text})


def test_the_default_is_a_share_of_what_is_free(make, monkeypatch):
    monkeypatch.setattr("adapterhub_lite.runtime.tiers.available_bytes", lambda: 1000)
    assert make()._engine.slots.memory == 500
    assert make(memory=77)._engine.slots.memory == 77


def test_the_least_recently_used_makes_room(make, size):
    runtime = make(slots=None, memory=int(2.5 * size))
    for name in ("a", "b", "a", "c"):
        runtime.load(name)
        assert held(runtime) <= runtime._engine.slots.memory
    assert runtime.resident() == ["a@1", "c@1"]
    assert [(r.name, r.tier, r.bytes, r.pinned, r.leases) for r in runtime.residency()] == [
        ("a@1", "device", size, False, 0),
        ("c@1", "device", size, False, 0),
    ]


def test_what_is_pinned_or_in_use_stays_and_the_error_says_so(make, size):
    runtime = make(slots=None, memory=int(2.5 * size))
    expected = logits(runtime, "c")
    assert runtime.pin("a").name == "a"
    with leased(runtime, "b"):
        assert [(r.name, r.pinned, r.leases) for r in runtime.residency()] == [("a@1", True, 0), ("b@1", False, 1)]
        with pytest.raises(CapacityError) as caught:
            runtime.load("c")
        for part in ("c@1 needs", "pinned: a@1", "in use: b@1", "Raise memory, unpin one"):
            assert part in str(caught.value)
        assert runtime.resident() == ["a@1", "b@1"]
    assert torch.equal(logits(runtime, "c"), expected)
    assert runtime.resident() == ["a@1", "c@1"]
    with pytest.raises(CapacityError, match="a@1 is pinned"):
        runtime.unload("a")
    runtime.unpin("a")
    with pytest.raises(NotFound, match="not pinned"):
        runtime.unpin("a")
    runtime.load("c")
    runtime.load("d")
    assert runtime.resident() == ["c@1", "d@1"]


def test_capacity_errors_say_the_numbers(make):
    """Of the budget, what is pinned or in use is taken; what is idle could be put out, and counts as free."""
    runtime = make(slots=None, memory=60_000)
    adapters = {"a": build.lora(runtime.base, 1), "big": build.lora(runtime.base, 9, 12)}
    build.stored(runtime.store, runtime.base, "big", adapters["big"])
    small, big = (4 * sum(t.numel() for t in one.tensors.values()) for one in adapters.values())
    assert big < 60_000 < big + 2 * small, (small, big)
    runtime.pin("a")
    runtime.load("d")
    with leased(runtime, "b"), pytest.raises(CapacityError) as caught:
        runtime.load("big")
    assert str(caught.value).startswith(
        f"big@1 needs {big / 1e3:.1f} kB; of 60.0 kB for adapters {(60_000 - 2 * small) / 1e3:.1f} kB are free or can "
        "be made free (pinned: a@1; in use: b@1)."
    )
    with pytest.raises(CapacityError) as caught:
        make(memory=big - 1).load("big")
    assert str(caught.value).startswith(f"big@1 needs {big / 1e3:.1f} kB, more than all the ")
    with leased(runtime := make(slots=1), "b"), pytest.raises(CapacityError) as caught:
        runtime.load("c")
    assert str(caught.value).startswith("c@1 needs a slot, and all 1 slots are in use by what stays (in use: b@1).")


def test_a_pin_that_fails_pins_nothing(make, size):
    runtime = make(slots=2)
    runtime.pin("a")
    runtime.pin("b")
    with pytest.raises(CapacityError, match=r"2 slots.*pinned: a@1, b@1"):
        runtime.pin("c")
    with pytest.raises(NotFound):
        runtime.unpin("c")
    runtime.unpin("b")
    runtime.pin({"a": 0.5, "b": 0.5})
    runtime.unpin({"b": 0.5, "a": 0.5})


def test_more_than_the_whole_budget_is_refused_before_it_is_read(make, size, monkeypatch):
    runtime = make(memory=int(1.5 * size))
    build.stored(runtime.store, runtime.base, "big", build.lora(runtime.base, 9, 12))
    expected = logits(runtime, "a")
    monkeypatch.setattr(Store, "read_while", None)
    with pytest.raises(CapacityError, match=r"big@1 needs .* more than all the"):
        runtime.load("big")
    with pytest.raises(CapacityError, match=r"b@1 needs .*in use: a@1"), leased(runtime, "a"):
        runtime.load("b")
    assert runtime.resident() == ["a@1"]
    assert torch.equal(logits(runtime, "a"), expected)
    with pytest.raises(CapacityError, match="more than all"):
        runtime.attach(build.lora(runtime.base, 9, 12))


def test_stacks_of_matrices_count_and_give_way(make, size):
    roomy, tight, snug = make(), make(memory=int(2.4 * size)), make(memory=int(4.4 * size))

    def stacked(runtime: Runtime, *names: str) -> int:
        with leased(runtime, *names) as plan:
            assert plan.groups
            assert held(runtime) <= runtime._engine.slots.memory
        return runtime._engine.composer.nbytes

    assert stacked(roomy, "a", "b") >= 2 * size, "a stack holds the matrices once more"
    assert stacked(roomy, "a", "c") >= 4 * size
    roomy.unload("a")
    assert roomy._engine.composer.nbytes == 0, "no stack outlives an adapter in it"
    assert [stacked(tight, *pair) for pair in ("ab", "ac", "ab")] == [0, 0, 0]
    assert stacked(snug, "a", "b") >= 2 * size
    snug.load("c")
    assert held(snug) <= snug._engine.slots.memory
    assert snug.resident() == ["a@1", "b@1", "c@1"], "a stack goes before an adapter does"


def test_batches_are_cut_to_what_the_memory_holds(make, size):
    roomy, tight = make(), make(slots=None, memory=int(2.2 * size))
    chosen = ["a", "b", "c", "d", None, {"a": 0.5, "b": 0.5}] * 2
    expected = roomy.generate_ids(ROW * len(chosen), chosen, 4)
    assert tight.generate_ids(ROW * len(chosen), chosen, 4) == expected
    assert held(tight) <= tight._engine.slots.memory
    refs = [tight._engine.resolve(name) for name in "abc"]
    assert tight._engine.can_hold(refs[:2])
    assert not tight._engine.can_hold(refs)
    with leased(tight, "d"):
        assert tight._engine.can_hold(refs[:2])
        assert not tight._engine.can_hold(refs[:2], beside_leases=True)


# -- on the way in -------------------------------------------------------------------------------------------------


class Gate:
    """A store whose reads wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached, self.reads = threading.Event(), threading.Event(), []
        read = Store.read_while

        def gated(store: Store, ref: Any, work: Any) -> Any:
            self.reads.append(ref.name)
            self.reached.set()
            assert self.open.wait(20)
            return read(store, ref, work)

        monkeypatch.setattr(Store, "read_while", gated)


def settle(runtime: Runtime) -> None:
    """Wait until nothing is on its way in."""
    pool = runtime._engine._prefetch._pool
    if pool is not None:
        pool.submit(lambda: None).result(20)


def test_prefetch_returns_at_once_and_load_waits_for_it(make, monkeypatch):
    runtime, expected = make(), logits(make(), "a")
    gate = Gate(monkeypatch)
    runtime.prefetch(["a", "b", "a@1"])
    assert gate.reached.wait(20)
    assert runtime.resident() == []
    threading.Timer(0.05, gate.open.set).start()
    assert torch.equal(logits(runtime, "a"), expected)
    settle(runtime)
    assert sorted(runtime.resident()) == ["a@1", "b@1"]
    assert gate.reads == ["a", "b"], "what is on its way in is not read again"


def test_prefetch_goes_on_beside_a_running_batch(make, monkeypatch):
    runtime = make()
    gate = Gate(monkeypatch)
    admitted = threading.Event()
    install = Engine._install
    monkeypatch.setattr(Engine, "_install", lambda *given: (admitted.set(), install(*given)))
    with runtime.base.lock:
        runtime.prefetch("a")
        gate.open.set()
        assert admitted.wait(20), "reading and fitting wait for no batch"
        assert runtime.resident() == []
        runtime.load("a")  # in the thread that has the lock, while the other one wants it
        assert runtime.resident() == ["a@1"]
    settle(runtime)
    assert gate.reads == ["a"]


@pytest.mark.parametrize("end", ["unload", "close"])
def test_what_comes_in_too_late_stays_out(base, make, monkeypatch, end: str):
    runtime = make()
    gate = Gate(monkeypatch)
    admitted = threading.Event()
    install = Engine._install
    if end == "close":
        monkeypatch.setattr(Engine, "_install", lambda *given: (admitted.set(), install(*given)))
    with runtime.base.lock:
        runtime.prefetch("a")
        assert gate.reached.wait(20)
        if end == "unload":
            threading.Timer(0.05, gate.open.set).start()
            runtime.load("a")
            runtime.unload("a")
            pool = runtime._engine._prefetch._pool
        else:
            gate.open.set()
            assert admitted.wait(20)
            pool = runtime._engine._prefetch._pool
            runtime.close()
    pool.shutdown(wait=True)
    assert runtime.resident() == []
    if end == "close":
        assert not any(m._forward_hooks for m in base.model.modules())


def test_what_waits_in_line_is_brought_in_by_who_needs_it(make, monkeypatch):
    runtime = make()
    gate = Gate(monkeypatch)
    runtime.prefetch(["a", "b"])
    assert gate.reached.wait(20)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (runtime.load("b"), done.set()))
    thread.start()
    gate.open.set()
    assert done.wait(20)
    thread.join()
    settle(runtime)
    assert gate.reads.count("b") == 1


def test_what_fails_on_its_way_in_is_raised_where_it_is_used(make):
    runtime = make()
    expected = logits(runtime, "b")
    spoil(runtime.store, "a")
    runtime.prefetch(["a", "c"])
    settle(runtime)
    assert runtime.resident() == ["b@1", "c@1"]
    for _ in range(2):
        with pytest.raises(StoreCorrupt):
            logits(runtime, "a")
    assert torch.equal(logits(runtime, "b"), expected)
    with pytest.raises(NotFound):
        runtime.prefetch(["b", "missing"])


def test_who_waits_for_what_fails_is_told(make, monkeypatch):
    runtime = make()
    spoil(runtime.store, "a")
    gate = Gate(monkeypatch)
    runtime.prefetch("a")
    assert gate.reached.wait(20)
    threading.Timer(0.05, gate.open.set).start()
    with pytest.raises(StoreCorrupt):
        runtime.load("a")
    assert gate.reads == ["a"]
    settle(runtime)
    assert runtime.resident() == []


def test_mixes_prompts_and_what_cannot_fit_on_their_way_in(make, size):
    runtime = make(memory=int(3.5 * size))
    mix = {"a": 0.5, "b": 0.5}
    prompt = runtime.attach(build.prompt(runtime.base, 5))
    expected = logits(runtime, prompt)
    runtime.prefetch([mix])
    settle(runtime)
    assert "0.5*a@1 + 0.5*b@1" in runtime.resident()
    runtime.pin(mix)
    runtime.prefetch(["c", "d"])
    settle(runtime)
    assert "0.5*a@1 + 0.5*b@1" in runtime.resident()
    assert held(runtime) <= runtime._engine.slots.memory
    if str(prompt) in runtime.resident():
        assert torch.equal(logits(runtime, prompt), expected)


def test_a_runtime_that_ends_while_something_comes_in_leaves_no_hook(base, make, monkeypatch):
    closed, dropped = make(), make()
    gate = Gate(monkeypatch)
    closed.prefetch(["a", "b"])
    assert gate.reached.wait(20)
    pool = closed._engine._prefetch._pool
    closed.close()
    gate.open.set()
    pool.shutdown(wait=True)
    assert closed.resident() == []
    with pytest.raises(Unsupported, match="closed"):
        closed.prefetch("a")
    assert not any(m._forward_hooks for m in base.model.modules())
    dropped.close()


# -- a device of its own -------------------------------------------------------------------------------------------


class FakeDevice:
    """Copies that arrive only when they are waited for."""

    def __init__(self) -> None:
        self.copies = self.waits = 0

    def start(self, flat: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        arriving = torch.zeros_like(flat)
        self.copies += 1

        def wait() -> None:
            self.waits += 1
            arriving.copy_(flat)

        return arriving, wait


def with_host(runtime: Runtime, memory: int = 10**9) -> FakeDevice:
    device = FakeDevice()
    runtime._engine.host = HostTier(memory, device, pin=False)
    return device


KINDS = {
    "lora": lambda base: build.lora(base, 1),
    "dora": lambda base: build.lora(base, 2, 3, dora=True),
    "ia3": lambda base: build.ia3(base, 3),
    "prefix": lambda base: build.prefix(base, 4),
    "prompt": lambda base: build.prompt(base, 5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_an_adapter_comes_back_from_the_host_bit_for_bit(tiny_base, family: str, kind: str):
    base = tiny_base(family)
    runtime = Runtime(base, Store(), slots=1)
    device = with_host(runtime)
    answers = [[7, 8]] if family == "t5" else None
    ref, other = runtime.attach(KINDS[kind](base)), runtime.attach(build.lora(base, 9))
    for expected in [None, runtime.logits(ROW, ref, answers)[0]]:
        runtime.load(other)
        assert [(r.name, r.tier) for r in runtime.residency()] == [(str(ref), "host"), (str(other), "device")]
        found = runtime.logits(ROW, ref, answers)[0]
        assert expected is None or torch.equal(found, expected)
    fresh = Runtime(base, Store(), slots=1)
    assert torch.equal(fresh.logits(ROW, fresh.attach(KINDS[kind](base)), answers)[0], found)
    assert device.copies == device.waits > 0
    fresh.close()
    runtime.close()


def test_the_host_spares_the_disk_until_its_own_budget_ends(make, size, monkeypatch):
    runtime = make(slots=1)
    device = with_host(runtime, int(2.9 * size))
    expected = {name: logits(runtime, name) for name in "abc"}
    host = runtime._engine.host
    assert host.used <= host.memory
    assert [image.fitted.name for image in host.resident()] == ["b@1", "c@1"]
    reads: list[str] = []
    read = Store.read_while
    monkeypatch.setattr(
        Store, "read_while", lambda store, ref, work: (reads.append(ref.name), read(store, ref, work))[1]
    )
    for name in "bcbab":
        assert torch.equal(logits(runtime, name), expected[name])
        assert host.used <= host.memory
    assert reads == ["a"]
    assert device.waits == device.copies == 4
    host.memory *= 10
    mix = {"a": 0.5, "b": 0.5}
    first = logits(runtime, mix)
    logits(runtime, "b")
    copies = device.copies
    assert torch.equal(logits(runtime, mix), first)
    assert device.copies == copies + 1
    runtime.unload(mix)
    with pytest.raises(NotFound):
        runtime.unload(mix)
    assert "0.5*a@1 + 0.5*b@1" not in [r.name for r in runtime.residency()]


def test_an_adapter_that_the_host_cannot_hold_is_served_all_the_same(make, size):
    runtime = make(slots=1)
    with_host(runtime, size // 2)
    expected = {name: logits(runtime, name) for name in "ab"}
    assert runtime._engine.host.used == 0
    assert all(torch.equal(logits(runtime, name), expected[name]) for name in "aba")


def test_what_is_promoted_has_room_first(make, size):
    runtime = make(slots=1)
    device = with_host(runtime)
    runtime.load("a")
    runtime.pin("b")
    with pytest.raises(CapacityError, match="pinned: b@1"):
        runtime.load("a")
    assert device.copies == 0


def test_an_image_is_one_aligned_buffer(base, make):
    runtime = make()
    fitted = runtime.fitted(runtime.attach(build.lora(base, 9, 3, dora=True)))
    image = image_of(fitted, pin=False)
    tensors: list[torch.Tensor] = []
    remade(image.fitted, lambda t: (tensors.append(t), t)[1])
    assert len(tensors) == len(image.spans) == len(set(image.spans))
    assert all(offset % 256 == 0 for offset in image.spans)
    assert {t.untyped_storage().data_ptr() for t in tensors} == {image.flat.untyped_storage().data_ptr()}
    assert fitted.nbytes == image.fitted.nbytes <= image.nbytes
    assert all(torch.equal(fitted.sites[m].down, s.down) for m, s in image.fitted.sites.items())
    assert host_tier("1GB", torch.device("cpu")) is None


# -- for long ------------------------------------------------------------------------------------------------------


def tensors_alive() -> int:
    gc.collect()
    return sum(1 for found in gc.get_objects() if issubclass(type(found), torch.Tensor))


def test_a_thousand_rounds_leave_nothing_behind(make):
    runtime = make(slots=2)
    counts = []
    for i in range(1000):
        name = "abcd"[i % 4]
        runtime.load(name)
        if i % 3 == 0:
            runtime.unload(name)
        if i % 50 == 0:
            runtime.logits(ROW * 2, [name, {"a": 0.5, "b": 1 + i}])
        if i % 250 == 249:
            for one in runtime._engine.slots.resident():
                runtime.unload(Ref(one.name, digest=one.digest))
            counts.append(tensors_alive())
    assert len(set(counts[1:])) == 1, counts
    assert held(runtime) == 0


def megabytes() -> float:
    """What this process has in memory now, with nothing left in the pools of Python and of C's malloc."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_thousand_adapters_that_came_and_went_leave_no_trace(base):
    """Attached ones, each of a digest of its own, and mixes of weights that are never the same."""
    runtime, rounds = Runtime(base, Store(), slots=3), []
    kept = runtime.attach(build.lora(base, 1))
    engine, adapter = runtime._engine, build.lora(base, 2)
    tensor = next(iter(adapter.tensors.values()))
    for i in range(1000):
        tensor[0, 0] = i / 1000
        ref = runtime.attach(adapter)
        if i % 20 == 0:
            runtime.logits(ROW * 2, [ref, {kept: 0.5, ref: 1 + i}])
        if i % 2:
            runtime.unload(ref)
        runtime.logits(ROW, kept)
        if i % 250 == 249:
            sizes = {name: len(value) for name, value in vars(engine).items() if isinstance(value, dict | set)}
            rounds.append((megabytes(), sizes))
    runtime.close()
    assert max(rounds[-1][1].values()) <= 3, rounds
    assert rounds[-1][0] - rounds[0][0] < 5, rounds  # one adapter kept of each round would be 12


def spoil(store: Store, name: str) -> None:
    """Flip a bit of a stored adapter's weights."""
    path = store.folder(name) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    path.write_bytes(data)


NAMES = ("a", "lora", "foo", "foobar", "s1", "s10")
NAME = st.sampled_from(NAMES)
LOW_RANK = st.sampled_from([name for name in NAMES if name != "foo"])  # which is a prefix
WEIGHT = st.sampled_from([0.25, -0.5, 1.0, 2.0])


class Residing(RuleBasedStateMachine):
    """Any order of loads, pins, leases, mixes and failures keeps the budget, the promises and every answer."""

    make: Callable[[], tuple[Runtime, dict[Any, torch.Tensor]]]

    @initialize()
    def begin(self) -> None:
        self.runtime, self.solo = type(self).make()
        self.engine = self.runtime._engine
        self.pinned: set[str] = set()
        self.batches: list[tuple[list[str], ExitStack]] = []
        self.attached = 0

    def teardown(self) -> None:
        for _, batch in getattr(self, "batches", []):
            batch.close()
        if hasattr(self, "runtime"):
            settle(self.runtime)
            self.runtime.close()

    def room_for(self, names: set[str]) -> bool:
        stay = names | self.pinned | {name for batch, _ in self.batches for name in batch}
        sizes = [self.engine.size(self.engine.resolve(name)) for name in stay]
        return len(stay) <= self.engine.slots.capacity and sum(sizes) <= self.engine.slots.memory

    def attempt(self, names: set[str], act: Callable[[], Any]) -> Any:
        """What must work where there is room, and else says that there is none."""
        if self.room_for(names):
            return act()
        with pytest.raises(CapacityError):
            act()
        return None

    @rule(name=NAME)
    def load(self, name: str) -> None:
        if self.attempt({name}, lambda: self.runtime.load(name)) is not None:
            assert f"{name}@1" in self.runtime.resident()

    @rule(names=st.lists(NAME, max_size=3))
    def prefetch(self, names: list[str]) -> None:
        self.runtime.prefetch(names)

    @rule(name=NAME)
    def pin(self, name: str) -> None:
        if self.attempt({name}, lambda: self.runtime.pin(name)) is not None:
            self.pinned.add(name)

    @rule(name=NAME)
    def unpin(self, name: str) -> None:
        if name in self.pinned:
            self.runtime.unpin(name)
            self.pinned.discard(name)
        else:
            with pytest.raises(NotFound):
                self.runtime.unpin(name)

    @rule(name=NAME)
    def unload(self, name: str) -> None:
        settle(self.runtime)
        if name in self.pinned or any(name in names for names, _ in self.batches):
            with pytest.raises(CapacityError):
                self.runtime.unload(name)
        elif f"{name}@1" in {r.name for r in self.runtime.residency()}:
            self.runtime.unload(name)
            assert f"{name}@1" not in {r.name for r in self.runtime.residency()}
        else:
            with pytest.raises(NotFound):
                self.runtime.unload(name)

    @rule(names=st.lists(NAME, min_size=1, max_size=3))
    def begin_batch(self, names: list[str]) -> None:
        settle(self.runtime)

        def start() -> ExitStack:
            with ExitStack() as stack:
                stack.enter_context(leased(self.runtime, *names))
                return stack.pop_all()

        batch = self.attempt(set(names), start)
        if batch is not None:
            self.batches.append((names, batch))

    @rule()
    def end_batch(self) -> None:
        if self.batches:
            self.batches.pop(0)[1].close()

    @rule(chosen=st.lists(st.none() | NAME, min_size=1, max_size=4))
    def answer(self, chosen: list[str | None]) -> None:
        settle(self.runtime)
        found = self.attempt({n for n in chosen if n}, lambda: self.runtime.logits(ROW * len(chosen), chosen))
        for name, one in zip(chosen, found or [], strict=False):
            torch.testing.assert_close(one, self.solo[name], rtol=1e-4, atol=1e-4)
            if len(set(chosen)) == 1:
                assert torch.equal(self.runtime.logits(ROW, name)[0], self.solo[name])

    @rule(one=LOW_RANK, other=LOW_RANK, weights=st.tuples(WEIGHT, WEIGHT))
    def mix(self, one: str, other: str, weights: tuple[float, float]) -> None:
        settle(self.runtime)
        before = self.runtime.resident()
        try:
            found = self.runtime.logits(ROW, dict(zip((one, other), weights, strict=True)))[0]
        except CapacityError:
            assert set(before) <= set(self.runtime.resident())
        else:
            alone = Runtime(self.runtime.base, self.runtime.store, slots=None)
            expected = alone.logits(ROW, dict(zip((one, other), weights, strict=True)))[0]
            assert torch.equal(found, expected)
            alone.close()

    @rule(nan=st.booleans(), rank=st.sampled_from([2, 64]))
    def attach(self, nan: bool, rank: int) -> None:
        settle(self.runtime)
        adapter, before = build.lora(self.runtime.base, 20, rank), self.runtime.resident()
        if nan:
            next(iter(adapter.tensors.values()))[0, 0] = float("nan")
        if nan or rank == 64:
            with pytest.raises(AdapterMismatch if nan else CapacityError):
                self.runtime.attach(adapter)
            assert self.runtime.resident() == before
        else:
            try:
                self.runtime.attach(adapter)
            except CapacityError:
                assert self.runtime.resident() == before

    @rule(name=st.sampled_from(["corrupt", "big", "missing"]))
    def fail(self, name: str) -> None:
        settle(self.runtime)
        before = self.runtime.resident()
        with pytest.raises(AdapterHubError) as caught:
            self.runtime.load(name)
        kinds = {"corrupt": (StoreCorrupt, CapacityError), "big": CapacityError, "missing": NotFound}
        assert isinstance(caught.value, kinds[name])
        assert self.runtime.resident() == before
        for resident in before:
            if resident.removesuffix("@1") in NAMES:
                assert torch.equal(self.runtime.logits(ROW, resident)[0], self.solo[resident.removesuffix("@1")])

    @invariant()
    def promises_are_kept(self) -> None:
        if not hasattr(self, "runtime"):
            return
        with self.runtime.base.lock:
            slots, resident = self.engine.slots, self.runtime.resident()
            assert held(self.runtime) <= slots.memory
            assert slots.used == sum(fitted.nbytes for fitted in slots.resident())
            assert len(slots) <= slots.capacity
            assert self.engine.host is None or self.engine.host.used <= self.engine.host.memory
            assert len(set(resident)) == len(resident), "one version is resident twice"
            stay = self.pinned | {name for names, _ in self.batches for name in names}
            assert {f"{name}@1" for name in stay} <= set(resident)
            assert {r.name for r in self.runtime.residency() if r.pinned} == {f"{n}@1" for n in self.pinned}


@pytest.mark.parametrize("host", [False, True], ids=["one memory", "host and device"])
def test_any_order_of_loads_pins_leases_and_failures(base, host: bool):
    store = Store()
    kinds = [
        build.lora(base, 1),
        build.lora(base, 2, 3, dora=True),
        build.prefix(base, 3),
        *(build.lora(base, seed, rank) for seed, rank in ((4, 2), (5, 4), (6, 6))),
    ]
    for name, adapter in zip(NAMES, kinds, strict=True):
        build.stored(store, base, name, adapter)
    build.stored(store, base, "big", build.lora(base, 7, 64))
    build.stored(store, base, "corrupt", build.lora(base, 8, 1))
    spoil(store, "corrupt")
    alone = Runtime(base, store, slots=None)
    solo = {name: logits(alone, name) for name in (None, *NAMES)}
    sizes = sorted(alone.fitted(name).nbytes for name in NAMES)
    alone.close()

    class Machine(Residing):
        @staticmethod
        def make() -> tuple[Runtime, dict[Any, torch.Tensor]]:
            made = Runtime(base, store, slots=4, memory=sum(sizes[-3:]))
            if host:
                with_host(made, 3 * sizes[-1])
            return made, solo

    checks = settings(
        max_examples=25,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # to shrink a failure takes minutes
    )
    run_state_machine_as_test(Machine, settings=checks)
