"""Runs that are broken off: killed, interrupted, changed meanwhile. They go on bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import stored_adapter
from adapterhub_lite.errors import NotFound, StoreCorrupt, StoreError, TrainingFailed, TrainingInterrupted, Unsupported
from adapterhub_lite.events import Evaluated, Note, Step
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.training.runs.folders import broken_off, diverged, held, run_folders
from adapterhub_lite.training.runs.run import Identity, Run
from adapterhub_lite.workflows import train as workflow
from adapterhub_lite.workflows.train import train
from tests.checks import assert_store_sound
from tests.training import recipes

LORA = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}
TRAINING = {"epochs": 2, "eval_every": 2, "warmup": 0.2, "checkpoint_every": 1}
ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """The process is gone, as far as the run is concerned."""


def at_step(number: int, what: type = Step) -> Any:
    """A listener that dies at an event of the `number`-th step."""

    def listen(event: Any) -> None:
        if isinstance(event, what) and event.step == number:
            raise Killed

    return listen


def values(store: Store, ref: Any) -> dict[str, torch.Tensor]:
    return stored_adapter(store.read(ref)).tensors


def assert_equal(store: Store, one: Any, other: Any) -> None:
    first, second = values(store, one), values(store, other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    a, b = store.card(one).origin, store.card(other).origin
    for key in ("losses", "evaluations", "steps", "tokens", "kept_step", "ended"):
        assert a.get(key) == b.get(key), key
    assert store.card(one).metrics == store.card(other).metrics


def runs(store: Store) -> list[Path]:
    folder = store.path / "runs"
    return list(folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize(
    "adapter", [LORA, {"type": "dora", "rank": 2}, {"type": "prefix", "tokens": 4}], ids=lambda a: a["type"]
)
def test_at_every_step_of_every_kind(tiny_base, tmp_path: Path, family: str, adapter: dict):
    base, store = tiny_base(family), Store()
    early = {"early_stopping": {"patience": 2}} if adapter["type"] == "lora" else {}
    path = recipes.write(tmp_path, base, adapter, {**TRAINING, **early})
    before = base.live_digest()
    whole = train(path, store=store, base=base)
    assert runs(store) == [], "the checkpoints of a finished run stay"
    total = store.card(whole).origin["steps"]
    for step in range(1, total + 1) if family == "llama" else (1, total - 1):
        with pytest.raises(Killed):
            train(path, store=store, base=base, on_event=at_step(step))
        if step == 1:  # it had no checkpoint yet
            assert runs(store) == []
            continue
        assert_equal(store, train(path, store=store, base=base, resume=True), whole)
        assert runs(store) == []
    assert base.live_digest() == before
    assert_store_sound(store.path)


@pytest.fixture(scope="module")
def scene(tiny_folder, tmp_path_factory) -> Any:
    """A recipe, its base, a store with the uninterrupted version, and the number of its steps."""
    from adapterhub_lite.bases.load import load_base

    folder = tmp_path_factory.mktemp("scene")
    base = load_base(str(tiny_folder("llama")), device="cpu")
    path = recipes.write(folder, base, LORA, TRAINING)
    store = Store(folder / "store")
    return path, base, store, train(path, store=store, base=base)


def broken(scene: Any, tmp_path: Path, step: int = 4) -> tuple[Path, Any, Store]:
    """A copy of the recipe and its data whose run died after `step`."""
    path, base, _, _ = scene
    folder = tmp_path / "recipe"
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("store"))
    store = Store(tmp_path / "store")
    with pytest.raises(Killed):
        train(folder / path.name, store=store, base=base, on_event=at_step(step))
    return folder / path.name, base, store


# --- killed processes ------------------------------------------------------------------------------------------------


def process(recipe: str, home: Path, what: str = "step", at: int = 0, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "AHL_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.training.broken_off", recipe, what, str(at), *more]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)


KILLS = [("step", 3), ("evaluated", 1), ("write", 8), ("rename", 2), ("unlink", 2)]


@pytest.mark.parametrize(("what", "at"), KILLS, ids=lambda v: str(v))
def test_killed(scene: Any, tmp_path: Path, what: str, at: int):
    path, base, reference, whole = scene
    died = process(str(path), tmp_path, what, at)
    assert died.wait() == -signal.SIGKILL, died.communicate()[1]
    store = Store(tmp_path)
    assert store.names() == []
    assert_equal_across(store, train(path, store=store, base=base, resume=True), reference, whole)
    assert runs(store) == []


def assert_equal_across(store: Store, ref: Any, reference: Store, whole: Any) -> None:
    first, second = values(store, ref), values(reference, whole)
    assert all(torch.equal(first[key], second[key]) for key in second)
    assert store.card(ref).origin["losses"] == reference.card(whole).origin["losses"]
    assert store.card(ref).origin["evaluations"] == reference.card(whole).origin["evaluations"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(scene: Any, tmp_path: Path, number: int, code: int):
    path = scene[0]
    command = [sys.executable, "-m", "adapterhub_lite.cli", "train", str(path), "--store", str(tmp_path)]
    more = ["-o", "training.epochs=2000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([*command, *more], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not list(tmp_path.glob("runs/*/checkpoint-*")) and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(number)
    said = running.communicate(timeout=100)[1]
    assert running.returncode == code
    assert "which is kept. Go on with: ahl train" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert Store(tmp_path).names() == []
    assert len(list(tmp_path.glob("runs/*/checkpoint-*"))) == 1


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal, time\n"
        "from adapterhub_lite.training.signals import Wish\n"
        "with Wish() as wish:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert wish.number == 15\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 143, done.stderr


def test_another_thread_leaves_signals_alone():
    import threading

    from adapterhub_lite.training.signals import Wish

    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Wish():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
    with Wish():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) is before


# --- what may not change ---------------------------------------------------------------------------------------------


def test_without_a_word_nothing_is_thrown_away(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    loaded: list[Any] = []
    with pytest.raises(TrainingFailed, match=r"broken off after step 3.*--resume.*--from-scratch"):
        train(path, store=store, base=base, on_event=loaded.append)
    assert loaded == [], "it should be said before anything is loaded"
    assert len(runs(store)) == 1
    with pytest.raises(Unsupported, match="exclude"):
        train(path, store=store, base=base, resume=True, from_scratch=True)


def test_from_scratch(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    steps = []
    ref = train(
        path,
        store=store,
        base=base,
        from_scratch=True,
        on_event=lambda e: steps.append(e.step) if isinstance(e, Step) else None,
    )
    assert steps[0] == 1
    assert_equal_across(store, ref, scene[2], scene[3])
    assert runs(store) == []


def test_there_is_nothing_to_resume(scene: Any, tmp_path: Path):
    with pytest.raises(NotFound, match="no run of tiny"):
        train(scene[0], store=Store(tmp_path), base=scene[1], resume=True)
    assert runs(Store(tmp_path)) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"training.learning_rate": 0.01}, r"training\.learning_rate was 0\.05, is 0\.01"),
        ({"adapter.rank": 2}, r"adapter\.rank was 4, is 2"),
        ({"training.early_stopping": {"patience": 2}}, r"training\.early_stopping was nothing, is"),
        ({"training.seed": 7, "training.epochs": 3}, r"(?s)training\.epochs was 2.*training\.seed was 0, is 7"),
    ],
)
def test_another_recipe_is_refused_field_by_field(scene: Any, tmp_path: Path, override: dict, said: str):
    path, base, store = broken(scene, tmp_path)
    with pytest.raises(TrainingFailed, match=said):
        train(path, store=store, base=base, resume=True, overrides=override)
    assert len(runs(store)) == 1, "what was broken off must stay"
    train(path, store=store, base=base, resume=True, overrides={"training.checkpoint_every": 3})


def test_another_recipe_begins_a_run_of_its_own(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    train(path, store=store, base=base, overrides={"training.learning_rate": 0.01})
    assert len(runs(store)) == 1
    assert_equal_across(store, train(path, store=store, base=base, resume=True), scene[2], scene[3])


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_other_data_is_refused_by_file_and_line(scene: Any, tmp_path: Path, part: str):
    path, base, store = broken(scene, tmp_path)
    file = path.parent / f"{part}.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[2])
    lines[2] = json.dumps({**row, "completion": "other"})
    file.write_text("\n".join(lines))
    with pytest.raises(TrainingFailed, match=rf"data\.{part} .*{part}\.jsonl.* rows; line 3 is the first that differs"):
        train(path, store=store, base=base, resume=True)
    file.write_text("\n".join([*lines, json.dumps(row)]))
    with pytest.raises(TrainingFailed, match=rf"{len(lines)} rows, now {len(lines) + 1}"):
        train(path, store=store, base=base, resume=True)


def test_data_that_lies_elsewhere_is_the_same(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    moved = path.parent.rename(tmp_path / "moved") / path.name
    there = {"data.train": str(moved.parent / "train.jsonl")}
    resumed = train(moved, store=store, base=base, overrides=there, resume=True)
    assert_equal_across(store, resumed, scene[2], scene[3])


def test_another_base_is_refused(scene: Any, tmp_path: Path, tiny_base):
    path, base, store = broken(scene, tmp_path)
    other = tiny_base("llama", seed=5)
    impostor = replace(other, name=base.name, source=base.source)
    with pytest.raises(TrainingFailed, match="base: weights was"):
        train(path, store=store, base=impostor, resume=True)


def test_other_libraries_are_refused(scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, base, store = broken(scene, tmp_path)
    now = workflow.libraries()
    monkeypatch.setattr(workflow, "libraries", lambda: {**now, "torch": "9.9.9"})
    with pytest.raises(TrainingFailed, match=rf"library torch was {re.escape(now['torch'])}, is 9\.9\.9"):
        train(path, store=store, base=base, resume=True)


def test_a_damaged_checkpoint_is_refused(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    (file,) = store.path.glob("runs/*/checkpoint-*/state.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=r"is damaged.*--from-scratch"):
        train(path, store=store, base=base, resume=True)
    train(path, store=store, base=base, from_scratch=True)
    assert store.names() == ["tiny"]


def test_a_damaged_identity_is_refused(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    (file,) = store.path.glob("runs/*/identity.json")
    file.chmod(0o644)
    told = json.loads(file.read_text())
    told["learners"][0]["recipe"]["training"]["seed"] = 3
    file.write_text(json.dumps(told))
    with pytest.raises(TrainingFailed, match=r"training\.seed was 3, is 0"):
        train(path, store=store, base=base, resume=True)
    told["learners"][0]["recipe"]["training"]["seed"] = 0
    told["more"] = 1
    file.write_text(json.dumps(told))
    with pytest.raises(StoreCorrupt, match="belongs to another run"):
        train(path, store=store, base=base, resume=True)


@pytest.mark.parametrize(
    "changes",
    [{"recipe": 5}, {"recipe": {"training": 5}}, {"data": 5}, {"data": {"train": {}}}, {"base": [1]}, {"libraries": 1}],
)
def test_an_identity_of_other_kinds_is_refused(scene: Any, tmp_path: Path, changes: dict[str, Any]):
    path, base, store = broken(scene, tmp_path)
    (file,) = store.path.glob("runs/*/identity.json")
    file.chmod(0o644)
    told = json.loads(file.read_text())
    (whole,) = told["learners"]
    file.write_text(json.dumps({**told, "learners": [whole | changes]}))
    with pytest.raises(StoreCorrupt, match="is damaged"):
        train(path, store=store, base=base, resume=True)
    file.write_text(json.dumps({**told, "learners": [whole, whole]}))
    with pytest.raises(StoreCorrupt, match="is damaged"):
        train(path, store=store, base=base, resume=True)
    with pytest.raises(NotFound, match="no run"):  # it is not compared with what cannot be read
        train(path, store=store, base=base, overrides=["training.seed=8"], resume=True)
    train(path, store=store, base=base, from_scratch=True)


def test_data_that_changes_while_it_is_trained_on_is_told(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    file, seen = path.parent / "train.jsonl", []

    def listen(event: Any) -> None:
        seen.append(event)
        if isinstance(event, Evaluated):
            file.write_text(file.read_text() + "\n")

    ref = train(path, store=store, base=base, resume=True, on_event=listen)
    assert store.card(ref).origin["data_changed"] == [str(file)]
    assert [e for e in seen if isinstance(e, Note) and "train.jsonl changed while tiny was trained" in e.text]


# --- who else --------------------------------------------------------------------------------------------------------


def test_two_processes(scene: Any, tmp_path: Path):
    path, base, store = broken(scene, tmp_path)
    (folder,) = runs(store)
    code = (
        "import sys, time; from pathlib import Path; from adapterhub_lite.training.runs.folders import held\n"
        "print(held(Path(sys.argv[1]) / 'lock') is not None, flush=True); time.sleep(100)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    for more in ({"resume": True}, {"from_scratch": True}, {}):
        with pytest.raises(StoreError, match="Another process trains tiny"):
            train(path, store=store, base=base, **more)
    assert runs(store) == [folder]
    other.kill()
    other.wait()
    assert_equal_across(store, train(path, store=store, base=base, resume=True), scene[2], scene[3])


def test_a_folder_that_goes_while_one_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that ends takes its folder with it; who opened the lock before holds nothing and has to look again."""
    fcntl = pytest.importorskip("fcntl")
    original, path = fcntl.flock, tmp_path / "run" / "lock"
    path.parent.mkdir()

    def late(number: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", original)
        shutil.rmtree(path.parent)
        original(number, how)

    monkeypatch.setattr(fcntl, "flock", late)
    number = held(path)
    assert number is not None
    assert os.fstat(number).st_ino == path.stat().st_ino
    assert held(path) is None
    os.close(number)


def test_a_run_s_folder_goes_with_it(tmp_path: Path):
    identity = Identity("x", {"training": {}}, {})
    with Run(tmp_path, [identity]) as run:
        assert held(run.folder / "lock") is None
    assert not run.folder.exists()
    with Run(tmp_path, [identity]) as again:
        assert again.folder.exists()
        assert held(again.folder / "lock") is None


def test_a_version_is_published_once(scene: Any, tmp_path: Path):
    """Killed after the store has it and before the run is gone."""
    path, base, _, _ = scene
    store = Store(tmp_path)

    def die(event: Any) -> None:
        if isinstance(event, Note) and event.text.startswith("stored tiny@1"):
            raise Killed

    with pytest.raises(Killed):
        train(path, store=store, base=base, on_event=die)
    assert len(runs(store)) == 1
    steps: list[Any] = []
    again = train(path, store=store, base=base, resume=True, on_event=steps.append)
    assert (str(again), store.versions("tiny")) == ("tiny@1", [1])
    assert not [e for e in steps if isinstance(e, Step)]
    assert runs(store) == []


def test_what_diverged_can_be_gone_on_with_and_is_kept(scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As after an error of the machine: the same steps go well the second time."""
    from adapterhub_lite.training import train as training

    path, base, reference, whole = scene
    original, calls = training.make_computation, []

    def faulty(*arguments: Any) -> Any:
        made = original(*arguments)
        gradients = made.gradients

        def poisoned(rows: Any) -> Any:
            found = gradients(rows)
            calls.append(1)
            if len(calls) == 4:
                found[0].total = float("nan")
            return found

        made.gradients = poisoned
        return made

    monkeypatch.setattr(training, "make_computation", faulty)
    store = Store(tmp_path)
    with pytest.raises(
        TrainingFailed, match=r"(?s)nan.* at step 4.*learning rate.*lines .*goes on from step 3, which is kept"
    ) as caught:
        train(path, store=store, base=base)
    assert "ahl train --resume" in str(caught.value)
    assert store.names() == []
    (folder,) = run_folders(store.path)
    assert list(diverged(folder)) == ["tiny"]
    assert "at step 4" in diverged(folder)["tiny"]
    assert broken_off(store.path)[0].diverged == ("tiny",)
    assert_equal_across(store, train(path, store=store, base=base, resume=True), reference, whole)


def test_never_writes_only_when_asked_to_stop(scene: Any, tmp_path: Path):
    path, base, _, _ = scene
    store, seen = Store(tmp_path), []

    def listen(event: Any) -> None:
        seen.extend(store.path.glob("runs/*/checkpoint-*"))

    train(path, store=store, base=base, overrides={"training.checkpoint_every": "never"}, on_event=listen)
    assert seen == []

    def ask(event: Any) -> None:
        if isinstance(event, Step) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match="after step 3, which is kept") as caught:
        train(path, store=store, base=base, overrides={"training.checkpoint_every": "never"}, on_event=ask)
    assert caught.value.exit_code == 130
    again = train(path, store=store, base=base, overrides={"training.checkpoint_every": "never"}, resume=True)
    assert_equal(store, again, "tiny@1")


def test_the_recipe_says_when(scene: Any):
    for text, expected in (("7", (7, None)), ("30s", (None, 30.0)), ("5 min", (None, 300.0)), ("2h", (None, 7200.0))):
        found = load_recipe(scene[0], [f"training.checkpoint_every={text}"]).training
        assert (found.checkpoint_steps, found.checkpoint_seconds) == expected


def test_gc_tells_of_runs_and_removes_them_when_asked(scene: Any, tmp_path: Path):
    from tests.cli.conftest import ahl, told

    _, _, store = broken(scene, tmp_path)
    (folder,) = runs(store)
    said = ahl("gc", "--store", store.path).stdout
    assert f"runs/{folder.name}  (run of tiny, broken off after step 3: `ahl train --resume` goes on" in said
    assert "would go" in ahl("gc", "--runs", "--dry-run", "--store", store.path).stdout
    number = held(folder / "lock")
    assert told("gc", "--runs", "--store", store.path)["runs"] == []
    os.close(number)
    assert runs(store) == [folder]
    (one,) = told("gc", "--runs", "--store", store.path)["runs"]
    assert (one["names"], one["step"]) == (["tiny"], 3)
    assert one["bytes"] > 1000
    assert runs(store) == []
