"""Steps that stand still: what changes between two tokens is data, and the numbers are those of the ordinary step."""

from __future__ import annotations

import gc
import os
import random
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from torch._dynamo.testing import CompileCounterWithBackend

from adapterhub_lite.adapters.fit import Fitted
from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import NoEffect
from adapterhub_lite.events import Event, Note
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime import static_rows as places_module
from adapterhub_lite.runtime.captures import Capture, Compiled, CudaGraphs, capture_for
from adapterhub_lite.runtime.changes import LaneChanges
from adapterhub_lite.runtime.decoder import Decoder, decoder_of
from adapterhub_lite.runtime.prefill import prefill
from adapterhub_lite.runtime.requests import Call, requests
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.scheduler import Scheduler
from adapterhub_lite.runtime.static_lanes import Arena, Deal, site_lanes
from adapterhub_lite.runtime.static_rows import StaticRows
from adapterhub_lite.runtime.static_size import Need, Size, size_for, size_needed
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.captured import Recorder
from tests.runtime.test_decoder import wide_base  # noqa: F401  (a fixture)
from tests.runtime.test_scheduler import WIDE, Coming

RANKS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 64)
CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def base(wide_base: Callable[..., Base]) -> Base:  # noqa: F811
    return wide_base()


@pytest.fixture
def runtimes(base: Base) -> Iterator[Callable[..., Runtime]]:
    """(capture, **options) -> a runtime whose steps are captured so; without a capture they are not."""
    made: list[Runtime] = []

    def runtime(capture: Capture | None = None, **options: Any) -> Runtime:
        made.append(Runtime(base, Store(), slots=None, **{"batch_size": 4, **options}))
        made[-1]._engine.static._capture = capture
        return made[-1]

    yield runtime
    for one in made:
        one.close()


def adapters(runtime: Runtime) -> list[Ref | None]:
    """No adapter, LoRA of many ranks, DoRA, IA3, a prefix, and some layers alone."""
    base = runtime.base
    found: list[Any] = [build.lora(base, rank, rank) for rank in RANKS]
    found += [build.lora(base, 101, 6, dora=True), build.ia3(base, 102), build.prefix(base, 103), some_layers(base)]
    return [None, *(runtime.attach(one) for one in found)]


def some_layers(base: Base) -> Any:
    """A LoRA of q and v of the second layer alone."""
    made = build.lora(base, 104, 4)
    kept = {k: v for k, v in made.tensors.items() if "layers.1." in k and ("q_proj" in k or "v_proj" in k)}
    names = tuple(sorted({k.removeprefix(build.PREFIX).rpartition(".lora_")[0] for k in kept}))
    return replace(made, spec=replace(made.spec, target_modules=names), tensors=kept)


def jobs(refs: Sequence[Ref | None], count: int, seed: int) -> tuple[list[list[int]], list[Ref | None], list[int]]:
    """Prompts, adapters and lengths of rows that come and go."""
    dice = random.Random(seed)
    prompts = [[dice.randrange(3, 250) for _ in range(dice.randint(1, 30))] for _ in range(count)]
    return prompts, [dice.choice(refs) for _ in range(count)], [dice.randint(2, 9) for _ in range(count)]


def written(runtime: Runtime, prompts: list[list[int]], refs: list[Ref | None], most: list[int]) -> list[str]:
    """The texts, by this thread, whose settings of torch are its own."""
    call, scheduler = Call(False), Scheduler(runtime._engine)
    call.add(requests(call, runtime.base, prompts, refs, most, (), None))
    scheduler.submit(call)
    while scheduler.busy:
        scheduler.turn()
    return call.texts()


def static_rows(runtime: Runtime) -> StaticRows:
    found = runtime._engine.static._rows
    assert found is not None
    return found


# -- nothing is made anew -------------------------------------------------------------------------------------------


def test_a_hundred_swaps_replay_what_was_captured(runtimes: Callable[..., Runtime]) -> None:
    """Rows of all kinds and ranks enter and leave; what is replayed reads buffers alone, nothing is captured anew."""
    recorder = Recorder()
    plain, captured = runtimes(), runtimes(recorder)
    refs = adapters(plain)
    assert refs == adapters(captured)
    expected = plain.generate_ids(*jobs(refs, 100, 1))
    assert len(set(expected)) > 90
    assert captured.generate_ids(*jobs(refs, 100, 1)) == expected
    sizes = static_rows(captured).sizes
    assert recorder.captures == len(sizes) <= 4
    assert recorder.replays > 100
    assert captured.generate_ids(*jobs(refs, 100, 1)) == expected
    warm = recorder.captures
    assert captured.generate_ids(*jobs(refs, 100, 2)) == plain.generate_ids(*jobs(refs, 100, 2))
    assert recorder.captures == warm == len(static_rows(captured).sizes), "other swaps were captured anew"


def test_a_hundred_swaps_compile_nothing_anew(runtimes: Callable[..., Runtime]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = runtimes(), runtimes(Compiled(counter))
    refs = adapters(plain)
    assert refs == adapters(compiled)
    warm = jobs(refs, 24, 3)
    assert written(compiled, *warm) == plain.generate_ids(*warm)
    sizes = static_rows(compiled).sizes
    assert counter.frame_count == len(sizes) > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert written(compiled, *jobs(refs, 100, 4)) == plain.generate_ids(*jobs(refs, 100, 4))
            assert compiled._engine.static._capture is not None
            assert counter.frame_count == len(static_rows(compiled).sizes) <= len(sizes) + 2


@pytest.mark.skipif(os.environ.get("AHL_STRESS") != "long", reason="compiles C++ for half a minute: AHL_STRESS=long")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_compiler_gives_the_same_texts(
    tiny_base: Callable[..., Base], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    base = tiny_base("llama", num_hidden_layers=1)
    compiled, plain = Runtime(base, Store(), compile=True), Runtime(base, Store())
    ref = compiled.attach(build.lora(base, 1, 3))
    assert ref == plain.attach(build.lora(base, 1, 3))
    assert compiled.generate_ids([[5, 6, 7]], ref, 6) == plain.generate_ids([[5, 6, 7]], ref, 6)
    assert len(static_rows(compiled).sizes) == 1
    compiled.close()
    plain.close()


def test_more_steps_are_compiled_than_torch_keeps_of_one_function() -> None:
    class Doubled:
        def __init__(self, size: int) -> None:
            self.held = torch.arange(size)

        def __call__(self) -> torch.Tensor:
            return self.held * 2

    counter = CompileCounterWithBackend("eager")
    steps = [Compiled(counter)(Doubled(2 + n)) for n in range(torch._dynamo.config.recompile_limit + 2)]
    assert [step().numel() for step in steps] == [2 + n for n in range(len(steps))]
    assert counter.frame_count == len(steps)


# -- the numbers ----------------------------------------------------------------------------------------------------


def window_of(decoder: Decoder, runtime: Runtime, prompts: list[list[int]], refs: Sequence[Ref | None]) -> Any:
    """What a batch has after its prompts: window, positions, the fitted adapters, and the plan without prefixes."""
    with runtime._engine.plan(refs) as plan, torch.inference_mode():
        _, window, positions = prefill(decoder, prompts, plan)
    return window, positions, plan.rows, replace(plan, prefix=None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("longest", [30, 126], ids=["short", "past 128 columns"])
def test_logits_are_those_of_the_ordinary_step(
    wide_base: Callable[..., Base],  # noqa: F811
    family: str,
    longest: int,
) -> None:
    base = wide_base(family)
    decoder = decoder_of(base)
    assert decoder is not None
    runtime = Runtime(base, Store(), slots=None)
    refs = adapters(runtime)
    prompts = [*jobs(refs, len(refs) - 1, 5)[0], [9] * longest]
    window, positions, rows, plan = window_of(decoder, runtime, prompts, refs)
    places, changes = StaticRows(decoder, Recorder()), LaneChanges(plan)
    with torch.inference_mode():
        places.enter(window, positions, rows)
        for token in range(3, 6):
            tokens = torch.arange(len(refs)) + token
            window.extend()
            expected = decoder.step(tokens, positions, window, changes)
            positions = positions + 1
            torch.testing.assert_close(places.step(tokens), expected, rtol=1e-4, atol=1e-4)
        left, where = places.leave()
    runtime.close()
    assert torch.equal(where, positions)
    for row in range(len(refs)):
        for ours, its in ((left.keys, window.keys), (left.values, window.values)):
            mine = ours[:, row, :, : left.end][:, :, left.filled[row, : left.end]]
            expected = its[:, row, :, : window.end][:, :, window.filled[row, : window.end]]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6))
def test_a_site_in_lanes_changes_what_its_packs_say(seed: int, rows: int) -> None:
    """Any ranks, layers, gains, biases and scales, in lanes that were used before, against a row by itself."""
    from adapterhub_lite.adapters.pack import Pack

    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    widths, n_in = [8, 4, 4][: dice.randint(1, 3)], 6
    group = tuple(torch.nn.Linear(n_in, width, bias=dice.random() < 0.5) for width in widths)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def pack() -> Pack:
        ranks = [dice.choice((0, 1, 3, 8)) for _ in widths]
        return Pack(
            some(n_in, sum(ranks)),
            tuple(some(rank, width) if rank else None for rank, width in zip(ranks, widths, strict=True)),
            tuple(some(width) if dice.random() < 0.5 else None for width in widths),
            tuple(some(width) if dice.random() < 0.5 else None for width in widths),
            some(n_in) if dice.random() < 0.5 else None,
        )

    lanes = 3
    held = site_lanes(group, Need(8, frozenset(range(len(widths))), True, True, True), lanes, Arena(CPU, FLOAT), 0)
    assert held is not None
    held.neutral()
    packs: list[Pack | None] = []
    for turn in range(2):  # what an earlier adapter left behind does not count
        packs = [None if dice.random() < 0.2 else pack() for _ in range(lanes)]
        for lane, one in enumerate(packs):
            for tensor in held.own(lane):
                tensor.zero_()
            for to, what in held.copies(lane, one):
                to.copy_(what)
        assert turn in (0, 1)
    lane = torch.tensor([dice.randint(0, lanes) for _ in range(rows)])
    deal = Deal(lane, (torch.arange(lanes) != lane[:, None])[:, None, :, None])
    x = some(rows, n_in)
    with torch.no_grad():
        given_ = held.scale_input(x, deal)
        out = torch.cat([module(given_) for module in group], 1)
        held.apply(given_, out, deal)
        for row in range(rows):
            own = packs[lane[row]] if lane[row] < lanes else None
            torch.testing.assert_close(out[row], alone(group, own, x[row]), rtol=1e-4, atol=1e-4)


def alone(group: Sequence[torch.nn.Module], pack: Any, x: torch.Tensor) -> torch.Tensor:
    """What the layers give for one row x [in] with its adapter."""
    if pack is not None and pack.scale is not None:
        x = x * pack.scale
    parts, column = [], 0
    for i, module in enumerate(group):
        out = module(x)
        if pack is not None:
            bias = module.bias if module.bias is not None else 0
            out = out if pack.gains[i] is None else out + pack.gains[i] * (out - bias)
            out = out if pack.biases[i] is None else out + pack.biases[i]
            if pack.ups[i] is not None:
                rank = len(pack.ups[i])
                out = out + x @ pack.down[:, column : column + rank] @ pack.ups[i]
                column += rank
        parts.append(out)
    return torch.cat(parts)


# -- rows come and go -----------------------------------------------------------------------------------------------


def test_texts_grow_past_a_size(runtimes: Callable[..., Runtime]) -> None:
    """A window of 128 columns is left for larger ones, with rows of unlike lengths and a prefix in it."""
    recorder = Recorder()
    plain, captured = runtimes(), runtimes(recorder)
    refs = adapters(plain)
    assert refs == adapters(captured)
    prompts = [[7] * 3, [9, 10, 11], [30] * 120, [8]]
    chosen, most = [refs[4], refs[13], refs[11], None], [140, 20, 30, 90]
    assert captured.generate_ids(prompts, chosen, most) == plain.generate_ids(prompts, chosen, most)
    columns = {size.columns for size in static_rows(captured).sizes}
    assert len(columns) > 1
    assert max(columns) == 256


def test_what_a_place_held_reaches_nobody(base: Base) -> None:
    """A row whose numbers are no numbers leaves; its place, and the lane of its adapter, serve others."""
    decoder = decoder_of(base)
    assert decoder is not None
    runtime = Runtime(base, Store(), slots=None)
    refs = adapters(runtime)
    prompts = [[5, 6, 7], [8, 9], [10] * 12]
    window, positions, rows, _ = window_of(decoder, runtime, prompts, [refs[3], None, refs[11]])
    wrong = poisoned(rows[0])
    places, fresh = (StaticRows(decoder, Recorder()) for _ in range(2))
    with torch.inference_mode():
        places.enter(window, positions, (wrong, rows[1], rows[2]))
        logits = places.step(torch.tensor([4, 4, 4]))
        assert not logits[0].isfinite().all()
        assert logits[1:].isfinite().all()
        logits = places.step(torch.tensor([4, 4, 4]))
        assert logits[1:].isfinite().all()
        places.keep([1, 2])
        places.keep([1])
        for _ in range(2):
            assert places.step(torch.tensor([4])).isfinite().all()
        again, at, _, _ = window_of(decoder, runtime, prompts[:2], [refs[3], None])
        places.enter(again, at, rows[:2])
        fresh.enter(again, at, rows[:2])
        found, expected = places.step(torch.tensor([4, 3, 3])), fresh.step(torch.tensor([3, 3]))
        torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=1e-4)
    runtime.close()


def poisoned(fitted: Fitted) -> Fitted:
    """The same adapter with finite values so large that every row is infinite in its lane."""
    packs = {group: replace(pack, down=pack.down.sign() * 3e38) for group, pack in fitted.packs.items()}
    return replace(fitted, packs=packs, digest="poisoned")


def test_what_was_left_in_another_size_reaches_nobody(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that move back to a size find a place as wiped as one that they enter."""
    monkeypatch.setattr(places_module, "_PATIENCE", 2)
    decoder = decoder_of(base)
    assert decoder is not None
    runtime = Runtime(base, Store(), slots=None)
    ref = runtime.attach(build.lora(base, 1, 3))
    prompts = [[10] * 20, [8, 9], [5], [6, 7]]
    window, positions, rows, _ = window_of(decoder, runtime, prompts, [ref, None, None, None])
    parts = [window_of(decoder, runtime, some, [None] * len(some)) for some in (prompts[1:2], prompts[2:])]
    places, fresh = (StaticRows(decoder, Recorder()) for _ in range(2))
    with torch.inference_mode():
        window.select([0, 1])
        places.enter(window, positions[:2], (poisoned(rows[0]), None))
        fresh.enter(*parts[0][:3])
        expected = [fresh.step(torch.tensor([token])).clone() for token in range(3, 9)]
        found = [places.step(torch.tensor([3, 3]))[1:].clone()]
        places.keep([1])
        places.enter(*parts[1][:3])
        found.append(places.step(torch.tensor([4, 4, 4]))[:1].clone())
        places.keep([0])
        found += [places.step(torch.tensor([token])).clone() for token in range(5, 9)]
    assert [size.rows for size in places.sizes][:2] == [2, 4]
    assert places._current().size == places.sizes[0]
    for ours, its in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4)
    runtime.close()


def test_memory_stays_where_it_was_captured() -> None:
    arena = Arena(CPU, FLOAT)
    small = arena.take("keys", 2, 8)
    large = arena.take("keys", 4, 8)
    assert large.data_ptr() != small.data_ptr()
    assert arena.take("keys", 16).data_ptr() == small.data_ptr() == arena.take("keys", 3).data_ptr()
    assert arena.take("keys", 17).data_ptr() == large.data_ptr()
    assert arena.take("values", 3).data_ptr() not in (small.data_ptr(), large.data_ptr())
    assert arena.nbytes == 4 * (16 + 32 + 3)


def test_an_adapter_without_numbers_fails_alone(runtimes: Callable[..., Runtime]) -> None:
    captured, plain = runtimes(Recorder()), runtimes()
    refs = adapters(captured)
    assert refs == adapters(plain)
    wrong = poisoned(captured._engine.fitted(refs[2]))
    captured._engine.keep(wrong)
    expected = plain.generate_ids([[5, 6], [7]], [refs[3], None], 12)
    call = Call(False)
    bad = Ref("wrong", digest="poisoned")
    call.add(requests(call, captured.base, [[5, 6], [7], [8]], [refs[3], None, bad], 12, (), None))
    captured._owner.submit(call)
    with pytest.raises(NoEffect, match="not finite"):
        call.texts()
    assert captured.generate_ids([[5, 6], [7]], [refs[3], None], 12) == expected


def test_a_batch_that_ended_keeps_no_adapter(runtimes: Callable[..., Runtime]) -> None:
    captured = runtimes(Recorder())
    ref = captured.attach(build.lora(captured.base, 1, 3))
    held = weakref.ref(captured._engine.fitted(ref))
    captured.generate_ids([[5, 6, 7]], ref, 6)
    captured.unload(ref)
    gc.collect()
    assert held() is None
    assert captured.generate_ids([[5, 6, 7]], None, 6)


def test_two_batches_on_one_device_both_go_on(runtimes: Callable[..., Runtime]) -> None:
    """The second one takes the places, the first goes on as it would without them."""
    captured, plain = runtimes(Recorder()), runtimes()
    base, refs = captured.base, adapters(captured)
    assert refs == adapters(plain)
    expected = plain.generate_ids([[5, 6, 7], [8, 9]], [refs[3], refs[11]], 20)
    schedulers = [Scheduler(captured._engine) for _ in range(2)]
    calls = []
    for scheduler, prompt, ref in zip(schedulers, ([5, 6, 7], [8, 9]), (refs[3], refs[11]), strict=True):
        call = Call(False)
        call.add(requests(call, base, [prompt], [ref], 20, (), None))
        scheduler.submit(call)
        calls.append(call)
        for _ in range(5):
            scheduler.turn()
    while any(scheduler.busy for scheduler in schedulers):
        for scheduler in schedulers:
            scheduler.turn()
    assert [call.texts()[0] for call in calls] == expected


class CapturedComing(Coming):
    """Rows in captured steps, each of which writes what it writes alone in ordinary ones."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.runtime._engine.static._capture = Recorder()

    def teardown(self) -> None:
        super().teardown()
        assert self.runtime._engine.static._capture is not None


def test_any_order_of_events(tiny_base: Callable[..., Base]) -> None:
    CapturedComing.base, CapturedComing.solo = tiny_base("llama", **WIDE), {}
    run_state_machine_as_test(
        CapturedComing,
        settings=settings(
            max_examples=8, stateful_step_count=12, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


# -- where it cannot be done ----------------------------------------------------------------------------------------


class Failing(Recorder):
    """Captures so many steps and then none."""

    def __init__(self, works: int) -> None:
        super().__init__()
        self.works = works

    def __call__(self, step: Any) -> Any:
        if self.captures == self.works:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return super().__call__(step)


@pytest.mark.parametrize("works", [0, 1, 2])
def test_what_cannot_be_captured_runs_as_it_is(runtimes: Callable[..., Runtime], works: int) -> None:
    heard: list[Event] = []
    captured, plain = runtimes(Failing(works), on_event=heard.append), runtimes()
    refs = adapters(plain)
    assert refs == adapters(captured)
    for seed in (6, 7):
        rows = jobs(refs, 20, seed)
        assert captured.generate_ids(*rows) == plain.generate_ids(*rows)
    said = [event.text for event in heard if isinstance(event, Note) and "without recorder" in event.text]
    assert said == ["Decoding goes on without recorder, more slowly: operation not permitted when stream is capturing"]


def test_where_nobody_listens_it_is_a_warning(runtimes: Callable[..., Runtime]) -> None:
    captured = runtimes(Failing(0))
    captured._engine.static._capture.name = "a capture of its own"
    with pytest.warns(RuntimeWarning, match="without a capture of its own"):
        assert captured.generate_ids([[5, 6, 7]], None, 6)


@pytest.mark.parametrize("method", ["enter", "keep", "step"])
def test_an_error_of_ours_costs_no_row_its_text(
    runtimes: Callable[..., Runtime], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    captured, plain = runtimes(Recorder(), on_event=heard.append), runtimes()
    refs = adapters(plain)
    assert refs == adapters(captured)
    inner = {"enter": "_read", "keep": "_deal", "step": "_fit"}[method]
    original, calls = getattr(StaticRows, inner), []

    def wrong(self: StaticRows, *args: Any) -> Any:
        calls.append(inner)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args)

    monkeypatch.setattr(StaticRows, inner, wrong)
    rows = jobs(refs, 20, 8)
    assert captured.generate_ids(*rows) == plain.generate_ids(*rows)
    assert len(calls) == 4
    assert ["no memory" in event.text for event in heard if isinstance(event, Note)] == [True]


def test_where_steps_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    monkeypatch.delenv("AHL_CUDA_GRAPHS", raising=False)
    assert capture_for(cpu, False) is None
    assert isinstance(capture_for(cpu, True), Compiled)
    assert isinstance(capture_for(cuda, False), CudaGraphs)
    assert isinstance(capture_for(cuda, True), Compiled)
    monkeypatch.setenv("AHL_CUDA_GRAPHS", "0")
    assert capture_for(cuda, False) is None
    assert isinstance(capture_for(cuda, True), Compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_replays_the_step(tmp_path: Any) -> None:
    from adapterhub_lite.bases.load import load_base
    from tests.runtime.test_decoder import checkpoint

    base = load_base(str(checkpoint(tmp_path, "llama")), device="cuda")
    captured = Runtime(base, Store(), slots=None, batch_size=4)
    refs = adapters(captured)
    found = captured.generate_ids(*jobs(refs, 40, 1))
    assert captured._engine.static._capture is not None
    assert static_rows(captured).sizes
    captured._engine.static._capture = captured._engine.static._rows = None
    assert captured.generate_ids(*jobs(refs, 40, 1)) == found
    captured.close()


# -- sizes ----------------------------------------------------------------------------------------------------------

RANK = st.integers(0, 64)
NEEDED = st.builds(
    lambda rows, ranks, longest: size_needed(
        [(Need(rank, frozenset({0} if rank else ())),) for rank in ranks[:rows]] + [()] * (rows - len(ranks[:rows])),
        sum(rank > 0 for rank in ranks[:rows]),
        longest,
        1,
    ),
    st.integers(1, 32), st.lists(RANK, max_size=32), st.integers(1, 3000),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(NEEDED, min_size=1, max_size=30))
def test_sizes_have_room_and_are_few(needed: list[Size]) -> None:
    known: list[Size] = []
    current: Size | None = None
    for one in needed:
        chosen = size_for(one, current, known)
        assert chosen.joined(one) == chosen
        assert chosen.suits(one)
        assert chosen in known or not any(size.suits(one) for size in known)
        known += [] if chosen in known else [chosen]
        current = chosen
    for one in needed:  # whatever was there before needs nothing new
        assert size_for(one, None, known) in known


@pytest.mark.parametrize(
    ("longest", "columns"), [(1, 128), (128, 128), (129, 256), (257, 384), (400, 512), (513, 768), (800, 1024)]
)
def test_columns_come_in_blocks(longest: int, columns: int) -> None:
    assert size_needed([()], 0, longest, 1).columns == columns


def test_a_size_is_left_when_it_is_four_times_too_large() -> None:
    def size(rows: int, rank: int, columns: int = 128) -> Size:
        return Size(rows, columns, rows, (Need(rank, frozenset({0, 1, 2})),))

    assert size(8, 16).suits(size(4, 16))
    assert not size(8, 16).suits(size(2, 16))
    assert not size(4, 64).suits(size(4, 16))
    assert not size(4, 16, 512).suits(size(4, 16))
    assert not size(4, 16).suits(size(4, 32))
    # Room that is there is kept in a size that is new for another reason, unless it is too much.
    assert size_for(size(8, 16), size(4, 32), []) == size(8, 32)
    assert size_for(size(8, 16), size(4, 64), []) == size(8, 16)
    assert size_for(size(4, 16), None, [size(8, 32), size(8, 16), size(4, 64)]) == size(8, 16)


def test_rows_that_became_few_move_to_a_smaller_size(
    runtimes: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while, not at once: the large size is there for whoever comes, and is used again without a capture."""
    monkeypatch.setattr(places_module, "_PATIENCE", 16)
    recorder = Recorder()
    captured, plain = runtimes(recorder, batch_size=8), runtimes()
    refs = adapters(captured)
    assert refs == adapters(plain)
    rows = [[5, 6 + i] for i in range(8)], [refs[10 - i] for i in range(7)] + [None], [4] * 7 + [60]
    assert captured.generate_ids(*rows) == plain.generate_ids(*rows)
    sizes = static_rows(captured).sizes
    assert [(size.rows, size.columns) for size in sizes] == [(8, 128), (1, 128)]
    assert sizes[0].width > sizes[1].width == 0
    assert captured.generate_ids(*rows) == plain.generate_ids(*rows)
    assert recorder.captures == 2


def test_ranks_that_go_up_and_down_stay_in_one_size(runtimes: Callable[..., Runtime]) -> None:
    """What was needed a moment ago counts."""
    recorder = Recorder()
    captured = runtimes(recorder, batch_size=1)
    refs = adapters(captured)
    for i in range(12):
        captured.generate_ids([[5, 6 + i]], refs[1 if i % 2 else 10], 6)  # rank 1, rank 64
    assert recorder.captures == 1
