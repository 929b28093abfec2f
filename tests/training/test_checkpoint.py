"""Checkpoints: going on is as if nothing had happened, and at every moment there is a whole one or none."""

from __future__ import annotations

import errno
import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.errors import StoreCorrupt, TrainingInterrupted
from adapterhub_lite.events import Note
from adapterhub_lite.formats.strict_json import dump
from adapterhub_lite.recipe import EarlyStopping
from adapterhub_lite.store.fs import FileSystem
from adapterhub_lite.training.loop import run_loop
from adapterhub_lite.training.member import Course
from adapterhub_lite.training.runs.checkpoint import Checkpoints, State, read_checkpoint, write_checkpoint
from adapterhub_lite.training.runs.folders import checkpoints
from tests.store.faulty import Crash, Failing, Recording, Unsynced
from tests.store.power_loss import Disk, write_tree
from tests.training.standin import Softmax, config, examples, members
from tests.training.test_loop import outcome

RUN = "f" * 64
COURSES = [
    Course(config(seed=1, epochs=2), examples(14, 1), examples(5, 11), "a"),
    Course(
        config(seed=2, epochs=4, learning_rate=2.0, eval_every=1, early_stopping=EarlyStopping(patience=2)),
        examples(9, 2),
        examples(5, 12),
        "b",
    ),
]


def train(keeper: Checkpoints | None = None, wish: Any = lambda: 0, before: Any = lambda what: None) -> list[Any]:
    """Both courses, from where `keeper` left off, with dropout."""
    made, learners = members(COURSES)
    if keeper and (state := keeper.latest()):
        for member, tensors, plain in zip(made, state.tensors, state.plain, strict=True):
            member.restore(tensors, plain)
    run_loop(made, Softmax(learners, dropout=0.4, before=before), lambda event: None, keeper, wish)  # type: ignore[arg-type]
    return made


def keeper(folder: Path, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, RUN, **{"fs": Unsynced(), **settings})


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert outcome(one)[0] == outcome(other)[0]
        assert torch.equal(outcome(one)[1], outcome(other)[1])


class Killed(BaseException):
    pass


class TestResume:
    def test_interrupted_at_every_moment(self, tmp_path: Path):
        """At every call of the computation, of gradients and of losses, again and again until it is through."""
        expected = train()
        total: list[str] = []
        train(before=total.append)
        assert {"gradients", "losses"} == set(total)
        for at in range(1, len(total) + 1):
            folder = tmp_path / str(at)
            folder.mkdir()
            calls = 0

            def kill(what: str, at: int = at) -> None:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise Killed

            with pytest.raises(Killed):
                train(keeper(folder, steps=1), before=kill)
            assert_same(train(keeper(folder, steps=1)), expected)

    @pytest.mark.parametrize("stop", range(1, 9))
    def test_asked_to_stop_at_every_step(self, tmp_path: Path, stop: int):
        """With the fewest checkpoints there are."""
        expected, calls = train(), []
        with pytest.raises(TrainingInterrupted, match=f"after step {stop}, which is kept"):
            train(keeper(tmp_path, evaluations=False), lambda: 2 * (calls.count("gradients") >= stop), calls.append)
        assert len(checkpoints(tmp_path)) == 1
        assert_same(train(keeper(tmp_path, evaluations=False)), expected)

    def test_stopped_within_an_evaluation(self, tmp_path: Path):
        expected, calls = train(), []
        with pytest.raises(TrainingInterrupted):
            train(keeper(tmp_path), lambda: 2 * (calls.count("losses") >= 1), calls.append)
        assert_same(train(keeper(tmp_path)), expected)

    def test_a_finished_run_is_finished(self, tmp_path: Path):
        expected = train(keeper(tmp_path))
        calls: list[str] = []
        assert_same(train(keeper(tmp_path), before=calls.append), expected)
        assert calls == []

    def test_every_interval(self, tmp_path: Path):
        now = 0.0

        def clock() -> float:
            return now

        class Counting(Unsynced):
            made = 0

            def rename(self, source: Path, target: Path) -> None:
                Counting.made += 1
                super().rename(source, target)

        def tick(what: str) -> None:
            nonlocal now
            now += 10.0 if what == "gradients" else 0.0

        by_time = Checkpoints(tmp_path / "time", RUN, seconds=30.0, evaluations=False, fs=Counting(), clock=clock)
        (tmp_path / "time").mkdir()
        train(by_time, before=tick)
        steps = round(now / 10)
        assert Counting.made == steps // 3
        Counting.made = 0
        (tmp_path / "steps").mkdir()
        train(Checkpoints(tmp_path / "steps", RUN, steps=4, evaluations=False, fs=Counting()))
        assert Counting.made == steps // 4
        assert len(checkpoints(tmp_path / "steps")) == 1


# --- writing it ----------------------------------------------------------------------------------------------------


def state(value: float) -> State:
    tensors = {"parameters": torch.full((40,), value), "losses": torch.full((3,), value, dtype=torch.float64)}
    return State([tensors], [{"step": int(value), "watch": {"best": value}}])


def assert_is(found: State, value: float) -> None:
    assert found.step == int(value)
    assert torch.equal(found.tensors[0]["parameters"], torch.full((40,), value))


def operations(folder: Path) -> int:
    folder.mkdir()
    write_checkpoint(Unsynced(), folder, 1, state(1), RUN)
    counting = Failing(10**9, Crash())
    write_checkpoint(counting, folder, 2, state(2), RUN)
    return counting.count


@pytest.mark.parametrize("kind", ["crash", "torn", "late", "full"])
def test_a_crash_at_every_system_call(tmp_path: Path, kind: str):
    """The previous or the new checkpoint is there, whole; and the next is written as if nothing had been."""
    total = operations(tmp_path / "count")
    assert total > 10
    seen = set()
    for at in range(1, total + 1):
        folder = tmp_path / f"{kind}-{at}"
        folder.mkdir()
        write_checkpoint(Unsynced(), folder, 1, state(1), RUN)
        error = OSError(errno.ENOSPC, "full") if kind == "full" else Crash()
        failing = Failing(at, error, lasting=kind == "full", torn=kind == "torn", late=kind == "late")
        with suppress(Crash, OSError):
            write_checkpoint(failing, folder, 2, state(2), RUN)
        number, path = checkpoints(folder)[0]
        assert_is(read_checkpoint(path, RUN), number)
        seen.add(number)
        write_checkpoint(Unsynced(), folder, number + 1, state(9), RUN)
        ((_, path),) = checkpoints(folder)
        assert_is(read_checkpoint(path, RUN), 9)
        assert {p.name for p in folder.iterdir()} == {path.name}, "something is left over"
    assert seen == {1, 2}


def test_a_power_cut_at_every_moment(tmp_path: Path):
    """Of every disk that may be left behind, see tests/store/power_loss.py."""
    root = tmp_path / "run"
    root.mkdir()
    write_checkpoint(FileSystem(), root, 1, state(1), RUN)
    disk, recording = Disk(root), Recording()
    write_checkpoint(recording, root, 2, state(2), RUN)
    seen, count = set(), 0
    for operation in recording.log:
        disk.apply(operation)
        for tree in disk.states(64):
            folder = tmp_path / f"left-{count}"
            count += 1
            write_tree(tree, folder)
            number, path = checkpoints(folder)[0]
            assert_is(read_checkpoint(path, RUN), number)
            seen.add(number)
    assert seen == {1, 2}
    assert count > 50


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path: Path):
    seen: list[Any] = []

    class Full(Unsynced):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    expected = train()
    found = train(keeper(tmp_path, steps=1, fs=Full(), on_event=seen.append))
    assert_same(found, expected)
    (note,) = [e for e in seen if isinstance(e, Note)]
    assert note.level == "warning"
    assert "no space left" in note.text


class TestTampering:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        write_checkpoint(Unsynced(), tmp_path, 1, state(3), RUN)
        return checkpoints(tmp_path)[0][1]

    @pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
    def test_any_byte(self, path: Path, file: str):
        target = path / file
        data = target.read_bytes()
        target.chmod(0o644)
        for place in range(0, len(data), 7):
            target.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(StoreCorrupt, match="is damaged"):
                read_checkpoint(path, RUN)
        for changed in (b"", data[:-2], data + b"{}"):
            target.write_bytes(changed)
            with pytest.raises(StoreCorrupt, match="from-scratch"):
                read_checkpoint(path, RUN)

    def test_a_file_that_is_gone(self, path: Path):
        (path / "state.safetensors").unlink()
        with pytest.raises(StoreCorrupt):
            read_checkpoint(path, RUN)

    def test_a_step_that_somebody_wrote_into_it(self, path: Path):
        target = path / "state.json"
        told = json.loads(target.read_text())
        told["learners"][0]["step"] = 4
        target.chmod(0o644)
        target.write_text(json.dumps(told))
        with pytest.raises(StoreCorrupt):
            read_checkpoint(path, RUN)

    def test_of_another_run(self, path: Path):
        with pytest.raises(StoreCorrupt, match="belongs to another run"):
            read_checkpoint(path, "0" * 64)

    @pytest.mark.parametrize("learners", [3, None, []])
    def test_learners_that_are_none(self, path: Path, learners: Any):
        """Whoever writes a file can seal it, too."""
        told = json.loads((path / "state.json").read_text())
        del told["seal"]
        told["learners"] = learners
        (path / "state.json").chmod(0o644)
        (path / "state.json").write_bytes(dump({**told, "seal": sha256(dump(told)).hexdigest()}))
        with pytest.raises(StoreCorrupt, match="is damaged"):
            read_checkpoint(path, RUN)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("step", "4"), ("step", -1), ("step", 2.0), ("step", 9), ("step", True), ("tokens", "x"), ("seconds", []),
        ("evaluations", [{"loss": 1.0}]), ("evaluations", [{"step": 2, "loss": "x"}]), ("evaluations", ["x"]),
        ("watch", {"best": "x", "best_step": 2, "waited": 0}), ("watch", {"best": 1.0, "best_step": 2}),
        ("losses", torch.zeros(3)), ("losses", torch.zeros((2, 2), dtype=torch.float64)),
        ("losses", torch.tensor(1.0, dtype=torch.float64)), ("best", torch.zeros(3, dtype=torch.float64)),
        ("best", torch.zeros(95)), ("parameters", torch.zeros(3, dtype=torch.float64)),
    ],
)  # fmt: skip
def test_what_no_run_leaves_is_refused(what: str, value: Any):
    """Each as the errors that the caller makes StoreCorrupt of, before anything is taken over."""
    (left,), _ = members(COURSES[1:])
    run_loop([left], Softmax(members(COURSES[1:])[1]), lambda event: None)  # type: ignore[arg-type]
    tensors, plain = left.state()
    tensors, plain = {k: v.clone() for k, v in tensors.items()}, dict(plain)
    (fresh,), _ = members(COURSES[1:])
    fresh.restore(tensors, plain)
    part: dict[str, Any] = plain if what in plain else tensors
    assert what in part
    part[what] = value
    (fresh,), _ = members(COURSES[1:])
    with pytest.raises((ValueError, LookupError, TypeError)):
        fresh.restore(tensors, plain)
