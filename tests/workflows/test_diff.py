"""What differs between two stored versions: cards, weights, recorded and live answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.adapters.compare import compare
from adapterhub_lite.bases.fetch import BaseSource
from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import NotFound, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.recipe import Recipe
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.registry import make_task
from adapterhub_lite.tasks.rows import read_jsonl
from adapterhub_lite.workflows import diff as workflow
from adapterhub_lite.workflows.diff import changes, diff
from adapterhub_lite.workflows.difference import Change, ChangedAnswer, DataChange
from adapterhub_lite.workflows.train import base_summary, train
from tests.training import recipes

LORA: dict[str, Any] = {"type": "lora", "rank": 2, "alpha": 4}


@dataclass(frozen=True)
class Shelf:
    """A store with `tiny@1` and `tiny@2`, both of `plan` with other ranks and steps, and what they were made from."""

    store: Store
    base: Base
    plan: Recipe
    folder: Path

    def put(self, ref: str = "tiny@1", name: str = "tiny", **changed: Any) -> Ref:
        """One more version of the same files, with another card."""
        files = {f: self.store.folder(ref) / f for f in ("adapter_config.json", "adapter_model.safetensors")}
        return self.store.put(name, dict(files), replace(self.store.card(ref), **changed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Any) -> Shelf:
    folder, base = tmp_path_factory.mktemp("diff"), tiny_base("llama")
    store = Store(folder / "store")
    plan = recipes.load(folder, base, LORA)
    train(plan, store=store, base=base)
    train(recipes.load(folder, base, {**LORA, "rank": 3}, {"learning_rate": 0.5}), store=store, base=base)
    return Shelf(store, base, plan, folder)


@pytest.fixture
def shelf(made: Shelf) -> Iterator[Shelf]:
    """The shelf; versions that a test adds are removed after it, and moved data is put back."""
    before = {(e.name, e.version) for e in made.store.list()}
    data = {path: path.read_bytes() for path in made.folder.glob("*.jsonl")}
    yield made
    for path, content in data.items():
        path.write_bytes(content)
    for entry in made.store.list():
        if (entry.name, entry.version) not in before:
            made.store.remove(f"{entry.name}@{entry.version}", force=True)


def moved(card: Card, split: str = "test", **facts: Any) -> dict[str, Any]:
    """The card's data with other facts of one split."""
    return {**card.data, split: {**card.data[split], **facts}}


def test_training_records_examples_of_the_measured_split(shelf: Shelf) -> None:
    runtime = Runtime(shelf.base, shelf.store)
    try:
        said = runtime.answer([row["prompt"] for row in read_jsonl(shelf.folder / "test.jsonl")], "tiny@1",
                              max_new_tokens=4)  # fmt: skip
    finally:
        runtime.close()
    card = shelf.store.card("tiny@1")
    assert card.examples == {"test": {"rows": [0, 1, 2, 3, 4], "answers": said}}
    assert card.schema == 2


def test_a_base_from_the_hub_is_recorded_with_its_commit(made: Shelf) -> None:
    assert not {"repo", "commit"} & set(base_summary(made.base))
    for origin, expected in (("hub org/name", ("org/name", "c" * 40)), ("wheel pack==1", (None, None))):
        source = BaseSource("some", made.base.source.folder, origin, "c" * 40)
        found = base_summary(replace(made.base, source=source))
        assert (found.get("repo"), found.get("commit")) == expected
        assert Card.from_bytes(Card(base=found).to_bytes()).base == found


def test_what_the_cards_say(shelf: Shelf) -> None:
    found = diff("tiny@1", "tiny", store=shelf.store)
    assert (found.a.ref, found.b.ref, found.a.type) == ("tiny@1", "tiny@2", "lora")
    assert found.a.digest == shelf.store.resolve("tiny@1").digest
    assert (found.same, found.same_weights, found.same_config) == (False, False, False)
    assert found.recipe == (Change("adapter.rank", 2, 3), Change("training.learning_rate", 0.05, 0.5))
    assert (found.recipe_note, found.base) == ("", ())
    assert [(one.split, one.same, one.a == one.b) for one in found.data] == [
        (split, True, True) for split in ("train", "validation", "test")
    ]
    assert set(found.data[0].a or {}) == {"source", "sha256", "rows"}
    paths = {change.path: (change.a, change.b) for change in found.made}
    assert paths["adapter.rank"] == (2, 3)
    # Runs this short can take the same milliseconds.
    assert set(paths) - {"duration_seconds"} == {"adapter.rank", "adapter.parameters", "adapter.bytes"}


def test_metrics_side_by_side(shelf: Shelf) -> None:
    card = shelf.store.card("tiny@1")
    other = shelf.put(
        metrics={"test": {"exact_match": 0.25, "sql_execution": 0.5}, "validation": {"exact_match": 1.0}},
        data=moved(card, "validation", sha256="0" * 64),
    )
    base = shelf.put(metrics={"test": {"exact_match": 0.75}, "validation": {"exact_match": 0.5}})
    found = diff(base, other, store=shelf.store).metrics
    assert [(one.split, one.name, one.a, one.b, one.delta, one.same_data) for one in found] == [
        ("validation", "exact_match", 0.5, 1.0, 0.5, False),
        ("test", "exact_match", 0.75, 0.25, -0.5, True),
        ("test", "sql_execution", None, 0.5, None, True),
    ]


def test_the_weights_are_those_of_the_files(shelf: Shelf) -> None:
    found = diff("tiny@1", "tiny@2", store=shelf.store)
    sides = [read_adapter(shelf.store.verified_folder(f"tiny@{i}")) for i in (1, 2)]
    assert found.weights == compare(*sides)
    assert found.weights_note == ""
    assert len(found.weights.modules if found.weights else ()) == 14


def test_the_same_version_and_the_same_weights(shelf: Shelf) -> None:
    shelf.store.alias("tiny", "prod", 1)
    same = diff("tiny:prod", "tiny@1", store=shelf.store)
    assert same.same
    assert (same.weights, same.made, same.recipe) == (None, (), ())
    again = diff("tiny@1", shelf.put(seed=9), store=shelf.store)
    assert (again.same, again.same_weights, again.same_config) == (False, True, True)
    assert again.made == (Change("seed", 0, 9),)
    assert again.weights is not None
    assert again.weights.whole[0].cosine == pytest.approx(1.0, abs=1e-12)


def test_different_types_are_said_and_skipped(shelf: Shelf) -> None:
    ref = train(recipes.load(shelf.folder, shelf.base, {"type": "prefix", "tokens": 2}), store=shelf.store,
                base=shelf.base, name="other")  # fmt: skip
    found = diff("tiny@1", ref, store=shelf.store)
    assert found.weights is None
    assert "tiny@1 is lora, other@1 is prefix" in found.weights_note
    assert Change("adapter.type", "lora", "prefix") in found.recipe


def test_recorded_answers_that_changed(shelf: Shelf) -> None:
    told = {"rows": [0, 2, 4], "answers": ["one", "two", "three"]}
    a = shelf.put(examples={"test": told})
    b = shelf.put(examples={"test": {"rows": [0, 1, 2, 4], "answers": ["one", "x", "zwei", "drei"]}})
    rows = read_jsonl(shelf.folder / "test.jsonl")
    (found,) = diff(a, b, store=shelf.store).answers
    assert (found.split, found.live, found.compared, found.note) == ("test", False, 3, "")
    assert found.changed == (
        ChangedAnswer(2, "two", "zwei", rows[2]["prompt"], rows[2]["completion"]),
        ChangedAnswer(4, "three", "drei", rows[4]["prompt"], rows[4]["completion"]),
    )


def test_prompts_are_left_out_where_the_data_is_not_at_hand(shelf: Shelf) -> None:
    a = shelf.put(examples={"test": {"rows": [0, 99], "answers": ["one", "far"]}})
    b = shelf.put(examples={"test": {"rows": [0, 99], "answers": ["eins", "fern"]}})
    (there,) = diff(a, b, store=shelf.store).answers
    assert there.changed[0].prompt is not None
    assert there.changed[1] == ChangedAnswer(99, "far", "fern")  # a row that the file does not have
    test = shelf.folder / "test.jsonl"
    test.write_bytes(test.read_bytes() + b'\n{"prompt": "more", "completion": "more"}')
    (changed,) = diff(a, b, store=shelf.store).answers
    test.unlink()
    (gone,) = diff(a, b, store=shelf.store).answers
    assert changed.changed[0] == gone.changed[0] == ChangedAnswer(0, "one", "eins")


def test_nothing_is_fetched_to_show_a_prompt(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: Any) -> None:
        raise AssertionError("a data set was asked for")

    monkeypatch.setattr("adapterhub_lite.workflows.data.read_hub", fetched)
    card = shelf.store.card("tiny@1")
    assert card.recipe is not None
    hub = {"hub": "org/rows", "split": "test", "config": None, "revision": None}
    facts = {
        "data": {"test": {"source": "org/rows:test", "sha256": "1" * 64, "rows": 5}},
        "recipe": {**card.recipe, "data": {**card.recipe["data"], "test": hub}},
    }
    a = shelf.put(examples={"test": {"rows": [0], "answers": ["one"]}}, **facts)
    b = shelf.put(examples={"test": {"rows": [0], "answers": ["two"]}}, **facts)
    (found,) = diff(a, b, store=shelf.store).answers
    assert found.changed == (ChangedAnswer(0, "one", "two"),)


def test_answers_to_other_rows_are_not_compared(shelf: Shelf) -> None:
    card = shelf.store.card("tiny@1")
    other = shelf.put(data=moved(card, sha256="0" * 64))
    (found,) = diff("tiny@1", other, store=shelf.store).answers
    assert (found.compared, found.changed, found.note) == (0, (), "recorded on different rows")
    data = diff("tiny@1", other, store=shelf.store).data
    assert data[2] == DataChange("test", False, data[2].a, {**(data[2].a or {}), "sha256": "0" * 64})
    nowhere = shelf.put(data={})
    assert diff(nowhere, shelf.put(data={}, seed=5), store=shelf.store).answers[0].note == "recorded on different rows"
    silent = shelf.put(examples={})
    assert diff(silent, "tiny@1", store=shelf.store).answers[0].note == "only tiny@1 has recorded some"
    assert diff(silent, shelf.put(examples={}, seed=5), store=shelf.store).answers == ()


def test_an_imported_version_has_no_recipe(shelf: Shelf, tmp_path: Path) -> None:
    shelf.store.export("tiny@1", tmp_path / "out")
    for file in ("card.json", "manifest.json"):
        (tmp_path / "out" / file).unlink()
    foreign = shelf.store.import_(tmp_path / "out", "foreign")
    found = diff("tiny@1", foreign, store=shelf.store)
    assert (found.recipe, found.recipe_note, found.same_weights) == ((), "only tiny@1 has one", True)
    assert Change("origin.kind", "trained", "imported") in found.made
    assert diff(foreign, shelf.put(recipe=None), store=shelf.store).recipe_note == "neither has one"


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """Runtimes that were closed."""
    found: list[Runtime] = []
    close = Runtime.close
    monkeypatch.setattr(Runtime, "close", lambda self: (found.append(self), close(self))[1])
    return found


def test_both_answer_live(shelf: Shelf, closed: list[Runtime]) -> None:
    before = shelf.base.live_digest()
    found = diff("tiny@1", "tiny@2", store=shelf.store, base=shelf.base, outputs=3)
    recorded, live = found.answers
    assert (live.live, live.split, live.compared, live.note) == (True, "test", 3, "")
    cards = [shelf.store.card(f"tiny@{i}").examples["test"]["answers"] for i in (1, 2)]
    rows = read_jsonl(shelf.folder / "test.jsonl")
    assert live.changed == tuple(
        ChangedAnswer(i, cards[0][i], cards[1][i], rows[i]["prompt"], rows[i]["completion"])
        for i in (0, 1, 3)
        if cards[0][i] != cards[1][i]
    )
    assert live.changed
    assert recorded.compared == 5
    assert shelf.base.live_digest() == before
    assert len(closed) == 1
    more = diff("tiny@1", "tiny@2", store=shelf.store, base=shelf.base, outputs=99).answers[1]
    assert (more.compared, more.changed) == (5, recorded.changed)


def test_a_version_without_task_is_asked_as_the_other(shelf: Shelf) -> None:
    bare = shelf.put("tiny@2", task={}, examples={}, recipe=None, data={})
    for pair in ((bare, "tiny@1"), ("tiny@1", bare)):
        live = diff(*pair, store=shelf.store, base=shelf.base, outputs=5).answers[-1]
        both = [shelf.store.card(ref).examples["test"]["answers"] for ref in ("tiny@2", "tiny@1")]
        sides = both if pair[0] is bare else both[::-1]
        assert [(one.a, one.b) for one in live.changed] == [
            pair for pair in zip(*sides, strict=True) if pair[0] != pair[1]
        ]
        assert live.changed[0].prompt is not None
    nobody = shelf.put(task={})
    refused = diff(bare, nobody, store=shelf.store, base=shelf.base, outputs=1)
    assert "names a task" in refused.outputs_refused


def test_different_bases_are_refused_before_one_is_loaded(
    shelf: Shelf, tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: list[Runtime]
) -> None:
    other = tiny_base("gpt2")
    ref = train(recipes.load(tmp_path, other, LORA), store=shelf.store, base=other, name="apart")
    monkeypatch.setattr(workflow, "load_own_base", lambda *_, **__: pytest.fail("a base was loaded"))
    found = diff("tiny@1", ref, store=shelf.store, outputs=2)
    assert re.match(r"tiny@1 was made for .*apart@1 was made for .*weights and config", found.outputs_refused)
    assert not any(answers.live for answers in found.answers)
    assert replace(found, outputs_refused="") == diff("tiny@1", ref, store=shelf.store)
    assert {"fingerprint.weights", "fingerprint.config", "name"} <= {change.path for change in found.base}
    silent = shelf.put("apart@1", base={}, name="silent")  # only the live base can tell that it does not fit
    assert "this base" in diff("tiny@1", silent, store=shelf.store, base=shelf.base, outputs=2).outputs_refused
    assert len(closed) == 2  # the first when apart@1 was measured


def test_live_answers_need_the_rows(shelf: Shelf) -> None:
    (shelf.folder / "test.jsonl").unlink()
    live = diff("tiny@1", "tiny@2", store=shelf.store, base=shelf.base, outputs=2).answers[-1]
    assert live.split == "validation"
    (shelf.folder / "validation.jsonl").unlink()
    moved = diff("tiny@1", "tiny@2", store=shelf.store, base=shelf.base, outputs=2)
    assert "not where it was" in moved.outputs_refused
    assert moved.weights is not None


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_other_columns_are_refused_before_the_base_is_loaded(shelf: Shelf, column: str) -> None:
    def load() -> Base:
        pytest.fail("the base was loaded")

    task = {**shelf.store.card("tiny@1").task, column: "elsewhere"}
    other = shelf.put("tiny@2", task=task)
    plain = diff("tiny@1", other, store=shelf.store)
    found = diff("tiny@1", other, store=shelf.store, base=load, outputs=2)
    assert f"tiny@1 and {other} read other columns" in found.outputs_refused
    assert "no field 'elsewhere'" in found.outputs_refused
    assert (plain.outputs_refused, plain.weights) == ("", found.weights)
    assert replace(found, outputs_refused="") == plain


def test_a_base_is_loaded_when_it_is_needed(shelf: Shelf) -> None:
    asked = []
    found = diff("tiny@1", "tiny@2", store=shelf.store, base=lambda: (asked.append(1), shelf.base)[1], outputs=1)
    assert (asked, found.outputs_refused, found.answers[-1].live) == ([1], "", True)


def test_classifiers_answer_with_labels(tmp_path: Path, tiny_base: Any) -> None:
    base, store = tiny_base("bert"), Store(tmp_path / "store")
    for rate in (0.01, 0.2):
        train(recipes.load(tmp_path, base, LORA, {"learning_rate": rate}), store=store, base=base)
    found = diff("tiny@1", "tiny@2", store=store, base=base, outputs=5)
    recorded, live = found.answers
    assert live.changed == recorded.changed
    assert {answer for one in live.changed for answer in (one.a, one.b)} <= {"even", "odd", "third"}
    task = make_task(store.card("tiny@1").task)
    rows = read_jsonl(tmp_path / "test.jsonl")
    assert [(one.prompt, one.reference) for one in live.changed] == [
        (task.inputs(rows)[one.row], rows[one.row]["label"]) for one in live.changed
    ]
    assert {one.part for one in found.weights.whole if found.weights} == {"delta", "head"}  # type: ignore[union-attr]


def test_bad_arguments(shelf: Shelf) -> None:
    with pytest.raises(Unsupported, match="-1 rows"):
        diff("tiny@1", "tiny@2", store=shelf.store, outputs=-1)
    with pytest.raises(NotFound):
        diff("tiny@1", "nothing", store=shelf.store)


def test_all_of_it_is_json(shelf: Shelf) -> None:
    found = diff("tiny@1", "tiny@2", store=shelf.store)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["recipe"][0] == {"path": "adapter.rank", "a": 2, "b": 3}
    assert told["metrics"][0]["delta"] == found.metrics[0].delta
    assert found.weights is not None
    assert told["weights"]["whole"][0]["cosine"] == found.weights.whole[0].cosine
    assert told["answers"][0]["compared"] == 5
    assert diff("tiny@1", "tiny@1", store=shelf.store).to_dict()["weights"] is None


def test_changes_of_nested_objects() -> None:
    a = {"x": 1, "same": [1], "deep": {"y": {"z": 2}, "w": None}, "list": [1, 2], "only": {"k": 0}, "a.b": 1}
    b = {"x": 2, "same": [1], "deep": {"y": {"z": 3}}, "list": [2, 1], "a.b": 2, "new": None}
    assert list(changes(a, b)) == [
        Change('"a.b"', 1, 2),
        Change("deep.y.z", 2, 3),
        Change("list", [1, 2], [2, 1]),
        Change("only.k", 0, None),
        Change("x", 1, 2),
    ]
    assert list(changes({"x": {"y": 1}}, {"x": 5})) == [Change("x", {"y": 1}, 5)]
