"""`ahl sweep` and `ahl tune`."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from adapterhub_lite.cli.guard import UsageProblem
from adapterhub_lite.cli.searching import going_on, read_duration
from tests.cli.conftest import Shop, ahl, told


@pytest.fixture
def validated(shop: Shop, tmp_path: Path) -> Path:
    """A recipe with a validation part."""
    (tmp_path / "validation.jsonl").write_text((shop.folder / "parrot-test.jsonl").read_text())
    text = Path(shop.recipe("parrot")).read_text().replace("parrot.jsonl", str(shop.folder / "parrot.jsonl"))
    text = text.replace("parrot-test.jsonl", f"{shop.folder / 'parrot-test.jsonl'}, validation: validation.jsonl")
    path = tmp_path / "parrot.yaml"
    path.write_text(text)
    return path


def test_sweep(validated: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    arguments = ["sweep", validated, "--grid", "rank=2,4", "--grid", "seed=0,1", "--set", "training.epochs=2"]
    done = ahl(*arguments, "--store", store, "--out", out)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "TRIAL",
        "RANK",
        "SEED",
        "LOSS",
        "TEST",
        "EXACT_MATCH",
        "STEPS",
        "ENDED",
        "STORED",
    ]
    losses = [float(line.split()[3]) for line in lines[1:5]]
    assert losses == sorted(losses)
    assert "95 % interval" in done.stdout
    assert "±" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["plot.png", "results.csv", "results.json"]
    listed = told("list", "--store", store)["adapters"]
    assert [one["name"] for one in listed] == [f"parrot-rank{r}-seed{s}" for r in (2, 4) for s in (0, 1)]
    again = told(*arguments, "--store", store, "--resume")
    assert [one["ref"] for one in again["trials"]] == [line.split()[-1] for line in lines[1:5]]
    assert again["best"] == again["trials"][0]["ref"]
    assert (again["kind"], len(again["repeats"]), again["interrupted"]) == ("sweep", 2, False)


def test_tune(validated: Path, tmp_path: Path) -> None:
    store, space = tmp_path / "store", tmp_path / "space.yaml"
    space.write_text("rank: [2, 4]\nlr: {low: 1e-3, high: 0.1, log: true}\n")
    found = told("tune", validated, "--trials", "5", "--space", space, "--seed", "7", "--store", store)
    assert (found["kind"], len(found["trials"]), found["best"]) == ("tune", 5, "parrot@1")
    assert found["space"] == {
        "adapter.rank": [2, 4],
        "training.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
    }
    assert Path(found["files"][2]).read_bytes().startswith(b"\x89PNG")
    plain = ahl("tune", validated, "--trials", "5", "--space", space, "--seed", "7", "--store", store, "--resume")
    assert plain.exit_code == 0, plain.stderr
    assert "Best: parrot@1." in plain.stdout
    assert "5 trials in " in plain.stdout
    shown = told("show", "parrot", "--store", store)
    assert shown["card"]["origin"]["search"]["trial"] == found["trials"][0]["number"]


def test_ctrl_c_says_how_to_go_on(validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub_lite.training.member import Member

    original, count = Member.evaluated, 0

    def evaluated(self: Member, sums: object) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, sums)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Member, "evaluated", evaluated)
        broken = ahl("tune", validated, "--trials", "4", "--store", tmp_path / "store", "--json")
    assert broken.exit_code == 130
    assert json.loads(broken.stdout)["best"] == "parrot@1"
    command = broken.stderr.strip().splitlines()[-1]
    assert "the best so far is parrot@1" in command
    assert "Go on with: ahl tune " in command
    assert command.endswith("--resume")
    words = command.split("Go on with: ahl ")[1].split()
    assert len(told(*words)["trials"]) == 4


def test_gc_tells_of_searches_and_removes_them(validated: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    told("tune", validated, "--trials", "2", "--store", store)
    (kept,) = told("gc", "--store", store)["searches"]
    assert (kept["kind"], kept["name"], kept["trials"], kept["done"]) == ("tune", "parrot", 2, True)
    assert "tune of parrot, 2 of 2 adapters done: --runs removes it" in ahl("gc", "--store", store).stdout
    assert "would go" in ahl("gc", "--runs", "--dry-run", "--store", store).stdout
    assert Path(kept["folder"]).is_dir()
    assert len(told("gc", "--runs", "--store", store)["searches"]) == 1
    assert not Path(kept["folder"]).exists()
    assert ahl("verify", "--store", store).exit_code == 0
    assert [one["ref"] for one in told("list", "--store", store)["adapters"]] == ["parrot@1"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["sweep"], 2, "A sweep needs a grid"),
        (["sweep", "--grid", "rank=2", "--resume", "--from-scratch"], 2, "exclude each other"),
        (["sweep", "--grid", "rnk=2"], 1, "Did you mean rank?"),
        (["tune"], 2, "A search needs an end"),
        (["tune", "--budget", "soon"], 2, "'soon' is no length of time"),
        (["tune", "--trials", "2", "--pruner", "x"], 1, "no pruner 'x'"),
        (["tune", "--trials", "2", "--resume", "--from-scratch"], 2, "exclude each other"),
        (["tune", "--trials", "2", "--space", "nowhere.yaml"], 1, "nowhere.yaml does not exist"),
        (["tune", "--trials", "2", "--set", "data.validation=null"], 1, "no data.validation"),
    ],
)
def test_what_is_refused(validated: Path, arguments: list[str], code: int, text: str) -> None:
    found = ahl(arguments[0], validated, *arguments[1:])
    assert (found.exit_code, text in found.stderr) == (code, True), found.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("90s", 90), ("1h30m", 5400), ("2h", 7200), ("1.5min", 90), ("1 h 5 s", 3605)]
)
def test_durations(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "0m", "-5m", "5m1h", "1e3s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageProblem):
        read_duration(text)


def test_the_command_that_goes_on() -> None:
    options = [("--grid", ["rank=2,4", "lr=1,2"]), ("-o", None), ("--together", 2)]
    found = going_on(["sweep", "a b.yaml"], options, Path("/s"))
    assert found == "ahl sweep 'a b.yaml' --grid rank=2,4 --grid lr=1,2 --together 2 --store /s --resume"


# --- searches that wait ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sweep", ["--grid", "rank=2,4", "--grid", "targets=all-linear,[q_proj,v_proj]"]),
        ("tune", ["--trials", "4", "--seed", "3", "--budget", "1h30m", "--pruner", "none", "--together", "2"]),
    ],
)
def test_a_search_that_was_broken_off_is_listed_with_the_command_that_goes_on(
    validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: list[str]
) -> None:
    from adapterhub_lite.training.member import Member

    original, store = Member.evaluated, tmp_path / "store"

    def evaluated(self: Member, sums: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, sums)  # type: ignore[arg-type]

    more = ["--set", "training.epochs=2", "--store", store]
    with monkeypatch.context() as patch:
        patch.setattr(Member, "evaluated", evaluated)
        assert ahl(kind, validated, *options, *more).exit_code == 130
    found = told("runs", "--store", store)
    assert found["runs"] == []
    (one,) = found["searches"]
    assert (one["kind"], one["name"], one["running"], one["problem"]) == (kind, "parrot", False, "")
    assert one["ended"] < one["trials"]
    text = ahl("runs", "--store", store).stdout
    assert one["resume"] in text
    assert f"{kind} of parrot" in text
    words = shlex.split(one["resume"])
    assert words[:3] == ["ahl", kind, str(validated)]
    assert words[-1] == "--resume"
    for word in options:
        assert ("5400s" if word == "1h30m" else word) in words
    assert "training.epochs=2.0" in words
    done = told(*words[1:])
    assert all(trial["state"] for trial in done["trials"])
    assert told("runs", "--store", store)["searches"] == []


def test_a_search_from_python_or_of_a_recipe_that_changed_says_so(validated: Path, tmp_path: Path) -> None:
    from adapterhub_lite.store import Store
    from adapterhub_lite.workflows.sweep import sweep
    from adapterhub_lite.workflows.tune import tune
    from tests.workflows.searching import Killed, at_evaluation, die

    twice = {"training.epochs": 2, "training.checkpoint_every": 1}
    store = Store(tmp_path / "store")
    with pytest.raises(Killed):
        sweep(validated, {"rank": [2, 4]}, store=store, overrides=twice, on_event=at_evaluation(3, die))
    (one,) = told("runs", "--store", store.path)["searches"]
    assert one["resume"].split()[3:5] == ["--grid", "rank=2,4"]
    before = validated.read_text()
    validated.unlink()
    (one,) = told("runs", "--store", store.path)["searches"]
    assert not one["resume"]
    assert "is not what it was begun with" in one["problem"]
    validated.write_text(before)
    other = Store(tmp_path / "other")
    with pytest.raises(Killed):
        tune(validated, trials=2, space={"rank": [2, 4]}, store=other, overrides=twice, on_event=at_evaluation(3, die))
    (one,) = told("runs", "--store", other.path)["searches"]
    assert one["problem"] == "It was begun from Python: tune(recipe, space=..., resume=True) goes on."
    assert one["problem"] in ahl("runs", "--store", other.path).stdout
