"""The quality gate: who wins is counted from answers given one at a time, and the alias's log keeps every decision."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from adapterhub_lite.errors import DataError, InvalidName, NotFound, StoreError, StoreFull, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.registry import make_task
from adapterhub_lite.tasks.rows import read_jsonl
from adapterhub_lite.workflows import promote as gate
from adapterhub_lite.workflows.promote import promote
from tests.checks import assert_store_sound
from tests.runtime import build

TASK = {"type": "instruct", "prompt": "q", "completion": "a", "max_new_tokens": 4, "metrics": ["exact_match"]}
QUESTIONS = [f"question {i}" for i in range(10)]
_SAID: dict[tuple[str, int], list[str]] = {}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tiny_base):
    return tiny_base("llama", seed=3)


@dataclass
class Shelf:
    """Versions of `mine`: adapter `seed` is version `seed`. Rows are right for whom they were written for."""

    base: object
    store: Store
    folder: Path

    def answers(self, seed: int) -> list[str]:
        key = (self.base.fingerprint.digest, seed)
        if key not in _SAID:
            runtime = Runtime(self.base, self.store)
            ref = runtime.attach(build.lora(self.base, seed))
            _SAID[key] = [runtime.answer(text, ref, max_new_tokens=4)[0] for text in QUESTIONS]
            runtime.close()
        return _SAID[key]

    def rows(self, file: str, right: dict[int, int]) -> Path:
        """Ten rows, of which the first n are answered as adapter `seed` does, the next as the next one does."""
        texts = [text for seed, count in right.items() for text in self.answers(seed)[:count]]
        owners = [seed for seed, count in right.items() for _ in range(count)]
        expected = [self.answers(seed)[i] for i, seed in enumerate(owners)]
        assert len(texts) <= len(QUESTIONS)
        expected += ["nobody says this"] * (len(QUESTIONS) - len(expected))
        path = self.folder / file
        lines = [json.dumps({"q": q, "a": a}) for q, a in zip(QUESTIONS, expected, strict=True)]
        path.write_text("\n".join(lines))
        return path

    def put(self, seed: int, data: Path | None, split: str = "test", base=None, **card) -> Ref:
        base = base or self.base
        facts = {
            "base": {"name": base.name, "fingerprint": base.fingerprint.to_dict(), "quantization": base.quantization},
            "task": TASK,
            "recipe": {"data": {split: str(data)}},
            "data": {split: read_jsonl(data).summary()} if data else {},
        }
        return self.store.put("mine", dict(build.lora(base, seed).files()), Card(**{**facts, **card}))

    def prod(self) -> int | None:
        return self.store.aliases("mine").get("prod")

    def log(self) -> list[tuple[str, int | None]]:
        return [(move.event, move.version) for move in self.store.alias_history("mine", "prod")]


@pytest.fixture
def shelf(base, tmp_path):
    made = Shelf(base, Store(tmp_path / "store"), tmp_path)
    yield made
    assert_store_sound(made.store.path)


@pytest.fixture
def two(shelf):
    """mine@1 is right in 7 of 10 rows and mine@2 in 3; both name the rows as their test data."""
    data = shelf.rows("test.jsonl", {1: 7, 2: 3})
    shelf.put(1, data)
    shelf.put(2, data)
    return shelf


def test_the_first_promotion_is_accepted_with_its_figure(two, base):
    found = promote("mine@1", "prod", store=two.store, base=base)
    assert (found.accepted, found.moved, found.current, found.candidate_value) == (True, True, None, 0.7)
    assert two.prod() == 1
    (move,) = two.store.alias_history("mine", "prod")
    assert (move.event, move.version, dict(move.reason)) == ("promote", 1, found.to_dict())


def test_a_better_version_is_accepted_and_the_log_says_why(two, base):
    two.store.alias("mine", "prod", 2)
    found = promote("mine@1", "prod", store=two.store, base=base)
    assert (found.accepted, found.candidate_value, found.current_value) == (True, 0.7, 0.3)
    assert two.prod() == 1
    reason = two.store.alias_history("mine", "prod")[-1].reason
    assert reason["metric"] == "exact_match"
    assert (reason["candidate"], reason["current"]) == (1, 2)
    assert (reason["candidate_value"], reason["current_value"], reason["margin"]) == (0.7, 0.3, 0.0)
    assert (reason["rows"], reason["data_sha256"]) == (10, read_jsonl(two.folder / "test.jsonl").sha256)


def test_a_worse_version_is_refused_and_the_decision_is_kept(two, base):
    two.store.alias("mine", "prod", 1)
    found = promote("mine@2", "prod", store=two.store, base=base)
    assert (found.accepted, found.moved, found.candidate_value, found.current_value) == (False, False, 0.3, 0.7)
    assert "0.3 is worse than 0.7 of mine@1" in found.why
    assert two.prod() == 1
    assert two.log() == [("set", 1), ("refuse", 2)]
    assert dict(two.store.alias_history("mine", "prod")[-1].reason) == found.to_dict()


@pytest.mark.parametrize(("margin", "accepted"), [(0.39, False), (0.4, True), (1.0, True), (0, False)])
def test_the_margin_is_how_much_worse_it_may_be(two, base, margin: float, accepted: bool):
    two.store.alias("mine", "prod", 1)
    assert promote("mine@2", "prod", store=two.store, base=base, margin=margin).accepted is accepted
    assert two.prod() == (2 if accepted else 1)


def test_a_version_that_is_worse_by_just_the_margin_is_accepted(shelf, base):
    """0.4 - 0.3 is a little more than 0.1 in floating point."""
    data = shelf.rows("test.jsonl", {1: 4, 2: 1})
    shelf.put(1, data)
    shelf.put(2, data)
    shelf.store.alias("mine", "prod", 1)
    assert promote("mine@2", "prod", store=shelf.store, base=base, margin=0.3).accepted


def test_an_equal_version_is_no_worse(shelf, base):
    data = shelf.rows("test.jsonl", {1: 5, 2: 5})
    shelf.put(1, data)
    shelf.put(2, data)
    shelf.store.alias("mine", "prod", 1)
    assert promote("mine@2", "prod", store=shelf.store, base=base).accepted


@pytest.mark.parametrize("margin", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_margin_is_a_share(two, base, margin: float):
    with pytest.raises(Unsupported, match="margin"):
        promote("mine@2", "prod", store=two.store, base=base, margin=margin)
    assert two.log() == []


def test_the_same_version_is_not_measured_or_moved(two, monkeypatch):
    two.store.alias("mine", "prod", 1)
    monkeypatch.setattr(gate, "evaluate", lambda *_: pytest.fail("it was measured"))
    found = promote("mine:prod", "prod", store=two.store)
    assert (found.accepted, found.moved, found.why) == (True, False, "mine:prod names mine@1 already")
    assert two.log() == [("set", 1)]


def test_both_answer_the_candidates_rows(shelf, base):
    shelf.put(1, shelf.rows("old.jsonl", {1: 10}))
    shelf.put(2, shelf.rows("new.jsonl", {2: 6}))
    shelf.store.alias("mine", "prod", 1)
    found = promote("mine@2", "prod", store=shelf.store, base=base)
    assert (found.candidate_value, found.data) == (0.6, str(shelf.folder / "new.jsonl"))
    assert found.current_value < 0.6
    assert found.accepted


def test_other_rows_can_be_given(two, base):
    two.store.alias("mine", "prod", 1)
    found = promote("mine@2", "prod", store=two.store, base=base, data=two.rows("other.jsonl", {2: 8}))
    assert (found.accepted, found.candidate_value) == (True, 0.8)
    assert found.data_sha256 == read_jsonl(two.folder / "other.jsonl").sha256


def test_validation_rows_do_where_there_are_no_test_rows(shelf, base):
    shelf.put(1, shelf.rows("validation.jsonl", {1: 4}), split="validation")
    assert promote("mine", "prod", store=shelf.store, base=base).candidate_value == 0.4


def test_a_version_without_rows_is_not_decided_on(shelf, two):
    shelf.put(3, None)
    with pytest.raises(DataError, match=r"mine@3 was made without test data.*--data"):
        promote("mine@3", "prod", store=shelf.store)
    (shelf.folder / "test.jsonl").write_text('{"q": "x", "a": "y"}')
    with pytest.raises(DataError, match=r"has changed.*--data"):
        promote("mine@1", "prod", store=shelf.store)
    assert shelf.log() == []


def test_metrics_are_those_of_its_task(two, base, monkeypatch):
    monkeypatch.setattr(gate, "load_own_base", lambda *_, **__: pytest.fail("a base was loaded for nothing"))
    with pytest.raises(Unsupported, match=r"not measured by 'rouge'.*exact_match"):
        promote("mine@1", "prod", store=two.store, metric="rouge")
    assert promote("mine@1", "prod", store=two.store, base=base, metric="exact_match").metric == "exact_match"


def test_the_chosen_metric_decides(shelf, tiny_base):
    base = tiny_base("bert")
    task = {"type": "classify", "text": "t", "label": "y", "labels": ["x", "y", "z"]}
    texts = [f"text {i * i}" for i in range(30)]
    runtime = Runtime(base, shelf.store)
    said = []
    for seed in (1, 2):
        ref = runtime.attach(build.lora(base, seed), make_task(task))
        said.append([p.label for p in runtime.predict(texts, ref)])
    runtime.close()
    path = shelf.folder / "labels.jsonl"
    path.write_text("\n".join(json.dumps({"t": t, "y": said[i % 3 == 0][i]}) for i, t in enumerate(texts)))
    for seed in (1, 2):
        shelf.put(seed, path, base=base, task=task)
    figures = [make_task(task).metrics(read_jsonl(path), answers) for answers in said]
    for metric in ("accuracy", "macro_f1"):
        shelf.store.alias("mine", "prod", 1)
        found = promote("mine@2", "prod", store=shelf.store, base=base, metric=metric)
        assert (found.current_value, found.candidate_value) == tuple(one[metric] for one in figures)
        assert found.accepted == (figures[1][metric] >= figures[0][metric])
    assert figures[0]["accuracy"] not in (0.0, 1.0, figures[0]["macro_f1"], figures[1]["accuracy"])


def test_versions_of_different_tasks_are_not_compared(two, base, monkeypatch):
    task = {"type": "classify", "text": "q", "label": "a", "labels": ["x", "y"]}
    two.put(3, two.folder / "test.jsonl", task=task)
    two.store.alias("mine", "prod", 3)
    monkeypatch.setattr(gate, "evaluate", lambda *_: pytest.fail("it was measured"))
    found = promote("mine@1", "prod", store=two.store, base=base)
    assert (found.accepted, found.candidate_value) == (False, None)
    assert "mine@1 does instruct, mine@3 classify" in found.why
    assert two.log() == [("set", 3), ("refuse", 1)]


def test_a_card_without_task_cannot_be_decided_on(two, base):
    two.put(3, two.folder / "test.jsonl", task={})
    with pytest.raises(Unsupported, match="mine@3 names no task"):
        promote("mine@3", "prod", store=two.store, base=base)
    two.store.alias("mine", "prod", 3)
    found = promote("mine@1", "prod", store=two.store, base=base)
    assert not found.accepted
    assert "nothing known" in found.why


def test_names_are_checked_before_anything_is_loaded(two):
    for ref, alias, error in (("mine@1", "../x", InvalidName), ("mine@1", "3", InvalidName), ("mine@9", "p", NotFound)):
        with pytest.raises(error):
            promote(ref, alias, store=two.store)


# -- bases -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """The cards whose bases were loaded, in order."""
    seen = []
    load = gate.load_own_base

    def counted(card, **named):
        seen.append((card.base["name"], card.base["quantization"]))
        return load(card, **named)

    monkeypatch.setattr(gate, "load_own_base", counted)
    return seen


def test_one_base_is_loaded_once(two, loaded):
    two.store.alias("mine", "prod", 2)
    assert promote("mine@1", "prod", store=two.store, device="cpu").accepted
    assert len(loaded) == 1


def test_each_version_is_measured_on_its_own_base(shelf, tiny_base, loaded):
    """The second is right in all rows on its own base, which the first's is not."""
    other = tiny_base("llama", seed=7)
    on_other = Shelf(other, shelf.store, shelf.folder)
    shelf.put(1, shelf.rows("own.jsonl", {1: 9}))
    on_other.put(2, on_other.rows("other.jsonl", {2: 10}))
    shelf.store.alias("mine", "prod", 1)
    found = promote("mine@2", "prod", store=shelf.store, data=shelf.folder / "own.jsonl", device="cpu")
    assert (found.accepted, found.current_value) == (False, 0.9)
    found = promote("mine@2", "prod", store=shelf.store, base=other)
    assert (found.accepted, found.candidate_value) == (True, 1.0)
    assert [name for name, _ in loaded] == [other.name, shelf.base.name, shelf.base.name]


def test_another_quantisation_is_another_base(shelf, tiny_base, tiny_folder, loaded):
    folder = {"hidden_size": 64, "intermediate_size": 128}
    dense, packed = tiny_base("llama", **folder), tiny_base("llama", "nf4", **folder)
    path = shelf.folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"q": q, "a": "x"}) for q in QUESTIONS))
    shelf.put(1, path, base=packed)
    shelf.put(2, path, base=dense)
    shelf.store.alias("mine", "prod", 1)
    promote("mine@2", "prod", store=shelf.store, base=dense)
    assert loaded == [(packed.name, "nf4")]


# -- others at work ----------------------------------------------------------------------------------------------------


def touched(monkeypatch, *others):
    """Let somebody else do something to the store after each measurement of the next versions."""
    measured = gate.evaluate
    waiting = list(others)

    def evaluate(*arguments):
        found = measured(*arguments)
        if waiting:
            waiting.pop(0)()
        return found

    monkeypatch.setattr(gate, "evaluate", evaluate)


@pytest.fixture
def three(shelf):
    """Right in 1, 3 and 5 rows."""
    data = shelf.rows("test.jsonl", {1: 1, 2: 3, 3: 5})
    for seed in (1, 2, 3):
        shelf.put(seed, data)
    shelf.store.alias("mine", "prod", 1)
    return shelf


def test_an_alias_that_was_moved_meanwhile_is_decided_on_anew(three, base, monkeypatch):
    touched(monkeypatch, lambda: Store(three.store.path).alias("mine", "prod", 3, event="promote"))
    found = promote("mine@2", "prod", store=three.store, base=base)
    assert (found.accepted, found.current, found.current_value) == (False, 3, 0.5)
    assert three.prod() == 3
    assert three.log() == [("set", 1), ("promote", 3), ("refuse", 2)]


def test_an_alias_that_was_moved_at_the_last_moment_is_decided_on_anew(three, base, monkeypatch):
    kept = three.store.alias

    def late(*arguments, **named):
        if len(three.log()) == 1:
            Store(three.store.path).alias("mine", "prod", 3)
        return kept(*arguments, **named)

    monkeypatch.setattr(three.store, "alias", late)
    assert not promote("mine@2", "prod", store=three.store, base=base).accepted
    assert three.log() == [("set", 1), ("set", 3), ("refuse", 2)]


def test_somebody_elses_refusal_changes_nothing(three, base, monkeypatch):
    touched(monkeypatch, lambda: Store(three.store.path).refuse("mine", "prod", 3, {}))
    found = promote("mine@2", "prod", store=three.store, base=base)
    assert (found.accepted, found.current) == (True, 1)
    assert three.log() == [("set", 1), ("refuse", 3), ("promote", 2)]


def test_somebody_else_who_promotes_the_same_version_is_enough(three, base, monkeypatch):
    touched(monkeypatch, lambda: Store(three.store.path).alias("mine", "prod", 2, event="promote"))
    found = promote("mine@2", "prod", store=three.store, base=base)
    assert (found.accepted, found.moved) == (True, False)
    assert three.log() == [("set", 1), ("promote", 2)]


def test_a_refusal_is_not_kept_against_a_version_that_the_alias_names_no_more(three, base, monkeypatch):
    three.store.alias("mine", "prod", 3)
    touched(monkeypatch, lambda: Store(three.store.path).alias("mine", "prod", 1, event="rollback"))
    found = promote("mine@2", "prod", store=three.store, base=base)
    assert (found.accepted, found.current) == (True, 1)
    assert three.prod() == 2


def test_an_alias_that_never_rests_is_left_alone(three, base, monkeypatch):
    state = gate._state

    def restless(*arguments):
        Store(three.store.path).alias("mine", "prod", 1)
        return state(*arguments)

    monkeypatch.setattr(gate, "_state", restless)
    with pytest.raises(StoreError, match="touched 5 times"):
        promote("mine@2", "prod", store=three.store, base=base)
    assert {event for event, _ in three.log()} == {"set"}


def test_a_full_disk_is_said_and_not_tried_again(three, base, monkeypatch):
    def full(*_, **__):
        raise StoreFull("no space")

    monkeypatch.setattr(three.store, "alias", full)
    with pytest.raises(StoreFull):
        promote("mine@2", "prod", store=three.store, base=base)
    assert three.log() == [("set", 1)]


def test_the_decision_is_plain(two, base):
    found = promote("mine@1", "prod", store=two.store, base=base)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert replace(found, accepted=False).moved is False


# -- figures that were measured before ---------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """The versions that were measured, in order."""
    seen = []
    evaluate = gate.evaluate

    def counted(runtime, task, rows, ref, *more):
        seen.append(str(ref))
        return evaluate(runtime, task, rows, ref, *more)

    monkeypatch.setattr(gate, "evaluate", counted)
    return seen


def trained_card(value: float, **metrics: float) -> dict[str, object]:
    return {"origin": {"kind": "trained"}, "metrics": {"test": {"exact_match": value, **metrics}}}


@pytest.fixture
def trained(shelf):
    """mine@1 and mine@2 as training leaves them: with figures of their own test data, right in 7 and 3 of 10 rows."""
    data = shelf.rows("test.jsonl", {1: 7, 2: 3})
    shelf.put(1, data, **trained_card(0.7), created="2026-01-01T00:00:00Z")
    shelf.put(2, data, **trained_card(0.3), created="2026-02-01T00:00:00Z")
    return shelf


def test_figures_of_the_training_are_not_measured_again(trained, measured, monkeypatch):
    monkeypatch.setattr(gate, "load_own_base", lambda *_, **__: pytest.fail("a base was loaded"))
    first = promote("mine@2", "prod", store=trained.store)
    assert (first.moved, first.candidate_value) == (True, 0.3)
    assert (first.candidate_figure.source, first.candidate_figure.time) == ("card", "2026-02-01T00:00:00Z")
    found = promote("mine@1", "prod", store=trained.store)
    assert (found.candidate_value, found.current_value, found.moved) == (0.7, 0.3, True)
    assert "0.7 is better than 0.3 of mine@2" in found.why
    assert measured == []


def test_a_recorded_figure_says_what_a_new_one_does(trained, base, measured):
    """The recorded ones are told apart by being wrong: 0.7 and 0.3 are right."""
    data = trained.folder / "test.jsonl"
    trained.put(1, data, **trained_card(0.25))
    assert promote("mine@3", "a", store=trained.store).candidate_value == 0.25
    found = promote("mine@3", "b", store=trained.store, base=base, again=True)
    assert (found.candidate_value, found.candidate_figure.source) == (0.7, "now")
    assert measured == ["mine@3"]


def test_an_earlier_decision_is_not_measured_again(two, base, measured, loaded):
    first = promote("mine@2", "prod", store=two.store, base=base)
    assert first.candidate_figure.source == "now"
    promote("mine@1", "prod", store=two.store, base=base)
    assert measured == ["mine@2", "mine@1"]
    again = promote("mine@2", "prod", store=two.store, margin=1)
    assert (again.candidate_figure.source, again.current_figure.source) == ("log", "log")
    assert (again.candidate_value, again.current_value) == (0.3, 0.7)
    assert again.candidate_figure.time == first.candidate_figure.time
    other = promote("mine@1", "other", store=two.store)
    assert (other.candidate_value, other.candidate_figure.source) == (0.7, "log")
    assert (measured, loaded) == (["mine@2", "mine@1"], [])


def test_only_what_is_missing_is_measured(trained, base, measured):
    trained.put(3, trained.folder / "test.jsonl")
    trained.store.alias("mine", "prod", 2)
    found = promote("mine@3", "prod", store=trained.store, base=base, margin=1)
    assert (found.candidate_figure.source, found.current_figure.source) == ("now", "card")
    assert measured == ["mine@3"]


def test_other_rows_are_measured(trained, base, measured):
    found = promote("mine@1", "prod", store=trained.store, base=base, data=trained.rows("new.jsonl", {1: 9}))
    assert (found.candidate_value, measured) == (0.9, ["mine@1"])
    again = promote("mine@1", "other", store=trained.store, data=trained.rows("new.jsonl", {1: 8}))
    assert (again.candidate_value, measured) == (0.8, ["mine@1", "mine@1"])


def test_another_base_is_measured(shelf, tiny_base, measured):
    """The card's figure is of the dense base; the one that is given is quantised."""
    wide = {"hidden_size": 64, "intermediate_size": 128}
    dense, packed = tiny_base("llama", **wide), tiny_base("llama", "nf4", **wide)
    data = Shelf(dense, shelf.store, shelf.folder).rows("test.jsonl", {1: 10})
    shelf.put(1, data, base=dense, **trained_card(0.123))
    shelf.put(2, data, base=dense, **trained_card(0.456))
    shelf.store.alias("mine", "prod", 2)
    found = promote("mine@1", "prod", store=shelf.store, base=packed)
    assert measured == ["mine@1", "mine@2"]
    assert {found.candidate_figure.base, found.current_figure.base} == {packed.fingerprint.digest}
    assert promote("mine@1", "other", store=shelf.store, base=dense).candidate_value == 0.123
    assert promote("mine@1", "third", store=shelf.store, base=packed).candidate_figure.source == "log"


def test_a_decision_on_another_base_is_no_evidence(shelf, tiny_base, measured):
    wide = {"hidden_size": 64, "intermediate_size": 128}
    dense, packed = tiny_base("llama", **wide), tiny_base("llama", "nf4", **wide)
    shelf.put(1, Shelf(dense, shelf.store, shelf.folder).rows("test.jsonl", {1: 10}), base=dense)
    for alias, base in (("a", packed), ("b", dense), ("c", dense)):
        found = promote("mine@1", alias, store=shelf.store, base=base)
        assert found.candidate_figure.base == base.fingerprint.digest
    assert measured == ["mine@1", "mine@1"]
    assert found.candidate_value == 1.0


def test_another_judge_or_metric_is_measured(trained, base, measured):
    task = {**TASK, "system": "Answer."}
    trained.put(3, trained.folder / "test.jsonl", task=task, **trained_card(0.9))
    trained.store.alias("mine", "prod", 2)
    found = promote("mine@3", "prod", store=trained.store, base=base)
    assert (found.candidate_value, found.current_figure.source, measured) == (0.9, "now", ["mine@2"])
    trained.put(1, trained.folder / "test.jsonl", origin={"kind": "trained"}, metrics={"test": {"loss": 0.5}})
    assert promote("mine@4", "x", store=trained.store, base=base).candidate_figure.source == "now"


@pytest.mark.parametrize("origin", [{"kind": "imported"}, {"kind": "found"}, {}])
def test_figures_of_another_origin_are_no_evidence(shelf, base, measured, origin):
    shelf.put(1, shelf.rows("test.jsonl", {1: 4}), **{**trained_card(1.0), "origin": origin})
    assert promote("mine@1", "prod", store=shelf.store, base=base).candidate_value == 0.4
    assert measured == ["mine@1"]


def test_what_an_imported_version_claims_is_no_evidence(shelf, base, measured, tmp_path):
    """Its card says that it was trained and is right in all rows; the current one is right in 7."""
    data = shelf.rows("test.jsonl", {1: 7, 2: 3})
    shelf.put(1, data, **trained_card(0.7))
    liar = Shelf(base, Store(tmp_path / "liar"), shelf.folder)
    out = liar.store.export(liar.put(2, data, **trained_card(1.0)), tmp_path / "out.tar")
    shelf.store.import_(out, "mine")
    shelf.store.alias("mine", "prod", 1)
    found = promote("mine@2", "prod", store=shelf.store, base=base, data=data)
    assert (found.accepted, found.candidate_value, found.current_value) == (False, 0.3, 0.7)
    assert measured == ["mine@2"]
    again = promote("mine@2", "prod", store=shelf.store, base=base, data=data)
    assert (again.candidate_value, again.candidate_figure.source) == (0.3, "log")


def test_a_foreign_version_without_fingerprint_is_found_in_the_log(two, base, measured, tmp_path, monkeypatch):
    """Its base must be loaded to know which one it is; the rows are not answered again."""
    monkeypatch.setattr(gate, "load_own_base", lambda *_, **__: base)
    files = {f: two.store.folder("mine@1") / f for f in ("adapter_config.json", "adapter_model.safetensors")}
    (tmp_path / "peft").mkdir()
    for name, path in files.items():
        (tmp_path / "peft" / name).write_bytes(path.read_bytes())
    card = two.store.card(two.store.import_(tmp_path / "peft", "x"))
    two.store.put("mine", dict(files), replace(card, task=TASK))
    data = two.folder / "test.jsonl"
    for source in ("now", "log"):
        found = promote("mine@3", source, store=two.store, data=data)
        assert (found.candidate_figure.source, found.candidate_value) == (source, 0.7)
    assert measured == ["mine@3"]


@pytest.mark.parametrize(
    "figure",
    [None, {}, {"value": True}, {"value": 2.0}, {"value": "0.9"}, {"value": 0.9, "digest": "0" * 64}, {"value": 0.9}],
)
def test_a_log_that_says_nonsense_is_no_evidence(two, base, measured, figure):
    kept = promote("mine@1", "prod", store=two.store, base=base).to_dict()
    two.store.alias("mine", "prod", 1, event="set")
    two.store.unalias("mine", "prod")
    fresh = Store(two.store.path)
    told = {**kept, "candidate_figure": figure}
    name = {"value": 0.9, "digest": kept["candidate_figure"]["digest"], "base": kept["candidate_figure"]["base"]}
    fresh.alias("mine", "odd", 1, event="promote", reason={**told, "judge": "another", "current_figure": name})
    fresh.alias("mine", "odd", 1, event="promote", reason=told)
    measured.clear()
    assert promote("mine@1", "new", store=fresh, base=base).candidate_value == 0.7
    assert measured == ["mine@1"]


@pytest.mark.parametrize(
    ("own", "now", "margin", "accepted", "words"),
    [
        (0.7, 0.3, 0.0, True, "0.7 is better than 0.3 of x"),
        (0.5, 0.5, 0.0, True, "0.5 equals that of x"),
        (0.1, 0.3, 0.3, True, "0.1 is worse than 0.3 of x by 0.2, within the margin of 0.3"),
        (0.1, 0.7, 0.3, False, "0.1 is worse than 0.7 of x by 0.6, more than the margin of 0.3"),
        (0.1, 0.7, 0.0, False, "0.1 is worse than 0.7 of x"),
        (0.33333, 0.33334, 0.0, False, "0.33333 is worse than 0.33334 of x"),
    ],
)
def test_how_two_figures_compare_in_words(own: float, now: float, margin: float, accepted: bool, words: str):
    assert gate._compared(own, now, "of x", margin) == (accepted, words)
