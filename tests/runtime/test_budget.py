"""Windows and lanes of captured decode steps share the memory for adapters, and a step that is compiled says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import CapacityError
from adapterhub_lite.events import Event, Note
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.captured import Recorder
from tests.runtime.test_scheduler import WIDE

ROW = [[5, 6, 7, 8]]


@pytest.fixture
def captured(tiny_base: Callable[..., Base]) -> Iterator[Callable[..., Runtime]]:
    """A runtime on three adapters, whose steps are recorded."""
    base, store, made = tiny_base("llama", **WIDE), Store(), []
    for seed, name in enumerate("abc", 1):
        build.stored(store, base, name, build.lora(base, seed))

    def runtime(**options: Any) -> Runtime:
        made.append(Runtime(base, store, slots=None, batch_size=4, **options))
        made[-1]._engine.static._capture = Recorder()
        return made[-1]

    yield runtime
    for one in made:
        one.close()


def steps(runtime: Runtime) -> int:
    return runtime._engine.static.nbytes


def test_windows_and_lanes_count(captured: Callable[..., Runtime]) -> None:
    runtime = captured(memory="100MB")
    runtime.load("a")
    before = runtime._engine.slots.free
    runtime.generate_ids(ROW, "a", 4)
    assert steps(runtime) > 0
    assert runtime._engine.slots.free == before - steps(runtime)
    assert runtime._engine.slots.memory == 100_000_000 - steps(runtime)


def test_an_adapter_that_they_leave_no_room_for_is_refused_with_the_reason(captured: Callable[..., Runtime]) -> None:
    roomy = captured(memory="100MB")
    size = roomy.fitted("a").nbytes
    expected = roomy.generate_ids(ROW, "a", 4)
    buffers = steps(roomy)
    heard: list[Event] = []
    tight = captured(memory=buffers + int(1.5 * size), on_event=heard.append)
    assert tight.generate_ids(ROW, "a", 4) == expected
    assert steps(tight) == buffers
    assert heard == []
    tight.pin("a")
    with pytest.raises(CapacityError) as caught:
        tight.load("b")
    assert "pinned: a@1" in str(caught.value)
    assert f"{buffers / 1e3:,.1f} kB of " in str(caught.value)
    assert "windows and lanes of decode steps. Give it more (memory=)" in str(caught.value)
    tight.unpin("a")
    tight.load("b")
    assert tight.resident() == ["b@1"]


def test_steps_that_have_no_room_are_not_captured(captured: Callable[..., Runtime]) -> None:
    roomy = captured(memory="100MB")
    size, expected = roomy.fitted("a").nbytes, roomy.generate_ids(ROW, "a", 4)
    heard: list[Event] = []
    tight = captured(memory=steps(roomy) + size - 1, on_event=heard.append)
    assert tight.generate_ids(ROW, "a", 4) == expected
    assert steps(tight) == 0
    (note,) = heard
    assert isinstance(note, Note)
    assert note.text.startswith(
        "Decoding goes on without recorder, more slowly: windows and lanes of a decode step need"
    )
    assert "Raise memory" in note.text
    assert tight.resident() == ["a@1"]


def test_a_step_that_is_compiled_says_so_once_a_size(captured: Callable[..., Runtime]) -> None:
    heard: list[Event] = []
    runtime = captured(on_event=heard.append)
    recorder: Any = runtime._engine.static._capture
    runtime.generate_ids(ROW, None, 4)
    assert heard == [], "a graph is captured in no time"
    recorder.slow = True
    runtime.generate_ids(ROW, None, 4)
    runtime.generate_ids(ROW * 2, None, 4)
    runtime.generate_ids(ROW * 2, None, 4)
    said = [event.text for event in heard if isinstance(event, Note)]
    assert said == ["Compiling the decode step for 2 rows of up to 128 tokens, once; it takes long (1 capture before)."]
    assert recorder.captures == 2
