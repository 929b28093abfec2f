"""Long prompts are read piece by piece: others get their tokens meanwhile, and nobody's text changes by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.load import Base
from adapterhub_lite.runtime.batch import BatchPlan, Composer
from adapterhub_lite.runtime.decoder import Decoder, decoder_of
from adapterhub_lite.runtime.prefill import Reader, prefill
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.scheduler import Scheduler
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.captured import Recorder
from tests.runtime.test_scheduler import WIDE, ask

STEP = 16
SHORT, LONG = [5, 6, 7], [3 + i % 200 for i in range(5 * STEP - 3)]  # five pieces, the last one shorter


@pytest.fixture
def base(tiny_base: Callable[..., Base]) -> Base:
    return tiny_base("llama", **WIDE)


@pytest.fixture
def runtime(base: Base) -> Iterator[Runtime]:
    made = Runtime(base, Store(), batch_size=6)
    made._engine.piece = STEP
    yield made
    made.close()


@pytest.fixture
def whole(base: Base) -> Iterator[Runtime]:
    """Reads every prompt at once."""
    made = Runtime(base, Store(), batch_size=6)
    made._engine.piece = 10**6
    yield made
    made.close()


def counts(call: Any) -> list[int]:
    return [len(row.tokens) for row in call.rows]


def test_who_writes_gets_a_token_with_every_piece(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime._engine)
    running = ask(scheduler, runtime.base, [SHORT] * 2, [None] * 2, 60, streams=True)
    scheduler.turn()
    coming = ask(scheduler, runtime.base, [LONG], [None], 60)
    for turn in range(1, 6):
        scheduler.turn()
        assert counts(running) == [1 + turn] * 2
        assert counts(coming) == [int(turn == 5)]
        assert len(scheduler.running) == 3, "it has its place from the beginning"
    assert len(scheduler._batches) == 1
    scheduler.turn()
    assert counts(running) + counts(coming) == [7, 7, 2]
    assert all(row.pieces for row in running.rows), "streams go on"


def test_a_short_prompt_does_not_wait_for_a_long_one(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime._engine)
    running = ask(scheduler, runtime.base, [SHORT], [None], 60)
    scheduler.turn()
    first, second = (ask(scheduler, runtime.base, [LONG], [None], 60) for _ in range(2))
    scheduler.turn()
    short = ask(scheduler, runtime.base, [SHORT, SHORT], [None, None], 60)
    scheduler.turn()
    assert counts(short) == [1, 1]
    scheduler.turn(), scheduler.turn(), scheduler.turn()
    assert counts(running) + counts(short) + counts(first) + counts(second) == [6, 4, 4, 1, 0], "one after the other"
    for _ in range(5):
        scheduler.turn()
    assert counts(first) + counts(second) == [6, 1]


def test_many_short_prompts_are_two_pieces_at_most(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come while others write are read in as many turns as it takes."""
    scheduler, read = Scheduler(runtime._engine), []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, *given: (read.append(self.left), original(self, *given))[1])
    alone = ask(scheduler, runtime.base, [LONG[:14]] * 3, [None] * 3, 60)
    scheduler.turn()
    assert (counts(alone), read) == ([1, 1, 1], [3 * 14]), "nobody waits for these"
    coming = ask(scheduler, runtime.base, [LONG[:14]] * 3, [None] * 3, 60)
    for turn, done in enumerate([1, 2, 3], 1):
        read.clear()
        scheduler.turn()
        assert sum(count > 0 for count in counts(coming)) == min(3, 2 * turn), (turn, done)
        assert sum(read) <= 2 * STEP
        assert counts(alone) == [1 + turn] * 3


@pytest.mark.parametrize("kind", ["none", "lora", "dora", "prefix", "ia3"])
@pytest.mark.parametrize("static", [False, True], ids=["plain", "captured"])
def test_texts_are_those_of_prompts_read_at_once(runtime: Runtime, whole: Runtime, kind: str, static: bool) -> None:
    base = runtime.base
    make = {
        "lora": lambda: build.lora(base, 1),
        "dora": lambda: build.lora(base, 2, dora=True),
        "prefix": lambda: build.prefix(base, 3),
        "ia3": lambda: build.ia3(base, 4),
    }
    ref = runtime.attach(make[kind]()) if kind in make else None
    assert ref is None or whole.attach(make[kind]()) == ref
    if static:
        runtime._engine.static._capture = Recorder()
    rows = [SHORT, LONG, LONG[7:60], LONG[:STEP], LONG[: STEP + 1], SHORT * 4]
    chosen = [ref, ref, None, ref, ref, None]
    expected = [whole.generate_ids([row], [one], 12)[0] for row, one in zip(rows, chosen, strict=True)]
    assert len(set(expected)) > 4
    assert [runtime.generate_ids([row], [one], 12)[0] for row, one in zip(rows, chosen, strict=True)] == expected
    assert runtime.generate_ids(rows, chosen, 12) == expected
    running = runtime.submit("the quick brown", None, raw=True, max_new_tokens=200)
    next(running)
    assert runtime.generate_ids(rows, chosen, 12) == expected, "beside one that is being written"
    assert running.result(60) == whole.generate("the quick brown", None, max_new_tokens=200)[0]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_pieces_leave_behind_what_the_whole_leaves(
    base: Base, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """Natively to the last bit: a row's sums have one order."""
    decoder = decoder_of(base)
    assert isinstance(decoder, Decoder)
    if native and decoder.native is None:
        pytest.skip("no native products")
    if native:
        monkeypatch.setattr(decoder.native, "most_tokens", 10**6)
    else:
        monkeypatch.setattr(decoder, "native", None)
    for adapter in (None, build.lora(base, 1), build.prefix(base, 2, 5)):
        row = None if adapter is None else runtime.fitted(runtime.attach(adapter))
        plan: BatchPlan = Composer().compose([row], base.device)
        with torch.inference_mode():
            expected, window, positions = prefill(decoder, [LONG], plan)
            reader = Reader(decoder, [LONG], plan, STEP)
            while reader.left:
                found = reader.read()
        assert reader.positions.tolist() == positions.tolist()
        assert reader.window.end == window.end
        pairs = [(found, expected)]
        pairs += [
            (a[..., : window.end, :], b[..., : window.end, :])
            for a, b in ((reader.window.keys, window.keys), (reader.window.values, window.values))
        ]
        for ours, theirs in pairs:
            if native:
                assert torch.equal(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_who_is_cancelled_while_it_is_read_leaves(runtime: Runtime, whole: Runtime) -> None:
    scheduler = Scheduler(runtime._engine)
    ref = runtime.attach(build.lora(runtime.base, 1))
    running = ask(scheduler, runtime.base, [SHORT], [None], 20)
    scheduler.turn()
    leaving, staying = (ask(scheduler, runtime.base, [LONG], [one], 5) for one in (ref, None))
    scheduler.turn()
    leaving.cancel()
    scheduler.turn()
    assert isinstance(leaving.error, CancelledError)
    assert not runtime._engine.slots._leases
    while scheduler.busy:
        scheduler.turn()
    assert staying.texts() == whole.generate_ids([LONG], None, 5)
    assert running.texts() == whole.generate_ids([SHORT], None, 20)


def test_a_piece_that_fails_fails_its_own_row(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = runtime.generate_ids([SHORT], None, 30)
    scheduler, original = Scheduler(runtime._engine), Reader.read

    def failing(self: Reader, *given: Any) -> torch.Tensor:
        if 0 < self.left < len(LONG) - STEP:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *given)

    running = ask(scheduler, runtime.base, [SHORT], [None], 30)
    scheduler.turn()
    monkeypatch.setattr(Reader, "read", failing)
    coming = ask(scheduler, runtime.base, [LONG], [None], 5)
    while scheduler.busy:
        scheduler.turn()
    with pytest.raises(torch.OutOfMemoryError):
        coming.texts()
    assert running.texts() == expected
