"""A grid of recipes, trained together, stored and compared."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import (
    CapacityError,
    DataError,
    NotFound,
    RecipeError,
    TrainingFailed,
    TrainingInterrupted,
    Unsupported,
)
from adapterhub_lite.events import Evaluated
from adapterhub_lite.names import Ref
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import search_group
from adapterhub_lite.workflows.search_results import interval, ranked
from adapterhub_lite.workflows.search_space import brief, grid_points
from adapterhub_lite.workflows.search_trials import Trial, kept_searches
from adapterhub_lite.workflows.sweep import sweep
from adapterhub_lite.workflows.train import train
from tests.checks import assert_store_sound
from tests.workflows.searching import (
    Killed,
    at_evaluation,
    die,
    figures,
    notes_into,
    press_ctrl_c,
    recipe,
    same,
    values,
)

GRID = ["rank=2,4", "lr=0.01,0.1"]


def test_each_point_is_what_it_is_alone(tiny_base, tmp_path: Path):
    base, store, alone = tiny_base("llama"), Store(), Store(tmp_path / "alone")
    path = recipe(tmp_path, base)
    result = sweep(path, GRID, store=store, base=base)
    assert sorted(store.names()) == [
        "tiny-rank2-lr0.01", "tiny-rank2-lr0.1", "tiny-rank4-lr0.01", "tiny-rank4-lr0.1"
    ]  # fmt: skip
    for trial in result.trials:
        overrides = [f"{key}={value}" for key, value in trial.parameters.items()]
        single = alone.card(train(path, store=alone, base=base, overrides=overrides))
        card = store.card(trial.ref)
        assert card.origin["losses"] == pytest.approx(single.origin["losses"], rel=1e-3)
        assert card.recipe["adapter"]["rank"] == trial.parameters["adapter.rank"]
        told = card.origin["search"]
        assert (told["kind"], told["id"], told["trial"], told["points"]) == ("sweep", result.id, trial.number, 4)
        assert told["parameters"] == trial.parameters
        assert trial.loss == card.origin["evaluations"][-1]["loss"]
        assert trial.test == card.metrics["test"]
    assert_store_sound(store.path)


def test_the_table_begins_with_the_best(tiny_base, tmp_path: Path):
    base, store, out = tiny_base("llama"), Store(), tmp_path / "out"
    result = sweep(recipe(tmp_path, base), GRID, store=store, base=base, out=out)
    losses = [trial.loss for trial in result.trials]
    assert losses == sorted(losses)
    assert len(set(losses)) == 4
    assert str(result.best) == result.trials[0].ref
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["version"] for row in rows] == [trial.ref for trial in result.trials]
    assert [float(row["validation_loss"]) for row in rows] == losses
    assert {"trial", "rank", "lr", "state", "test_exact_match", "steps"} <= set(rows[0])
    told = json.loads((out / "results.json").read_text())
    assert [one["ref"] for one in told["trials"]] == [trial.ref for trial in result.trials]
    assert told["best"] == str(result.best)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_that_repeat_have_an_interval(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    result = sweep(recipe(tmp_path, base), {"rank": [2, 4], "seed": [0, 1, 2]}, store=Store(), base=base)
    assert len(result.trials) == 6
    assert [one.parameters for one in result.repeats] == sorted(
        ({"adapter.rank": 2}, {"adapter.rank": 4}),
        key=lambda p: statistics.fmean(
            t.loss for t in result.trials if t.parameters["adapter.rank"] == p["adapter.rank"]
        ),
    )
    for one in result.repeats:
        losses = [trial.loss for trial in one.trials]
        assert one.loss == pytest.approx(statistics.fmean(losses))
        assert one.interval == pytest.approx(4.303 * statistics.stdev(losses) / 3**0.5)


def test_intervals_are_students():
    assert interval([1.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx(12.706)  # sd sqrt 2, of two
    assert interval([0.0, 1.0] * 50) == pytest.approx(1.96 * statistics.stdev([0.0, 1.0] * 50) / 10)


@pytest.mark.parametrize("at", [1, 9])
def test_it_resumes_after_a_death(tiny_base, tmp_path: Path, at: int):
    base, whole, store = tiny_base("llama"), Store(tmp_path / "whole"), Store(tmp_path / "again")
    path = recipe(tmp_path, base)
    expected = sweep(path, GRID, store=whole, base=base, together=2)
    with pytest.raises(Killed):
        sweep(path, GRID, store=store, base=base, together=2, on_event=at_evaluation(at, die))
    with pytest.raises(TrainingFailed, match=r"This sweep of tiny was broken off; \d adapters were done.*--resume"):
        sweep(path, GRID, store=store, base=base)
    notes: list[str] = []
    result = sweep(path, GRID, store=store, base=base, resume=True, on_event=notes_into(notes))
    assert any(note.startswith("going on from step") for note in notes), "not from the beginning"
    assert figures(result) == figures(expected)
    for one, other in zip(result.trials, expected.trials, strict=True):
        assert one.ref == other.ref, "each is stored once"
        assert same(values(store, Ref.parse(one.ref)), values(whole, Ref.parse(other.ref)))
    assert not list(result.folder.glob("runs/*")), "what only going on needs is gone"


def test_it_resumes_between_two_versions(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, store = tiny_base("llama"), Store()
    path, count = recipe(tmp_path, base), 0
    original = Store.put

    def put(self: Store, *arguments: Any, **named: Any) -> Any:
        nonlocal count
        found = original(self, *arguments, **named)
        count += 1
        if count == 2:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", put)
        with pytest.raises(Killed):
            sweep(path, GRID, store=store, base=base)
    result = sweep(path, GRID, store=store, base=base, resume=True)
    assert [store.versions(name) for name in store.names()] == [[1]] * 4
    assert {trial.ref for trial in result.trials} == {f"{name}@1" for name in store.names()}


def test_ctrl_c_keeps_what_is_done(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    path = recipe(tmp_path, base)
    with pytest.raises(TrainingInterrupted):
        sweep(path, GRID, store=store, base=base, together=2, on_event=at_evaluation(8, press_ctrl_c))
    assert len(store.names()) == 2
    (kept,) = kept_searches(store.path)
    assert (kept.kind, kept.name, kept.trials, kept.ended, kept.done) == ("sweep", "tiny", 4, 2, False)
    assert len(sweep(path, GRID, store=store, base=base, resume=True).trials) == 4


def test_a_done_sweep_is_told_again_or_begun_anew(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    path = recipe(tmp_path, base)
    first = sweep(path, ["rank=2,4"], store=store, base=base)
    again = sweep(path, ["rank=2,4"], store=store, base=base, resume=True)
    assert figures(again) == figures(first)
    assert again.id == first.id
    anew = sweep(path, ["rank=2,4"], store=store, base=base)
    assert anew.id != first.id
    assert {trial.ref for trial in anew.trials} == {"tiny-rank2@2", "tiny-rank4@2"}


def test_one_that_diverges_does_not_cost_the_others(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, store = tiny_base("llama"), Store()
    from adapterhub_lite.training.member import Member

    original = Member.learn

    def learn(self: Member, sums: Any) -> bool:
        if self.config.seed == 1 and self.step == 2:
            sums.total = float("nan")
        return original(self, sums)

    monkeypatch.setattr(Member, "learn", learn)
    result = sweep(recipe(tmp_path, base), ["seed=0,1,2"], store=store, base=base)
    last = result.trials[-1]
    assert (last.parameters, last.state, last.loss) == ({"training.seed": 1}, "failed", None)
    assert "diverged" in last.note
    assert sorted(store.names()) == ["tiny-seed0", "tiny-seed2"]
    assert result.repeats[0].loss == pytest.approx(statistics.fmean(t.loss for t in result.trials[:2]))


def test_groups_are_as_large_as_memory(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, sizes = tiny_base("llama"), []
    original = search_group.chosen_setup

    def chosen(group: Any, *more: Any) -> Any:
        if len(group) > 1:
            raise CapacityError("no room")
        return original(group, *more)

    trained = search_group.train_adapters

    def watched(group: Any, *more: Any, **named: Any) -> Any:
        sizes.append(len(group))
        return trained(group, *more, **named)

    monkeypatch.setattr(search_group, "train_adapters", watched)
    whole = sweep(recipe(tmp_path, base), GRID, store=Store(tmp_path / "whole"), base=base)
    monkeypatch.setattr(search_group, "chosen_setup", chosen)
    split = sweep(recipe(tmp_path, base), GRID, store=Store(tmp_path / "split"), base=base)
    assert sizes == [4, 1, 1, 1, 1]
    assert [t.loss for t in split.trials] == pytest.approx([t.loss for t in whole.trials], rel=1e-3)


def test_without_a_validation_part_it_is_refused(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    with pytest.raises(DataError, match=r"tiny has no data.validation, by which .*-o data.validation=FILE"):
        sweep(recipe(tmp_path, base), GRID, base=base, overrides=["data.validation=null"])
    assert kept_searches(Store().path) == []


@pytest.mark.parametrize(
    ("grid", "kind", "text"),
    [
        ([], Unsupported, "has 0 points"),
        (["rank"], Unsupported, "is no axis"),
        (["rank="], Unsupported, "gives adapter.rank no value"),
        (["rank=2,4", "adapter.rank=8"], Unsupported, "gives adapter.rank twice"),
        (["rnak=2"], Unsupported, "Did you mean rank?"),
        (["quantize=none,nf4"], Unsupported, "is no field of this recipe's adapter or training"),
        (["data.train=a,b"], Unsupported, "is no field"),
        (["rank=2,two"], RecipeError, "adapter.rank"),
        (["tokens=2"], Unsupported, "is no field"),
        (["lr=0.1,1e-1"], Unsupported, "Points 1 and 2 of the grid are the same"),
        ({"seed": range(300)}, Unsupported, "has 300 points"),
    ],
)
def test_grids_that_are_refused(tiny_base, tmp_path: Path, grid: Any, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text.replace("?", r"\?")):
        sweep(recipe(tmp_path, tiny_base("llama")), grid, base=tiny_base("llama"))


def test_resume_needs_something_to_go_on_with(tiny_base, tmp_path: Path):
    base, path = tiny_base("llama"), recipe(tmp_path, tiny_base("llama"))
    with pytest.raises(NotFound, match="There is no sweep of tiny"):
        sweep(path, GRID, base=base, resume=True)
    with pytest.raises(Unsupported, match="exclude each other"):
        sweep(path, GRID, base=base, resume=True, from_scratch=True)
    assert not list((Store().path / "runs").iterdir())


def test_names_of_points(tiny_base, tmp_path: Path):
    plan = load_recipe(recipe(tmp_path, tiny_base("llama")))
    names = [p.name for p in grid_points(plan, ["rank=8", "lr=1e-4,0.0003,2e-3", "targets=all-linear,[q_proj,v_proj]"])]
    assert names[0] == "tiny-rank8-lr1e-4-targetsall-linear"
    assert names[1] == "tiny-point2", "a list is no part of a name"
    assert names[2] == "tiny-rank8-lr3e-4-targetsall-linear"
    assert len(set(names)) == 6
    assert [brief(v) for v in (1e-4, 0.00035, 5e-5, 0.05, 16, 32.0, "x")] == [
        "1e-4", "3.5e-4", "5e-5", "0.05", "16", "32", "x"
    ]  # fmt: skip


def test_ranks_put_what_was_not_measured_last():
    trials = [Trial(0, {}, loss=None), Trial(1, {}, loss=2.0), Trial(2, {}, loss=0.5), Trial(3, {}, loss=2.0)]
    assert [trial.number for trial in ranked(trials)] == [2, 1, 3, 0]


def test_lines_of_the_test_part_say_whose_they_are(tiny_base, tmp_path: Path):
    base, told = tiny_base("llama"), []
    result = sweep(recipe(tmp_path, base), {"rank": [2, 4]}, store=Store(), base=base, on_event=told.append)
    tested = [event.learner for event in told if isinstance(event, Evaluated) and event.split == "test"]
    assert sorted(tested) == sorted(trial.ref.partition("@")[0] for trial in result.trials)
