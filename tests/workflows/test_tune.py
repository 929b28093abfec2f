"""Searches: who wins, who ends early, when they end, and that they go on as they would have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import DataError, NotFound, RecipeError, StoreCorrupt, TrainingFailed, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import search_judge
from adapterhub_lite.workflows import tune as tune_module
from adapterhub_lite.workflows.search_draw import draw
from adapterhub_lite.workflows.search_judge import Clock, loss_at
from adapterhub_lite.workflows.search_space import Choices, Range, checked_space, default_space, read_space, space_dict
from adapterhub_lite.workflows.search_trials import Trial, kept_searches
from adapterhub_lite.workflows.train import train
from adapterhub_lite.workflows.tune import tune
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

SPACE = {"learning_rate": {"low": 1e-3, "high": 0.3, "log": True}, "rank": [2, 4]}


def test_the_winner_has_the_best_validation_loss(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    result = tune(recipe(tmp_path, base), trials=6, space=SPACE, store=store, base=base)
    measured = [trial.loss for trial in result.trials if trial.loss is not None]
    assert len(result.trials) == 6
    assert measured == sorted(measured)
    assert str(result.best) == "tiny@1"
    assert store.names() == ["tiny"], "trials that lost are no versions"
    card, best = store.card("tiny"), result.trials[0]
    assert min(one["loss"] for one in card.origin["evaluations"]) == best.loss
    assert card.recipe["training"]["learning_rate"] == best.parameters["training.learning_rate"]
    assert card.recipe["adapter"]["rank"] == best.parameters["adapter.rank"]
    assert card.recipe["training"]["keep"] == "best"
    told = card.origin["search"]
    assert (card.origin["kind"], told["kind"], told["id"], told["trial"]) == ("trained", "tune", result.id, best.number)
    assert told["loss"] == best.loss
    assert {one["number"] for one in told["trials"]} == set(range(6))
    assert sum(told["counts"].values()) == 6
    assert_store_sound(store.path)


def test_the_winner_is_what_its_recipe_gives(tiny_base, tmp_path: Path):
    base, store, alone = tiny_base("llama"), Store(), Store(tmp_path / "alone")
    result = tune(recipe(tmp_path, base), trials=4, space=SPACE, store=store, base=base)
    card = store.card("tiny")
    told = {**card.recipe, "data": {part: str(tmp_path / name) for part, name in card.recipe["data"].items()}}
    path = tmp_path / "winner.yaml"
    path.write_text(json.dumps(told))
    again = alone.card(train(path, store=alone, base=base))
    assert again.origin["losses"] == pytest.approx(card.origin["losses"], rel=1e-3)
    assert again.origin.get("kept_step") == card.origin.get("kept_step")
    assert result.trials[0].step == card.origin.get("kept_step", card.origin["steps"])


def test_the_worse_half_ends_early(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    result = tune(recipe(tmp_path, base, epochs=8), trials=4, space=SPACE, base=base, store=Store())
    by_number = sorted(result.trials, key=lambda trial: trial.number)
    total = 24
    first_rung = {t.number: loss_at(t.evaluations, total, 0.25) for t in by_number}
    worse = set(sorted(first_rung, key=lambda n: first_rung[n])[2:])
    assert {trial.number for trial in by_number if trial.steps == 6} == worse
    assert all(trial.state == "pruned" for trial in by_number if trial.number in worse)
    complete = [trial for trial in by_number if trial.state == "complete"]
    assert len(complete) == 1, "after half of the steps one of two is left"
    assert complete[0].steps == total
    assert {trial.total for trial in by_number} == {total}
    assert sorted(trial.steps for trial in by_number) == [6, 6, 12, 24]


def test_without_a_pruner_all_come_to_their_end(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    result = tune(recipe(tmp_path, base), trials=5, space=SPACE, pruner="none", base=base, store=Store())
    assert [(trial.state, trial.steps) for trial in result.trials] == [("complete", 9)] * 5


def test_the_median_ends_those_behind(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    space = {"learning_rate": [1e-6, 0.01, 0.02, 0.03, 0.04]}
    result = tune(recipe(tmp_path, base), trials=12, space=space, pruner="median", base=base, store=Store())
    ended = [trial for trial in result.trials if trial.state == "pruned"]
    assert ended
    assert all(trial.round > 0 for trial in ended), "the first round has nobody to be compared with"
    slow = [trial for trial in ended if trial.parameters["training.learning_rate"] == 1e-6]
    assert all(trial.steps < 9 for trial in slow)


def test_the_recipes_own_values_come_first(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    result = tune(recipe(tmp_path, base), trials=2, base=base, store=Store())
    first = next(trial for trial in result.trials if trial.number == 0)
    assert first.parameters == {"training.learning_rate": 0.05, "adapter.rank": 4, "adapter.alpha": 8.0}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_seed_fixes_the_search(tiny_base, tmp_path: Path, family: str):
    base, path = tiny_base(family), recipe(tmp_path, tiny_base(family))
    one = tune(path, trials=6, seed=3, store=Store(tmp_path / "a"), base=base)
    other = tune(path, trials=6, seed=3, store=Store(tmp_path / "b"), base=base)
    assert figures(one) == figures(other)
    assert same(values(Store(tmp_path / "a"), one.best), values(Store(tmp_path / "b"), other.best))
    third = tune(path, trials=6, seed=4, store=Store(tmp_path / "c"), base=base)
    assert [t[1] for t in figures(third)] != [t[1] for t in figures(one)]
    if family == "bert":
        assert "adapter.dropout" in one.axes
        assert all("accuracy" in trial.metrics for trial in one.trials)


@pytest.mark.parametrize("at", [2, 9])
def test_it_goes_on_after_a_death_as_it_would_have(tiny_base, tmp_path: Path, at: int):
    base, path = tiny_base("llama"), recipe(tmp_path, tiny_base("llama"), epochs=4)
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "again")
    expected = tune(path, trials=6, space=SPACE, store=whole, base=base)
    with pytest.raises(Killed):
        tune(path, trials=6, space=SPACE, store=store, base=base, on_event=at_evaluation(at, die))
    assert store.names() == []
    with pytest.raises(TrainingFailed, match=r"This tune of tiny was broken off; .*--resume"):
        tune(path, trials=6, space=SPACE, store=store, base=base)
    notes: list[str] = []
    result = tune(path, trials=6, space=SPACE, store=store, base=base, resume=True, on_event=notes_into(notes))
    assert any(note.startswith("going on from step") for note in notes), "not from the beginning"
    assert figures(result) == figures(expected)
    assert same(values(store, result.best), values(whole, expected.best))


def test_ctrl_c_stores_the_best_so_far(tiny_base, tmp_path: Path):
    base, store, path = tiny_base("llama"), Store(), recipe(tmp_path, tiny_base("llama"))
    whole = tune(path, trials=6, space=SPACE, store=Store(tmp_path / "whole"), base=base)
    result = tune(path, trials=6, space=SPACE, store=store, base=base, on_event=at_evaluation(3, press_ctrl_c))
    assert (result.interrupted, str(result.best)) == (130, "tiny@1")
    card = store.card("tiny")
    assert card.origin["search"]["loss"] == min(one["loss"] for one in card.origin["evaluations"])
    assert card.origin["search"]["state"] == "cut"
    assert card.origin["steps"] < 9, "as it was, not trained on"
    (kept,) = kept_searches(store.path)
    assert not kept.done
    again = tune(path, trials=6, space=SPACE, store=store, base=base, resume=True)
    assert figures(again) == figures(whole)
    assert str(again.best) == "tiny@2", "the search came to a better one"


def test_ctrl_c_before_anything_is_measured(tiny_base, tmp_path: Path):
    from adapterhub_lite.errors import TrainingInterrupted
    from adapterhub_lite.events import Step

    base, path, store = tiny_base("llama"), recipe(tmp_path, tiny_base("llama")), Store()
    pressed = False

    def listen(event: Any) -> None:
        nonlocal pressed
        if isinstance(event, Step) and not pressed:
            pressed = True
            press_ctrl_c()

    with pytest.raises(TrainingInterrupted):
        tune(path, trials=4, space=SPACE, store=store, base=base, on_event=listen)
    assert store.names() == []
    assert tune(path, trials=4, space=SPACE, store=store, base=base, resume=True).best is not None


def test_it_goes_on_to_more_trials(tiny_base, tmp_path: Path):
    base, store, path = tiny_base("llama"), Store(), recipe(tmp_path, tiny_base("llama"))
    whole = tune(path, trials=8, space=SPACE, store=Store(tmp_path / "whole"), base=base)
    first = tune(path, trials=4, space=SPACE, store=store, base=base)
    same_again = tune(path, trials=4, space=SPACE, store=store, base=base, resume=True)
    assert (same_again.best, store.versions("tiny")) == (first.best, [1])
    more = tune(path, trials=8, space=SPACE, store=store, base=base, resume=True)
    assert figures(more) == figures(whole)


class Ticking:
    """A clock that goes on by `step` seconds whenever it is asked."""

    def __init__(self, step: float) -> None:
        self.time, self.step = 0.0, step

    def __call__(self) -> float:
        self.time += self.step
        return self.time


def test_the_budget_cuts_at_an_evaluation(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, store = tiny_base("llama"), Store()
    monkeypatch.setattr(tune_module, "Clock", lambda budget: Clock(budget, Ticking(1.0)))
    path = recipe(tmp_path, base, epochs=20)
    result = tune(path, budget=150.0, space=SPACE, pruner="none", store=store, base=base)
    states = {trial.state for trial in result.trials}
    assert "cut" in states
    for trial in result.trials:
        if trial.state == "cut":
            assert 0 < trial.steps < 60
            assert trial.steps == trial.evaluations[-1]["step"], "at an evaluation"
    assert str(result.best) == "tiny@1"


def test_a_budget_too_short_still_gives_one(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    result = tune(recipe(tmp_path, base), budget=1e-6, space=SPACE, store=store, base=base)
    assert [trial.state for trial in result.trials] == ["cut"] * 4
    assert len({trial.steps for trial in result.trials}) == 1
    assert all(len(trial.evaluations) == 1 for trial in result.trials)
    assert str(result.best) == "tiny@1"


def test_trials_leave_cards_and_the_store_is_not_flooded(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    result = tune(recipe(tmp_path, base, epochs=8), trials=4, space=SPACE, store=store, base=base)
    for trial in result.trials:
        folder = result.folder / "trials" / str(trial.number)
        card = Card.from_bytes((folder / "card.json").read_bytes())
        assert card.origin["search"]["trial"] == trial.number
        assert card.metrics == {"validation": trial.metrics}
        assert card.recipe["adapter"]["rank"] == trial.parameters["adapter.rank"]
        assert (folder / "adapter_model.safetensors").exists() == (trial.state == "complete")
    assert (store.names(), store.versions("tiny")) == (["tiny"], [1])


def test_those_that_diverge_are_no_winners(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from adapterhub_lite.training.member import Member

    base, original = tiny_base("llama"), Member.learn

    def learn(self: Member, sums: Any) -> bool:
        if self.config.learning_rate > 0.02:
            sums.total = float("inf")
        return original(self, sums)

    monkeypatch.setattr(Member, "learn", learn)
    space = {"learning_rate": [0.01, 0.05, 0.1], "rank": [2, 4]}
    result = tune(recipe(tmp_path, base), trials=6, space=space, store=Store(), base=base)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert all(trial.parameters["training.learning_rate"] > 0.02 for trial in failed)
    assert result.trials[0].parameters["training.learning_rate"] == 0.01
    with pytest.raises(TrainingFailed, match="No trial could be measured"):
        tune(recipe(tmp_path, base), trials=2, space={"lr": [0.05]}, store=Store(), base=base)


def test_what_is_learnt_of_failures_is_to_stay_away():
    space = {"training.learning_rate": Range(1e-5, 1.0, log=True)}
    trials = []
    for number in range(16):
        rate = 10 ** (-4.8 + 0.3 * number)
        good = rate < 1e-2
        trials.append(
            Trial(number, {"training.learning_rate": rate}, state="complete" if good else "failed",
                  loss=2.0 - rate * 50 if good else None)
        )  # fmt: skip
    rates = [p["training.learning_rate"] for p in draw(space, trials, 8, 0, 4)]
    assert sum(rate < 0.05 for rate in rates) >= 6
    assert draw(space, trials, 8, 0, 4) == draw(space, trials, 8, 0, 4)
    assert draw(space, trials, 8, 0, 5) != draw(space, trials, 8, 0, 4)


def test_spaces(tiny_base, tmp_path: Path):
    plan = load_recipe(recipe(tmp_path, tiny_base("llama")))
    found = default_space(plan, encoder=False)
    assert found["training.learning_rate"] == Range(5e-5, 0.05, log=True), "ten times the usual, and the recipe's own"
    assert found["adapter.rank"] == Choices((4, 8, 16, 32, 64))
    assert "adapter.dropout" not in found
    assert default_space(plan, encoder=True)["adapter.dropout"] == Range(0.0, 0.3)
    path = tmp_path / "space.yaml"
    path.write_text("lr: {low: 1e-4, high: 1e-2, log: true}\nrank: [4, 8]\nbatch_size: {low: 2, high: 8}\n")
    read = read_space(path, plan)
    assert read["training.learning_rate"] == Range(1e-4, 1e-2, log=True)
    assert read["training.batch_size"] == Range(2, 8, whole=True)
    assert checked_space(space_dict(read), plan) == read


@pytest.mark.parametrize(
    ("space", "text"),
    [
        ({}, "names no field"),
        ({"rank": {"low": 8, "high": 4}}, "low must be less than high"),
        ({"lr": {"low": 0, "high": 1, "log": True}}, "more than 0 with log"),
        ({"rank": {"low": 1, "high": 4000}}, "adapter.rank"),
        ({"rank": 8}, "expected a list"),
        ({"rnk": [8]}, "Did you mean rank"),
        ({"rank": [8, "x"]}, "adapter.rank"),
        ({"lr": {"low": True, "high": 2}}, "are numbers"),
    ],
)
def test_spaces_that_are_refused(tiny_base, tmp_path: Path, space: Any, text: str):
    with pytest.raises(RecipeError, match=text):
        tune(recipe(tmp_path, tiny_base("llama")), trials=2, space=space, base=tiny_base("llama"))


def test_what_is_refused(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, path = tiny_base("llama"), recipe(tmp_path, tiny_base("llama"))
    with pytest.raises(DataError, match=r"has no data.validation"):
        tune(path, trials=2, base=base, overrides=["data.validation=null"])
    with pytest.raises(Unsupported, match="needs an end"):
        tune(path, base=base)
    with pytest.raises(Unsupported, match="more than 0"):
        tune(path, budget=0.0, base=base)
    with pytest.raises(Unsupported, match="no pruner 'best'"):
        tune(path, trials=2, pruner="best", base=base)
    with pytest.raises(NotFound, match="There is no tune of tiny"):
        tune(path, trials=2, resume=True, base=base)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="needs optuna"):
        tune(path, trials=2, base=base)


def test_a_damaged_journal_is_told(tiny_base, tmp_path: Path):
    base, store, path = tiny_base("llama"), Store(), recipe(tmp_path, tiny_base("llama"))
    result = tune(path, trials=2, space=SPACE, store=store, base=base)
    journal = result.folder / "journal.jsonl"
    for damage in (journal.read_bytes()[:-40], b"", b"{}\n", b'{"kind": "other", "id": "x"}\n'):
        journal.write_bytes(damage)
        with pytest.raises(StoreCorrupt, match=r"is damaged.*--from-scratch"):
            tune(path, trials=2, space=SPACE, store=store, base=base, resume=True)
    assert tune(path, trials=2, space=SPACE, store=store, base=base, from_scratch=True).best is not None


def test_going_on_with_other_data_is_another_search(tiny_base, tmp_path: Path):
    base, store, path = tiny_base("llama"), Store(), recipe(tmp_path, tiny_base("llama"))
    tune(path, trials=2, space=SPACE, store=store, base=base)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"prompt": "one", "completion": "two"}')
    with pytest.raises(NotFound):
        tune(path, trials=4, space=SPACE, store=store, base=base, resume=True)


def test_the_clock():
    ticking = Ticking(1.0)
    clock = Clock(10.0, ticking)
    assert [clock.now, clock.left] == [1.0, 8.0]
    assert Clock(None).left == float("inf")
    assert search_judge.RUNGS == (0.25, 0.5)
