"""On which rows a mix and its parents are measured, which figures are taken from before, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.combining.combine import Options
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.formats.card import spread
from adapterhub_lite.workflows import combine_measure
from adapterhub_lite.workflows import promote as gate
from adapterhub_lite.workflows.combine import combine, make_combined
from adapterhub_lite.workflows.combine_publish import Made
from adapterhub_lite.workflows.combine_setting import Setting
from adapterhub_lite.workflows.convert import convert, make_converted
from adapterhub_lite.workflows.diff import diff
from adapterhub_lite.workflows.evaluate import evaluate
from adapterhub_lite.workflows.promote import promote
from tests.combining.test_combine_workflow import Shelf, filled, restored

BOTH = {"sql@1": 1.0, "tone@1": 0.5}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Any) -> Shelf:
    return filled(tmp_path_factory.mktemp("measured"), tiny_base("llama"))


@pytest.fixture
def shelf(made: Shelf) -> Iterator[Shelf]:
    yield from restored(made)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who answered how many rows, in their order."""
    seen: list[tuple[str, int]] = []
    answer = combine_measure.evaluate

    def counted(runtime: Any, task: Any, rows: Any, adapter: Any, *more: Any) -> Any:
        seen.append((str(adapter), len(rows)))
        return answer(runtime, task, rows, adapter, *more)

    monkeypatch.setattr(combine_measure, "evaluate", counted)
    return seen


def mixed(shelf: Shelf, given: Any = None, **setting: Any) -> Made:
    return make_combined(given or BOTH, "linear", Options(), Setting(shelf.store, shelf.base, **setting))


def fresh(shelf: Shelf, ref: Any, rows: list[int], folder: Path) -> dict[str, float]:
    """Metrics on some rows of sql's test file, by `ahl eval` of a file of these alone."""
    lines = (shelf.folder / "sql" / "test.jsonl").read_text().splitlines()
    (folder / "some.jsonl").write_text("\n".join(lines[row] for row in rows))
    return evaluate(ref, store=shelf.store, base=shelf.base, data=folder / "some.jsonl", compare=False).metrics


def test_parents_that_were_measured_here_are_not_measured_again(shelf: Shelf, asked: list[Any]) -> None:
    found = mixed(shelf)
    assert [rows for _, rows in asked] == [5, 3]  # the mix alone, on both test sets
    for one in found.measured:
        card = shelf.store.card(one.parent)
        assert (one.alone, one.alone_since) == (card.metrics["test"], card.created)
        assert (one.rows, one.of_rows) == (card.data["test"]["rows"],) * 2
    known = dict.fromkeys(shelf.store.card("sql@1").metrics["test"], 0.777)
    shelf.put("sql@1", "known", metrics={"test": known})
    assert mixed(shelf, {"known@1": 0.5}).measured[0].alone == known


def test_claims_and_figures_of_another_base_are_not_taken(shelf: Shelf, asked: list[Any], tmp_path: Path) -> None:
    shelf.store.export("sql@1", tmp_path / "sql.tar")
    shelf.store.import_(tmp_path / "sql.tar", "got")
    card = shelf.store.card("sql@1")
    lies = {"test": dict.fromkeys(card.metrics["test"], 0.123)}
    packed = {**card.base, "fingerprint": {**card.base["fingerprint"], "digest": "0" * 64, "quantization": "nf4"}}
    shelf.put("sql@1", "packed", base=packed, metrics=lies)
    shelf.put("sql@1", "claimed", origin={"kind": "imported"}, metrics=lies)
    shelf.put("sql@1", "unmeasured", metrics={})
    names = ["packed@1", "claimed@1", "unmeasured@1"]
    found = mixed(shelf, names)
    assert [name for name, _ in asked if "@" in name] == names
    own = [one for one in found.measured if one.alone is not None]
    assert [one.alone for one in own] == [card.metrics["test"]] * 3
    assert {one.alone_since for one in own} == {""}
    (again,) = mixed(shelf, {"got@1": 0.5}).measured
    assert (again.alone, again.alone_since) == (None, "")


def test_some_rows_evenly_over_all(shelf: Shelf, asked: list[Any], tmp_path: Path) -> None:
    found = mixed(shelf, rows=2)
    chosen = spread(5, 2)
    assert chosen == [0, 2]
    assert [(one.parent, one.rows, one.of_rows, one.alone_since) for one in found.measured] == [
        ("sql@1", 2, 5, ""), ("tone@1", 2, 3, ""),
    ]  # fmt: skip
    assert sorted(rows for _, rows in asked) == [2, 2, 2, 2]
    sql = found.measured[0]
    assert sql.alone == fresh(shelf, "sql@1", chosen, tmp_path)
    assert sql.made == fresh(shelf, found.ref, chosen, tmp_path)
    part = "test of sql@1 (2 of 5 rows)"
    assert set(found.card.metrics) == {part, "test of tone@1 (2 of 3 rows)", "test (2 of 5 rows)"}
    assert found.card.metrics[part] == found.card.metrics["test (2 of 5 rows)"] == sql.made
    whole = mixed(shelf)
    examples, every = found.card.examples["test"], whole.card.examples["test"]
    assert examples == found.card.examples["test of sql@1"]
    assert examples["rows"] == chosen
    assert examples["answers"] == [every["answers"][every["rows"].index(row)] for row in chosen]
    told = found.card.origin["measured"][0]
    assert (told["rows"], told["of_rows"]) == (2, 5)


def test_figures_of_some_rows_are_not_compared_with_those_of_all(shelf: Shelf) -> None:
    some = mixed(shelf, rows=2)
    found = diff("sql@1", some.ref, store=shelf.store).metrics
    assert [one for one in found if one.a is not None]
    assert not [one for one in found if None not in (one.a, one.b)]
    recorded = next(one for one in diff("sql@1", some.ref, store=shelf.store).answers if one.split == "test")
    assert recorded.compared == 2


def test_a_mix_of_mixes_takes_their_figures_of_the_same_rows(shelf: Shelf, asked: list[Any]) -> None:
    first = mixed(shelf, rows=2)
    asked.clear()
    second = mixed(shelf, [(first.ref, 0.5)], rows=2)
    assert len(asked) == 2  # the new one, on two test sets
    assert [one.alone for one in second.measured] == [one.made for one in first.measured]
    asked.clear()
    third = mixed(shelf, [(first.ref, 0.5)], rows=4)
    assert [rows for _, rows in asked] == [4, 4, 3, 3]
    assert [one.alone_since for one in third.measured] == ["", ""]


def test_no_rows(shelf: Shelf, asked: list[Any]) -> None:
    found = mixed(shelf, rows=0)
    assert asked == []
    assert {one.reason for one in found.measured} == {"No rows were asked for."}
    assert (found.card.metrics, found.not_measured) == ({}, "")
    assert found.card.effect


@pytest.mark.parametrize("rows", [-1, 2.0, True, "10", None])
def test_what_is_no_number_of_rows(shelf: Shelf, rows: Any) -> None:
    for attempt in (
        lambda: combine(BOTH, store=shelf.store, base=shelf.base, rows=rows),
        lambda: convert("sql@1", rank=1, store=shelf.store, base=shelf.base, rows=rows),
    ):
        with pytest.raises(Unsupported, match="is no number of rows"):
            attempt()


def test_the_rest_takes_as_long_as_what_was_answered(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 50))
    monkeypatch.setattr(combine_measure.time, "perf_counter", lambda: float(next(clock)))
    events: list[Any] = []
    mixed(shelf, rows=2, on_event=events.append)
    said = [event.title for event in events if " answers " in getattr(event, "title", "")]
    assert said[0].endswith("alone: 2 rows (8 answers in all)")
    assert ": 2 rows (6 of 8 answers left, about " in said[1]


def test_an_interrupt_leaves_nothing_and_holds_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shelf.store.list()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(combine_measure, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mixed(shelf)
    assert shelf.store.list() == before
    assert shelf.store.verify() == []
    assert mixed(shelf).card.metrics  # the base is free


def test_conversions_too(shelf: Shelf, asked: list[Any]) -> None:
    found = make_converted("sql@1", Setting(shelf.store, shelf.base, rows=3), rank=1)
    assert [rows for _, rows in asked] == [3, 3]
    assert set(found.card.metrics) == {"test (3 of 5 rows)"}
    asked.clear()
    make_converted("sql@1", Setting(shelf.store, shelf.base), rank=1, name="whole")
    assert [rows for _, rows in asked] == [5]


# --- promoting what was measured -----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which versions were measured to promote."""
    seen: list[str] = []
    answer = gate.evaluate

    def counted(runtime: Any, task: Any, rows: Any, ref: Any, *more: Any) -> Any:
        seen.append(str(ref))
        return answer(runtime, task, rows, ref, *more)

    monkeypatch.setattr(gate, "evaluate", counted)
    return seen


def test_what_combine_measured_is_promoted_by_its_figures(shelf: Shelf, measured: list[str]) -> None:
    found = mixed(shelf)
    decision = promote(found.ref, "prod", store=shelf.store, base=shelf.base)
    assert measured == []
    assert decision.candidate_figure is not None
    assert decision.candidate_figure.source == "card"
    assert decision.candidate_value == found.card.metrics["test"][str(decision.metric)]
    known = shelf.put(str(found.ref), "known", metrics={"test": dict.fromkeys(found.card.metrics["test"], 0.777)})
    assert promote(known, "prod", store=shelf.store, base=shelf.base).candidate_value == 0.777
    again = promote(known, "other", store=shelf.store, base=shelf.base, again=True)
    assert (measured, again.candidate_value) == ([str(known)], decision.candidate_value)


def test_figures_of_some_rows_decide_nothing(shelf: Shelf, measured: list[str]) -> None:
    found = mixed(shelf, rows=2)
    decision = promote(found.ref, "prod", store=shelf.store, base=shelf.base)
    assert measured == [str(found.ref)]
    assert decision.rows == 5


def test_answers_in_a_parents_task_are_no_figures_of_its_own(shelf: Shelf, measured: list[str]) -> None:
    found = mixed(shelf)
    tone = shelf.folder / "tone" / "test.jsonl"
    both = [json.loads(line) for line in tone.read_text().splitlines()]
    assert all("completion" not in row for row in both)
    card = shelf.store.card("tone@1")
    task = {**found.card.task, "completion": "reply"}  # reads tone's rows, answers at sql's length
    assert task != card.task
    same = replace(found.card, task=task)
    ref = shelf.store.put("asked", {f: shelf.store.folder(found.ref) / f for f in
                                    ("adapter_config.json", "adapter_model.safetensors")}, same)  # fmt: skip
    promote(ref, "prod", store=shelf.store, base=shelf.base, data=tone)
    assert measured == [str(ref)]


def test_the_current_version_is_asked_in_its_own_task(shelf: Shelf, measured: list[str]) -> None:
    """It was measured on the candidate's rows, but as a parent's task asks them."""
    one = combine({"sql@1": 1.0, "tone@1": 0.5}, store=shelf.store, base=shelf.base)
    two = combine({"sql@1": 0.5, "tone@1": 1.0}, store=shelf.store, base=shelf.base)
    task = {**shelf.store.card(one).task, "completion": "reply"}  # it reads tone's rows, and answers at length
    current, candidate = shelf.put(str(one), "pair", task=task), shelf.put(str(two), "pair")
    assert [shelf.store.card(ref).task["max_new_tokens"] for ref in (current, candidate)] == [4, 3]
    assert "test of tone@1" in shelf.store.card(current).metrics
    shelf.store.alias("pair", "prod", current.version)
    decision = promote(candidate, "prod", store=shelf.store, base=shelf.base)
    assert measured == [str(current)]
    assert decision.rows == 3


def test_an_imported_mix_is_measured(shelf: Shelf, measured: list[str], tmp_path: Path) -> None:
    found = mixed(shelf)
    shelf.store.export(found.ref, tmp_path / "mix.tar")
    got = shelf.store.import_(tmp_path / "mix.tar", "got")
    promote(got, "prod", store=shelf.store, base=shelf.base, data=shelf.folder / "sql" / "test.jsonl")
    assert measured == [str(got)]
