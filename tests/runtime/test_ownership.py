"""Who may drive a base: a closed runtime, two runtimes in two threads, training, listeners; and how it all ends."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.events import Event
from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.decoder import Decoder
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import tiny
from tests.runtime import build

ROWS = [[5, 6, 7, 8], [9, 10]]
LONG = 400


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(tiny.save("llama", tmp_path_factory.mktemp("llama"))), device="cpu")


@pytest.fixture
def runtime(base: Base) -> Iterator[Runtime]:
    made = Runtime(base, Store())
    yield made
    made.close()


def test_a_closed_runtime_refuses_instead_of_answering_as_the_bare_base(base):
    runtime = Runtime(base, Store())
    ref = runtime.attach(build.lora(base, 1))
    runtime.logits(ROWS, ref)
    runtime.close()
    for adapter in (ref, None):
        with pytest.raises(Unsupported, match="closed"):
            runtime.logits(ROWS, adapter)


def test_two_runtimes_on_one_base_take_turns(base):
    one, two = Runtime(base, Store()), Runtime(base, Store())
    ref = one.attach(build.lora(base, 1))
    prompts = [[5 + i, 6, 7] for i in range(4)]
    adapted, bare = one.generate_ids(prompts, ref, 6), two.generate_ids(prompts, None, 6)
    assert adapted != bare
    wrong: list[str] = []

    def repeat(runtime, adapter, expected):
        for _ in range(15):
            if runtime.generate_ids(prompts, adapter, 6) != expected:
                wrong.append(str(adapter))

    threads = [threading.Thread(target=repeat, args=a) for a in ((one, ref, adapted), (two, None, bare))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    one.close()
    two.close()


def test_a_base_in_training_answers_nobody(base):
    runtime = Runtime(base, Store())
    before = runtime.logits(ROWS, None)
    with base.training():
        with pytest.raises(Unsupported, match="being trained"):
            runtime.logits(ROWS, None)
        with pytest.raises(Unsupported, match="being trained"), base.training():
            raise AssertionError("never reached")
    assert all(torch.equal(a, b) for a, b in zip(before, runtime.logits(ROWS, None), strict=True))
    runtime.close()


def test_logits_of_each_row_are_of_its_own_kind(tmp_path):
    base = load_base(str(tiny.save("llama", tmp_path)), device="cpu")
    base.tokenizer.pad_token_id = 3  # what rows are padded with differs from the configuration's
    runtime = Runtime(base, Store())
    plain = build.lora(base, 2)
    score = torch.randn((3, base.config.hidden_size), generator=torch.Generator().manual_seed(2))
    spec = replace(plain.spec, task_type="SEQ_CLS", modules_to_save=("score",))
    head = runtime.attach(Adapter(spec, {**plain.tensors, "base_model.model.score.weight": score}, name="head"))
    alone = runtime.logits([ROWS[1]], head)[0]
    mixed = runtime.logits([ROWS[1], ROWS[0]], [head, None])
    assert alone.shape == mixed[0].shape == (3,)
    torch.testing.assert_close(mixed[0], alone)
    assert mixed[1].shape == (4, base.config.vocab_size)
    padded = runtime.logits([ROWS[1], ROWS[0]], head)[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
    runtime.close()


def test_adapters_need_an_order(base):
    with pytest.raises(Unsupported, match="order"):
        Runtime(base, Store()).logits(ROWS, {"a", "b"})


def test_a_text_that_holds_the_padding_token_is_numbered_alike_beside_a_prefix(tmp_path):
    base = load_base(str(tiny.save("roberta", tmp_path)), device="cpu")
    runtime = Runtime(base, Store())
    lora, prefix = runtime.attach(build.lora(base, 1)), runtime.attach(build.prefix(base, 2))
    row = [1, 40, base.pad_id, 41, base.pad_id, 42, 2]
    alone = runtime.logits([row], lora)[0]
    beside = runtime.logits([row, [1, 50, 2]], [lora, prefix])[0]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)
    runtime.close()


# -- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of `LONG` tokens are not done before a test has done what it does beside them."""
    step = Decoder.step

    def slow(self: Decoder, *arguments: Any) -> torch.Tensor:
        time.sleep(0.005)
        return step(self, *arguments)

    monkeypatch.setattr(Decoder, "step", slow)


@pytest.mark.usefixtures("slowly")
def test_a_stream_half_read_does_not_keep_the_base_from_training(runtime: Runtime) -> None:
    """Its rows stand still while an adapter is trained, and go on after it as if nothing had been."""
    whole = runtime.generate("the quick", max_new_tokens=LONG)[0]
    pieces = runtime.stream("the quick", raw=True, max_new_tokens=LONG)
    text = next(pieces)
    with runtime.base.training():
        (row,) = runtime._owner._scheduler.running
        before = len(row.tokens)
        assert before < LONG
        written = text + "".join(row.pieces[1:])  # what is written already can be read, the rest has nobody to write it
        with pytest.raises(Unsupported, match="being trained"):
            text += "".join(pieces)
        assert len(row.tokens) == before
    answer = runtime.submit("the quick", raw=True, max_new_tokens=LONG)
    next(answer)
    with runtime.base.training():
        time.sleep(0.1)
        assert not answer.done()
    assert answer.result(60) == whole
    assert whole.startswith(written.rstrip("\ufffd"))


@pytest.mark.usefixtures("slowly")
def test_training_in_another_thread_refuses_new_calls_only(runtime: Runtime) -> None:
    whole = runtime.generate("the quick", max_new_tokens=LONG)[0]
    ref = runtime.attach(build.lora(runtime.base, 1))
    answer = runtime.submit("the quick", raw=True, max_new_tokens=LONG)
    next(answer)
    trains, refused = threading.Event(), threading.Event()

    def train() -> None:
        with runtime.base.training():
            trains.set()
            assert refused.wait(60)

    thread = threading.Thread(target=train)
    thread.start()
    trains.wait(60)
    calls = (lambda: runtime.generate("a"), lambda: runtime.logits(ROWS, ref), lambda: runtime.load(ref))
    for call in (*calls, lambda: next(runtime.stream("a"))):
        with pytest.raises(Unsupported, match="being trained"):
            call()
    assert not answer.done()
    refused.set()
    thread.join()
    assert answer.result(60) == whole


@pytest.mark.usefixtures("slowly")
def test_who_asks_for_the_base_gets_it_while_texts_are_written(base: Base) -> None:
    """The thread that steps again and again lets others in, in both runtimes and to train."""
    runtimes = [Runtime(base, Store()) for _ in range(2)]
    answers = [runtime.submit("the quick", raw=True, max_new_tokens=LONG) for runtime in runtimes]
    for answer in answers:
        next(answer)
    for runtime in runtimes:
        runtime.logits(ROWS, None)
    with base.training():
        assert not any(answer.done() for answer in answers)
    for answer in answers:
        assert answer.cancel()
    for runtime in runtimes:
        runtime.close()


def test_who_holds_the_base_is_told_that_it_waits_for_itself(runtime: Runtime) -> None:
    answer = runtime.submit("the quick", raw=True, max_new_tokens=LONG)
    with runtime.base.lock:
        with pytest.raises(Unsupported, match="holds the base"):
            answer.result()
        alone = runtime.generate("a", max_new_tokens=4)  # what it asks for itself it computes itself
    assert alone == runtime.generate("a", max_new_tokens=4)
    answer.cancel()


# -- listeners ------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(base: Base) -> Iterator[Callable[[Callable[[Runtime, Event], None]], tuple[Runtime, Ref]]]:
    """A runtime whose listener is called when the reference is first served: the adapter names no base."""
    made: list[Runtime] = []

    def make(listener: Callable[[Runtime, Event], None]) -> tuple[Runtime, Ref]:
        store = Store()
        ref = store.put("strange", dict(build.lora(base, 1).files()), Card())
        made.append(Runtime(base, store, on_event=lambda event: listener(made[-1], event)))
        return made[-1], ref

    yield make
    for runtime in made:
        runtime.close()


def test_a_listener_may_use_the_runtime(told: Any) -> None:
    heard: list[Any] = []

    def listen(runtime: Runtime, event: Event) -> None:
        heard.append(runtime.generate("a", None, max_new_tokens=4))
        heard.append("".join(runtime.stream("a", None, raw=True, max_new_tokens=4)))
        pieces = runtime.stream("a", runtime.attach(build.lora(runtime.base, 9)), raw=True, max_new_tokens=LONG)
        next(pieces)
        pieces.close()
        heard.append(runtime.logits([[5, 6]], None)[0].shape[0])
        runtime.use(None)

    runtime, ref = told(listen)
    text = runtime.generate("the quick", ref, max_new_tokens=5)
    assert heard == [runtime.generate("a", max_new_tokens=4), heard[0][0], 2]
    assert text == runtime.generate("the quick", ref, max_new_tokens=5)
    assert not runtime._engine.slots._leases


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_a_listener_that_fails_ends_its_own_row(told: Any, error: type[BaseException]) -> None:
    def listen(runtime: Runtime, event: Event) -> None:
        raise error("mine")

    runtime, ref = told(listen)
    other = runtime.submit("the quick", None, raw=True, max_new_tokens=30)
    with pytest.raises(error, match="mine"):
        runtime.generate("a", ref, max_new_tokens=3)
    assert len(other.result(60)) > 0
    assert runtime.generate("a", max_new_tokens=2)


def test_a_listener_may_close_the_runtime(told: Any) -> None:
    runtime, ref = told(lambda runtime, event: runtime.close())
    with pytest.raises(Unsupported, match="closed"):
        runtime.generate("a", ref, max_new_tokens=LONG)
    runtime._owner.join(60)
    assert not runtime._owner._thread.is_alive()


# -- interrupts and the end ------------------------------------------------------------------------------------------


def test_an_interrupt_of_a_waiting_caller_cancels_its_rows(runtime: Runtime) -> None:
    """The base is held until the interrupt has come, so that the text cannot be done before it."""
    waits, interrupted = threading.Event(), threading.Event()

    def hold() -> None:
        with runtime.base.lock:
            waits.set()
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    waits.wait(60)
    with pytest.raises(KeyboardInterrupt):
        runtime.generate(["a", "b"], max_new_tokens=LONG)
    interrupted.set()
    thread.join()
    with runtime._lock:
        assert not runtime._owner._scheduler.busy


def test_close_ends_what_runs_and_what_waits(base: Base) -> None:
    runtime = Runtime(base, Store(), batch_size=2)
    ref = runtime.attach(build.lora(base, 1))
    answers = [runtime.submit("the quick", ref, raw=True, max_new_tokens=LONG) for _ in range(6)]
    next(answers[0])
    thread = runtime._owner._thread
    runtime.close()
    assert not thread.is_alive()
    for answer in answers:
        with pytest.raises(Unsupported, match="closed"):
            answer.result(60)
    for call in (lambda: runtime.generate("a"), lambda: next(runtime.stream("a")), lambda: runtime.submit("a")):
        with pytest.raises(Unsupported, match="closed"):
            call()
    assert not runtime._engine.slots._leases
    assert not any(module._forward_hooks for module in base.model.modules())
    runtime.close()


def test_a_dropped_runtime_ends_its_thread(base: Base) -> None:
    runtime = Runtime(base, Store())
    runtime.generate("a", runtime.attach(build.lora(base, 1)), max_new_tokens=2)
    thread, gone = runtime._owner._thread, weakref.ref(runtime)
    assert thread.is_alive()
    del runtime
    gc.collect()
    assert gone() is None
    thread.join(60)
    assert not thread.is_alive()
    assert not any(module._forward_hooks for module in base.model.modules())


def test_an_answer_keeps_its_runtime(base: Base) -> None:
    answer = Runtime(base, Store()).submit("the quick", raw=True, max_new_tokens=30)
    gc.collect()
    other = Runtime(base, Store())
    assert answer.result(60) == other.generate("the quick", max_new_tokens=30)[0]
    other.close()


def test_the_thread_computes_with_as_many_threads_as_its_caller(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, int]] = []
    step = Decoder.step

    def noting(self: Decoder, *arguments: Any) -> torch.Tensor:
        found.append((threading.current_thread().name, torch.get_num_threads()))
        return step(self, *arguments)

    monkeypatch.setattr(Decoder, "step", noting)
    before = torch.get_num_threads()
    try:
        for count in (2, 1, 3):
            torch.set_num_threads(count)
            runtime.generate("a", max_new_tokens=3)
            assert set(found) == {("adapterhub-runtime", count)}
            found.clear()
    finally:
        torch.set_num_threads(before)
        runtime.generate("a", max_new_tokens=1)
