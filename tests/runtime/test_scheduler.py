"""Continuous batching: whoever comes and goes, a row writes what it writes alone; and nobody else pays for an error."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import (
    AdapterHubError,
    AdapterMismatch,
    CapacityError,
    NoEffect,
    NotFound,
    StoreCorrupt,
    Unsupported,
)
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.requests import Call, requests
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.sampling import Sampling
from adapterhub_lite.runtime.scheduler import Scheduler
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.test_tiers import spoil

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # heads 16 wide, so that native steps apply
LONG = 400


@pytest.fixture
def base(tiny_base: Callable[..., Base]) -> Base:
    return tiny_base("llama", **WIDE)


@pytest.fixture
def runtime(base: Base) -> Iterator[Runtime]:
    made = Runtime(base, Store(), batch_size=6)
    yield made
    made.close()


def kinds(runtime: Runtime) -> list[Ref | None]:
    """No adapter, LoRA of two ranks, DoRA, IA3 (which scales inputs and outputs) and two lengths of prefix."""
    base = runtime.base
    made = [build.lora(base, 1), build.lora(base, 2, 7), build.lora(base, 3, dora=True), build.ia3(base, 4)]
    made += [build.prefix(base, 5), build.prefix(base, 6, 8)]
    return [None, *(runtime.attach(adapter) for adapter in made)]


def prompts(count: int, seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(3, 250) for _ in range(dice.randint(1, 24))] for _ in range(count)]


def together(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


# -- every row is its solo run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_many_threads_are_their_solo_runs(tiny_base: Callable[..., Base], family: str, sampled: bool) -> None:
    base = tiny_base(family, **(WIDE if family == "llama" else {}))
    runtime = Runtime(base, Store(), batch_size=7)
    refs = kinds(runtime)
    dice = random.Random(7)
    jobs = []
    for i, prompt in enumerate(prompts(40, 1)):
        how = Sampling(temperature=1.0, top_p=0.95, seed=i) if sampled else None
        jobs.append((prompt, refs[i % len(refs)], dice.randint(1, 20), how, dice.random() < 0.25))
    solo = [runtime.generate_ids([p], [r], n, sampling=[how])[0] for p, r, n, how, _ in jobs]
    assert len(set(solo)) > 30
    wrong: list[Any] = []

    def work(first: int) -> None:
        own = random.Random(first)
        for i in range(first, len(jobs), 8):
            time.sleep(own.random() * 0.01)
            prompt, ref, most, how, leaves = jobs[i]
            if leaves:
                answer = runtime._ask([prompt], [ref], most, (), [how], streams=True)
                time.sleep(own.random() * 0.01)
                answer.cancel()
                answer.wait(lambda call=answer: call.remaining == 0)
                if not solo[i].startswith(answer.rows[0].text.rstrip("\ufffd")):
                    wrong.append((i, answer.rows[0].text))
            elif (found := runtime.generate_ids([prompt], [ref], most, sampling=[how])[0]) != solo[i]:
                wrong.append((i, found))

    together([threading.Thread(target=work, args=(i,)) for i in range(8)])
    assert wrong == []
    with runtime._lock:
        assert not runtime._engine.slots._leases
    runtime.close()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_list_longer_than_the_batch_is_written_in_order(base: Base, batch_size: int) -> None:
    runtime = Runtime(base, Store(), batch_size=batch_size)
    refs = kinds(runtime)
    some = prompts(17, 3)
    chosen = [refs[i % len(refs)] for i in range(len(some))]
    most = [1 + 3 * i % 11 for i in range(len(some))]
    found = runtime.generate_ids(some, chosen, most)
    assert found == [runtime.generate_ids([p], [r], n)[0] for p, r, n in zip(some, chosen, most, strict=True)]
    runtime.close()


def test_more_adapters_than_slots_wait_for_each_other(base: Base) -> None:
    store = Store()
    names = [build.stored(store, base, f"a{i}", build.lora(base, i)) for i in range(5)]
    runtime = Runtime(base, store, slots=2)
    some = prompts(15, 4)
    chosen = [names[i % 5] for i in range(15)]
    expected = [runtime.generate_ids([p], [r], 6)[0] for p, r in zip(some, chosen, strict=True)]
    assert runtime.generate_ids(some, chosen, 6) == expected
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = runtime.generate_ids([some[i]], [chosen[i]], 6)[0]

    together([threading.Thread(target=work, args=(i,)) for i in range(15)])
    assert [found[i] for i in range(15)] == expected
    runtime.close()


# -- who is in the batch --------------------------------------------------------------------------------------------


def ask(scheduler: Scheduler, base: Base, some: list[list[int]], refs: list[Any], most: Any, **changes: Any) -> Call:
    call = Call(changes.pop("streams", False))
    call.add(requests(call, base, some, refs, most, changes.get("stop", ()), changes.get("sampling")))
    scheduler.read_ahead(call)
    scheduler.submit(call)
    return call


def test_newcomers_enter_a_running_batch_and_who_is_done_leaves_it(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime._engine)
    first = ask(scheduler, runtime.base, prompts(4, 1), [None] * 4, [2, 9, 9, 9])
    scheduler.turn()
    assert len(scheduler.running) == 4
    second = ask(scheduler, runtime.base, prompts(4, 2), [None] * 4, 9)
    scheduler.turn()
    assert first.rows[0].done
    assert len(scheduler._batches) == 1
    assert [len(row.tokens) for row in first.rows] == [2, 2, 2, 2]
    assert sorted(len(row.tokens) for row in second.rows) == [0, 0, 1, 1]
    scheduler.turn()
    assert len(scheduler.running) == 6
    assert sorted(len(row.tokens) for row in second.rows) == [0, 1, 2, 2]
    second.rows[0].cancelled = True
    while scheduler.busy:
        scheduler.turn()
    assert isinstance(second.error, CancelledError)
    assert first.texts() == runtime.generate_ids(prompts(4, 1), None, [2, 9, 9, 9])


def test_streams_of_several_threads_share_their_steps(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as the longest has tokens, not as all have: they wait together until the base is free."""
    from adapterhub_lite.runtime.decoder import Decoder

    steps = []
    step = Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, tokens, *rest: (steps.append(len(tokens)), step(self, tokens, *rest))[1]
    )
    with runtime.base.lock:
        answers = []
        asking = threading.Thread(
            target=lambda: answers.extend(runtime.submit(f"text {i}", raw=True, max_new_tokens=20) for i in range(5))
        )
        asking.start()
        while len(answers) < 5:
            time.sleep(0.001)
    assert len({"".join(answer) for answer in answers}) == 5
    assert max(steps) == 5
    assert len(steps) <= 20


def test_a_long_list_does_not_hold_up_another_callers_prompt(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime._engine)
    long = ask(scheduler, runtime.base, prompts(100, 1), [None] * 100, 8)
    scheduler.turn()
    other = ask(scheduler, runtime.base, [[5, 6, 7]], [None], 3)
    for _ in range(12):
        scheduler.turn()
    assert other.remaining == 0
    assert long.remaining > 80
    scheduler.refuse(NotFound("Over."))


def test_a_short_prompt_does_not_wait_for_a_long_answer(runtime: Runtime) -> None:
    long = runtime.submit("the quick", raw=True, max_new_tokens=LONG)
    next(long)
    assert runtime.generate("a", max_new_tokens=2)
    assert not long.done()
    assert long.cancel()


# -- errors are one's own -------------------------------------------------------------------------------------------


def test_what_does_not_fit_fails_alone(runtime: Runtime) -> None:
    good = runtime.submit("the quick", raw=True, max_new_tokens=60)
    expected = runtime.generate("the quick", max_new_tokens=60)[0]
    missing = Ref("gone", version=3, digest="0" * 64)
    for wrong, kind in (
        (lambda: runtime.generate_ids([[5] * 510], None, 8), CapacityError),
        (lambda: runtime.generate_ids([[5], []], None, 8), Unsupported),
        (lambda: runtime.generate_ids([[5], [5]], [None, missing], 8), AdapterHubError),
    ):
        with pytest.raises(kind) as failed:
            wrong()
        assert any("scheduler.py" in str(entry.path) or "requests.py" in str(entry.path) for entry in failed.traceback)
    assert good.result(60) == expected


def test_rows_that_are_read_together_fail_apart(runtime: Runtime) -> None:
    """A token that the base does not have breaks the reading of all prompts at once; the others are read again."""
    scheduler = Scheduler(runtime._engine)
    good = ask(scheduler, runtime.base, prompts(3, 5), [None] * 3, 6)
    bad = ask(scheduler, runtime.base, [[5, 10**6]], [None], 6)
    while scheduler.busy:
        scheduler.turn()
    assert good.texts() == runtime.generate_ids(prompts(3, 5), None, 6)
    with pytest.raises(IndexError):
        bad.texts()


def test_a_step_that_fails_is_taken_again_by_each_row_alone(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub_lite.runtime.decoder import Decoder

    some = prompts(4, 6)
    expected = runtime.generate_ids(some, None, 12)
    step, calls = Decoder.step, []

    def failing(self: Decoder, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 4:
            raise MemoryError("now and then")
        return step(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "step", failing)
    assert runtime.generate_ids(some, None, 12) == expected
    assert len(calls) > 8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_poisoned_adapter_harms_only_its_own_rows(tiny_base: Callable[..., Base], family: str) -> None:
    base = tiny_base(family, **(WIDE if family == "llama" else {}))
    runtime = Runtime(base, Store())
    refs = [None, runtime.attach(build.lora(base, 1)), runtime.attach(build.prefix(base, 2))]
    poisoned = [runtime.attach(build.lora(base, 3)), runtime.attach(build.prefix(base, 4))]
    lora, prefix = (runtime.fitted(ref) for ref in poisoned)
    for pack in lora.packs.values():
        for up in pack.ups:
            up[:] = float("nan")
    prefix.prefix.values[:] = float("nan")
    some = prompts(5, 8)
    expected = [runtime.generate_ids([p], [r], 12)[0] for p, r in zip(some, [*refs, None, refs[1]], strict=True)]
    found: dict[int, str] = {}
    failed: list[str] = []

    def good(i: int) -> None:
        found[i] = runtime.generate_ids([some[i]], [[*refs, None, refs[1]][i]], 12)[0]

    def bad(ref: Ref) -> None:
        for sampling in (None, Sampling(temperature=1.0)):
            try:
                runtime.generate_ids([[5, 6, 7]], [ref], 12, sampling=sampling)
            except NoEffect as error:
                failed.append(error.message)

    threads = [threading.Thread(target=good, args=(i,)) for i in range(5)]
    together([*threads, *(threading.Thread(target=bad, args=(ref,)) for ref in poisoned)])
    assert [found[i] for i in range(5)] == expected
    assert len(failed) == 4
    assert all("not finite" in message for message in failed)
    runtime.close()


def test_an_error_while_text_is_made_ends_one_row(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(runtime._engine)
    good, bad = (ask(scheduler, runtime.base, [[5, 6, 7]], [None], 6, streams=True) for _ in range(2))
    monkeypatch.setattr(bad.rows[0]._stream, "push", lambda token: 1 / 0)
    while scheduler.busy:
        scheduler.turn()
    with pytest.raises(ZeroDivisionError):
        bad.texts()
    assert good.texts() == runtime.generate_ids([[5, 6, 7]], None, 6)


# -- handles --------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_future_and_an_iterator(runtime: Runtime) -> None:
    whole = runtime.generate("the quick", max_new_tokens=20)[0]
    answer = runtime.submit("the quick", raw=True, max_new_tokens=20)
    pieces = list(answer)
    assert len(pieces) > 3
    assert "".join(pieces) == answer.result() == whole
    assert answer.done()
    assert not answer.cancel()
    assert not answer.cancelled()
    assert list(answer) == []
    assert runtime.base.tokenizer.decode(answer.tokens, skip_special_tokens=True) == whole


def test_a_result_may_be_waited_for_in_part(runtime: Runtime) -> None:
    with runtime.base.lock:
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(runtime.submit("a", raw=True, max_new_tokens=LONG)))
        asking.start()
        asking.join()
        late: list[Any] = []

        def wait() -> None:
            try:
                answers[0].result(0.01)
            except TimeoutError as error:
                late.append(error)

        together([threading.Thread(target=wait)])
        assert len(late) == 1
    assert answers[0].cancel()
    with pytest.raises(CancelledError):
        answers[0].result(60)
    assert answers[0].cancelled()
    with pytest.raises(CancelledError):
        list(answers[0])


def test_a_closed_stream_leaves_at_once(runtime: Runtime) -> None:
    ref = runtime.attach(build.lora(runtime.base, 1))
    pieces = runtime.stream("the quick", ref, raw=True, max_new_tokens=LONG)
    next(pieces)
    pieces.close()
    runtime.unload(ref)
    assert runtime.generate("a", max_new_tokens=1)
    assert not runtime._owner._scheduler.busy


# -- any order of events --------------------------------------------------------------------------------------------


class Coming(RuleBasedStateMachine):
    """Calls that come, go on, are cancelled or fail; three slots for five adapters, four places.

    Meanwhile adapters are unloaded, pinned and let go, an alias moves, and what is broken is loaded.
    """

    base: Base
    solo: ClassVar[dict[Any, str]] = {}

    @initialize()
    def begin(self) -> None:
        self.store = Store()
        adapters = [build.lora(self.base, 1), build.lora(self.base, 2, 9), build.lora(self.base, 3, dora=True)]
        adapters += [build.prefix(self.base, 4), build.ia3(self.base, 5)]
        self.names = [build.stored(self.store, self.base, f"a{i}", one) for i, one in enumerate(adapters)]
        self.broken = build.stored(self.store, self.base, "broken", build.lora(self.base, 6))
        spoil(self.store, "broken")
        self.store.alias("a1", "prod", build.stored(self.store, self.base, "a1", build.lora(self.base, 7)).version)
        self.versions = [self.names[1], self.store.resolve("a1:prod")]
        self.pinned: set[str] = set()
        self.runtime = Runtime(self.base, self.store, slots=3, batch_size=4)
        self.scheduler = Scheduler(self.runtime._engine)
        self.asked: list[tuple[Call, list[Any]]] = []

    @rule(
        rows=st.lists(
            st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=6
        )
    )
    def submit(self, rows: list[tuple[int, int, int, bool]]) -> None:
        some = [prompts(10, 2)[prompt] for _, prompt, _, _ in rows]
        prod = self.runtime._engine.resolve("a1:prod")
        refs = [{5: None, 6: prod}[kind] if kind > 4 else self.names[kind] for kind, *_ in rows]
        hows = [Sampling(temperature=1.0, seed=prompt) if sampled else None for _, prompt, _, sampled in rows]
        call = ask(self.scheduler, self.base, some, refs, [most for _, _, most, _ in rows], sampling=hows)
        which = [version.digest for version in self.versions].index(prod.digest)
        self.asked.append((call, [(kind + which if kind == 6 else kind, *rest) for kind, *rest in rows]))

    @rule(which=st.integers(0, 1))
    def move_alias(self, which: int) -> None:
        self.store.alias("a1", "prod", self.versions[which].version)

    @rule(kind=st.integers(0, 4))
    def unload(self, kind: int) -> None:
        name = str(self.names[kind])
        there, slots = name in self.runtime.resident(), self.runtime._engine.slots
        used = slots.leases(self.names[kind].digest) or name in self.pinned
        if there and not used:
            self.runtime.unload(name)
            assert name not in self.runtime.resident()
        else:
            with pytest.raises(CapacityError if used else NotFound):
                self.runtime.unload(name)
            assert (name in self.runtime.resident()) == there

    @rule(kind=st.integers(0, 4))
    def pin(self, kind: int) -> None:
        name = str(self.names[kind])
        if self.pinned <= {name}:  # one at most, so that every row finds a slot in the end
            try:
                self.runtime.pin(name)
            except CapacityError:
                assert name not in self.runtime.resident()
            else:
                self.pinned.add(name)

    @rule()
    def unpin(self) -> None:
        while self.pinned:
            self.runtime.unpin(self.pinned.pop())

    @rule(damaged=st.booleans())
    def load_what_is_broken(self, damaged: bool) -> None:
        before = self.runtime.resident()
        with pytest.raises(StoreCorrupt if damaged else AdapterMismatch):
            self.runtime.load(self.broken) if damaged else self.runtime.attach(_with_nan(build.lora(self.base, 6)))
        assert self.runtime.resident() == before

    @rule()
    def ask_what_is_broken(self) -> None:
        self.asked.append((ask(self.scheduler, self.base, [[5, 6]], [self.broken], 4), []))

    @rule(times=st.integers(1, 6))
    def turn(self, times: int) -> None:
        for _ in range(times):
            self.scheduler.turn()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.asked:
            call, _ = data.draw(st.sampled_from(self.asked))
            data.draw(st.sampled_from(call.rows)).cancelled = True

    @rule(wrong=st.sampled_from(["gone", "long", "empty", "unknown token"]))
    def fail(self, wrong: str) -> None:
        ref = Ref("gone", version=1, digest="0" * 64) if wrong == "gone" else None
        prompt = {"gone": [5], "long": [5] * 600, "empty": [], "unknown token": [10**6]}[wrong]
        self.asked.append((ask(self.scheduler, self.base, [prompt], [ref], 4), []))

    @rule()
    def finish(self) -> None:
        for _ in range(400):
            if not self.scheduler.busy:
                break
            self.scheduler.turn()
        assert not self.scheduler.busy

    @invariant()
    def places_and_leases_are_those_of_running_rows(self) -> None:
        running = self.scheduler.running
        assert len(running) <= 4
        leased = {digest for digest, count in self.runtime._engine.slots._leases.items() if count}
        assert leased == {row.ref.digest for row in running if row.ref is not None}
        assert len(leased) <= 3
        resident = set(self.runtime.resident())
        assert self.pinned <= resident
        assert leased <= {fitted.digest for fitted in self.runtime._engine.slots.resident()}
        slots, ahead = self.runtime._engine.slots, self.runtime._engine.ahead
        assert len(resident) <= 3
        assert slots.used + ahead.nbytes <= slots.memory
        waiting = {row.ref.digest for call, _ in self.asked for row in call.rows if row.ref and not row.done}
        assert set(ahead._flights) <= waiting

    @invariant()
    def rows_write_what_they_write_alone(self) -> None:
        for call, rows in self.asked:
            assert call.remaining == sum(not row.done for row in call.rows)
            for row, settings_ in zip(call.rows, rows, strict=False):
                if row.done and row.error is None:
                    assert row.text == self.alone(row, settings_)
                assert row.error is None or isinstance(row.error, CancelledError)
            if not rows and call.rows[0].done:
                assert call.rows[0].error is not None

    def alone(self, row: Any, key: Any) -> str:
        if key not in self.solo:
            spare = Runtime(self.base, self.store)
            other = Scheduler(spare._engine)
            how = [row.sampler.sampling]
            call = ask(other, self.base, [row.prompt], [row.ref], row.most, sampling=how)
            while other.busy:
                other.turn()
            self.solo[key] = call.texts()[0]
            spare.close()
        return self.solo[key]

    def teardown(self) -> None:
        self.finish()
        self.places_and_leases_are_those_of_running_rows()
        self.rows_write_what_they_write_alone()
        self.runtime.close()


def _with_nan(adapter: Adapter) -> Adapter:
    name, tensor = next(iter(adapter.tensors.items()))
    return Adapter(adapter.spec, {**adapter.tensors, name: tensor * float("nan")}, name="broken")


def test_any_order_of_events(base: Base) -> None:
    Coming.base, Coming.solo = base, {}
    run_state_machine_as_test(
        Coming,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
