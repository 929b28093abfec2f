"""Who else hears of training: the log of events, TensorBoard, and the runs that wait."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adapterhub_lite.cli import event_log
from adapterhub_lite.cli.event_log import FIELDS, KINDS, EventLog
from adapterhub_lite.cli.tensorboard import Board
from adapterhub_lite.errors import TrainingInterrupted, Unsupported
from adapterhub_lite.events import Evaluated, Event, Note, Stage, Step
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.training.runs.folders import LOCK, held, run_folders
from adapterhub_lite.workflows.train import train, train_together
from tests.cli.conftest import Shop, ahl, told

_COMMON = {"event", "time", "seconds"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text("utf-8").splitlines()]


def step(number: int = 1, learner: str = "", loss: float = 2.0) -> Step:
    return Step(number, 30, 0.5, loss, 1e-3, 100.0, 9.0, learner, 1.9, 10**9)


def test_what_is_documented_is_what_is_written() -> None:
    for kind, name in KINDS.items():
        assert [item.name for item in fields(kind)] == list(FIELDS[name])
    assert set(FIELDS) == {*KINDS.values(), "begin", "end"}


def test_every_event_of_a_run_is_a_line(shop: Shop, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    result = ahl("train", shop.recipe("parrot"), "--store", tmp_path / "store", "--log", log, "--json")
    assert json.loads(result.stdout)["ref"] == "parrot@1"
    found = lines(log)
    assert all(set(one) == {*FIELDS[one["event"]], *_COMMON} for one in found)
    assert [one["event"] for one in found if one["event"] in ("begin", "end")] == ["begin", "end"]
    assert (found[0]["recipes"], found[0]["resume"]) == (["parrot"], False)
    assert [one["step"] for one in found if one["event"] == "step"] == [1, 2, 3]
    assert {one["split"] for one in found if one["event"] == "evaluated"} == {"test"}
    assert found[-1]["status"] == "stored"
    assert found[-1]["adapters"][0] == json.loads(result.stdout)
    assert [one["seconds"] for one in found] == sorted(one["seconds"] for one in found)


def test_the_log_may_have_stdout_to_itself(shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    result = ahl("train", shop.recipe("parrot"), "--store", store, "--log", "-")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[-1]["adapters"][0]["ref"] == "parrot@1"
    assert ahl("train", shop.recipe("parrot"), "--store", store, "--log", "-", "--json").exit_code == 2


def test_an_error_is_the_last_line(shop: Shop, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    shrunk = ["-o", "training.max_length=8"]
    assert ahl("train", shop.recipe("parrot"), *shrunk, "--store", tmp_path / "store", "--log", log).exit_code == 1
    end = lines(log)[-1]
    assert (end["event"], end["status"], end["adapters"]) == ("end", "failed", [])
    assert end["error"]["type"] == "DataError"
    assert end["error"]["message"]


def test_a_log_is_appended_to_and_a_torn_line_ended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "step", "lo')
    log = EventLog(str(path))
    log(step(loss=float("nan")))
    log(Evaluated("validation", 3, {"loss": float("inf")}, "sql", {"loss": 0.5, "step": 3}))
    log.close()
    torn, first, second = path.read_bytes().splitlines()
    assert torn == b'{"event": "step", "lo'
    assert json.loads(first, parse_constant=pytest.fail)["loss"] is None
    assert json.loads(second, parse_constant=pytest.fail)["metrics"] == {"loss": None}


def test_a_log_that_cannot_be_opened_is_refused_before_the_base(shop: Shop, tmp_path: Path) -> None:
    refused = ahl("train", shop.recipe("parrot"), "--store", tmp_path / "store", "--log", tmp_path / "no" / "log")
    assert refused.exit_code == 1
    assert "cannot be written" in refused.stderr
    assert not (tmp_path / "store").exists()


def test_a_log_that_takes_nothing_more_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog("/dev/full") if Path("/dev/full").exists() else pytest.skip("needs /dev/full")
    for number in range(3):
        log(step(number))
    assert capsys.readouterr().err.count("takes nothing more") == 1


def test_an_interrupted_run_says_so_and_names_the_command(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **named: Any) -> None:
        raise TrainingInterrupted.by(2, 7, True)

    monkeypatch.setattr("adapterhub_lite.workflows.train.train", stop)
    log = tmp_path / "a log.jsonl"
    result = ahl("train", shop.recipe("parrot"), "--log", log)
    assert result.exit_code == 130
    assert f"ahl train {shop.recipe('parrot')} --log {shlex.quote(str(log))} --resume" in result.stderr
    assert (lines(log)[-1]["event"], lines(log)[-1]["status"]) == ("end", "interrupted")


# --- TensorBoard -------------------------------------------------------------------------------------------------


class Writer:
    """As torch's SummaryWriter, as far as it is used; it keeps what it got."""

    made: list[Writer]

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step = Path(log_dir), purge_step
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "events.out.tfevents.1").touch()
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, number: int) -> None:
        self.scalars.append((tag, value, number))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    """TensorBoard's package and torch's door to it, where neither need be there."""
    Writer.made = []
    package, door = ModuleType("tensorboard"), ModuleType("torch.utils.tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None)
    door.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", door)
    return Writer


def test_scalars_of_a_run(installed: type[Writer], shop: Shop, tmp_path: Path) -> None:
    board = tmp_path / "board"
    assert ahl("train", shop.recipe("parrot"), "--store", tmp_path / "s", "--tensorboard", board).exit_code == 0
    (writer,) = installed.made
    assert writer.folder == board / "parrot"
    assert writer.closed
    tags = {tag for tag, _, _ in writer.scalars}
    assert tags == {
        "loss/step", "loss/smoothed", "learning_rate", "speed/tokens_per_second", "memory/bytes", "test/exact_match",
    }  # fmt: skip
    card = json.loads((tmp_path / "s/adapters/parrot/1/card.json").read_bytes())
    losses = [(round(value, 5), number) for tag, value, number in writer.scalars if tag == "loss/step"]
    assert losses == [(value, number) for number, value in enumerate(card["origin"]["losses"], 1)]


def test_a_folder_for_each_learner_and_each_run(installed: type[Writer], tmp_path: Path) -> None:
    def write(resume: bool, *events: Event) -> list[tuple[str, int | None]]:
        installed.made.clear()
        board = Board(tmp_path, "alone", resume)
        for event in events:
            board(event)
        board.close()
        return [(writer.folder.name, writer.purge_step) for writer in installed.made]

    together = [step(1, "a"), step(1, "b"), Evaluated("validation", 1, {"loss": 1.0}, "b")]
    assert write(False, *together) == [("a", None), ("b", None)]
    assert installed.made[1].scalars[-1] == ("validation/loss", 1.0, 1)
    assert write(False, step(1, "a")) == [("a-2", None)]
    assert write(True, step(8, "a")) == [("a-2", 8)]
    assert write(False, Stage("x"), Note("y"), step()) == [("alone", None)]
    assert write(True, step(5, "new")) == [("new", 5)]


def test_without_tensorboard_it_says_what_to_install(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("adapterhub_lite.cli.tensorboard.importlib.util.find_spec", lambda name: None)
    refused = ahl("train", shop.recipe("parrot"), "--store", tmp_path / "store", "--tensorboard", tmp_path / "board")
    assert refused.exit_code == 1
    assert "pip install tensorboard" in refused.stderr
    assert not (tmp_path / "board").exists()
    assert not (tmp_path / "store").exists()


def test_a_file_is_no_folder_for_tensorboard(installed: type[Writer], shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert ahl("train", shop.recipe("parrot"), "--tensorboard", tmp_path / "file").exit_code == 1


def test_a_full_disk_under_tensorboard_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(**named: Any) -> Any:
        raise OSError(28, "No space left on device")

    board = Board(tmp_path, "x", False, full)
    board(step())
    board(step(2))
    assert capsys.readouterr().err.count("No space left") == 1


# --- runs that wait ----------------------------------------------------------------------------------------------


def broken_off(shop: Shop, store: Path, names: tuple[str, ...] = ("parrot",), **overrides: object) -> None:
    """Train until the second step, as Ctrl-C ends it."""
    changes = {"training.epochs": 4, "training.checkpoint_every": 1, **overrides}
    plans = [load_recipe(shop.recipe(name), {**changes}) for name in names]

    def listen(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2 and event.learner in ("", names[-1]):
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        if len(plans) > 1:
            train_together(plans, store=Store(store), on_event=listen)
        else:
            train(plans[0], store=Store(store), name="polly", on_event=listen)
    assert Store(store).list() == []


def test_runs_that_wait_are_listed_and_go_on_by_the_command_that_is_shown(shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert "No training run" in ahl("runs", "--store", store).stdout
    broken_off(shop, store, **{"adapter.alpha": 8})
    (one,) = told("runs", "--store", store)["runs"]
    assert (one["names"], one["step"], one["total"], one["running"]) == (["polly"], 1, 12, False)
    words = shlex.split(one["resume"])
    assert words[:3] == ["ahl", "train", shop.recipe("parrot")]
    assert {"training.epochs=4.0", "training.checkpoint_every=1", "adapter.alpha=8.0"} <= set(words)
    text = ahl("runs", "--store", store).stdout
    assert one["resume"] in text
    assert ahl(*words[1:]).exit_code == 0
    assert told("runs", "--store", store)["runs"] == []
    assert told("show", "polly", "--store", store)["ref"] == "polly@1"


def test_runs_of_several_recipes(shop: Shop, tmp_path: Path) -> None:
    other = Path(shop.recipe("parrot")).with_name("raven.yaml")
    other.write_text(Path(shop.recipe("parrot")).read_text("utf-8").replace("name: parrot", "name: raven"), "utf-8")
    broken_off(shop, tmp_path / "store", ("parrot", "raven"))
    (one,) = told("runs", "--store", tmp_path / "store")["runs"]
    assert one["names"] == ["parrot", "raven"]
    words = shlex.split(one["resume"])
    assert words[2:4] == [shop.recipe("parrot"), str(other)]
    assert "--together" in words
    assert "--name" not in words


def test_a_run_whose_recipe_was_changed_or_is_gone_says_so(shop: Shop, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(shop.folder, own, ignore=shutil.ignore_patterns("store", "cache"))
    moved = Shop(own, own / "store")
    broken_off(moved, own / "store")
    recipe = Path(moved.recipe("parrot"))
    before = recipe.read_text("utf-8")
    recipe.write_text(before.replace("parrot.jsonl", "moods.jsonl"), "utf-8")
    (one,) = told("runs", "--store", own / "store")["runs"]
    assert "--resume" not in one["resume"]
    assert "is not what it was begun with" in one["problem"]
    recipe.unlink()
    assert "is not what it was begun with" in ahl("runs", "--store", own / "store").stdout
    recipe.write_text(before, "utf-8")
    assert told("runs", "--store", own / "store")["runs"][0]["resume"]


def test_a_run_that_is_under_way_is_told_from_one_that_waits(shop: Shop, tmp_path: Path) -> None:
    broken_off(shop, tmp_path / "store")
    (folder,) = run_folders(tmp_path / "store")
    lock = held(folder / LOCK)
    assert lock is not None
    assert told("runs", "--store", tmp_path / "store")["runs"][0]["running"]
    assert "A process trains it now." in ahl("runs", "--store", tmp_path / "store").stdout
    os.close(lock)
    assert not told("runs", "--store", tmp_path / "store")["runs"][0]["running"]


def test_a_damaged_run_is_listed_all_the_same(shop: Shop, tmp_path: Path) -> None:
    broken_off(shop, tmp_path / "store")
    (folder,) = run_folders(tmp_path / "store")
    (folder / "identity.json").write_text("{")
    (one,) = told("runs", "--store", tmp_path / "store")["runs"]
    assert (one["names"], one["total"], one["resume"]) == ([folder.name], None, "")
    assert ahl("runs", "--store", tmp_path / "store").exit_code == 0


def test_gc_does_not_say_that_nothing_is_left_beside_a_run(shop: Shop, tmp_path: Path) -> None:
    broken_off(shop, tmp_path / "store")
    said = ahl("gc", "--dry-run", "--store", tmp_path / "store").stdout
    assert "broken off after step 1" in said
    assert "Nothing is left over" not in said


def test_versions_of_the_log_are_told() -> None:
    assert event_log.VERSION == 1
    with pytest.raises(Unsupported):
        EventLog("/")


def test_a_run_that_diverged_says_so_and_goes_with_gc(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterhub_lite.training.member import Member

    original, store = Member.learn, tmp_path / "store"

    def learn(self: Member, sums: Any) -> bool:
        if self.step == 2:
            sums.total = float("nan")
        return original(self, sums)

    monkeypatch.setattr(Member, "learn", learn)
    failed = ahl("train", shop.recipe("parrot"), "-o", "training.checkpoint_every=1", "--store", store)
    assert failed.exit_code == 1
    assert "goes on from step 2, which is kept until `ahl gc --runs`" in failed.stderr
    (one,) = told("runs", "--store", store)["runs"]
    assert list(one["diverged"]) == ["parrot"]
    assert "at step 3: training diverged" in one["diverged"]["parrot"]
    text = ahl("runs", "--store", store).stdout
    assert "parrot: Loss nan" in text
    assert "Change the recipe and train anew; `ahl gc --runs` removes this. If the machine erred:" in text
    assert one["resume"] in text
    kept = ahl("gc", "--store", store).stdout
    assert "parrot diverged after step 2, and would again with this recipe: --runs removes it" in kept
    (waits,) = told("gc", "--store", store)["runs"]
    assert waits["diverged"] == ["parrot"]
    told("gc", "--runs", "--store", store)
    assert told("runs", "--store", store)["runs"] == []


def test_what_never_wrote_a_checkpoint_promises_none(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterhub_lite.training.member import Member

    original = Member.learn

    def learn(self: Member, sums: Any) -> bool:
        if self.step == 2:
            sums.total = float("nan")
        return original(self, sums)

    monkeypatch.setattr(Member, "learn", learn)
    store = tmp_path / "store"
    failed = ahl("train", shop.recipe("parrot"), "-o", "training.checkpoint_every=never", "--store", store)
    assert failed.exit_code == 1
    assert "training diverged" in failed.stderr
    assert "which is kept" not in failed.stderr
    assert told("runs", "--store", store)["runs"] == []
