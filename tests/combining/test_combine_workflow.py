"""Stored versions combined and converted into new versions: what they do, what their cards say, where they work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import adapterhub_lite as ahl
from adapterhub_lite.adapters.adapter import stored_adapter
from adapterhub_lite.bases.load import Base
from adapterhub_lite.combining.combine import Options
from adapterhub_lite.errors import BaseMismatch, DataError, InvalidName, NoEffect, StoreError, Unsupported
from adapterhub_lite.events import Note, Progress, Stage
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.peft_config import parse_adapter_config
from adapterhub_lite.names import Ref
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.rows import read_jsonl
from adapterhub_lite.workflows.combine import combine, make_combined
from adapterhub_lite.workflows.combine_setting import Setting
from adapterhub_lite.workflows.conflicts import conflicts
from adapterhub_lite.workflows.convert import convert
from adapterhub_lite.workflows.data import split_rows
from adapterhub_lite.workflows.deep_verify import verify_deep
from adapterhub_lite.workflows.diff import diff
from adapterhub_lite.workflows.evaluate import evaluate
from adapterhub_lite.workflows.merge import merge
from adapterhub_lite.workflows.model_card import local_paths, model_card, without_local_paths
from adapterhub_lite.workflows.predict import predict_rows
from adapterhub_lite.workflows.promote import promote
from adapterhub_lite.workflows.train import train
from tests import peers
from tests.training import recipes

LORA: dict[str, Any] = {"type": "lora", "rank": 2, "alpha": 4}
OTHER: dict[str, Any] = {"type": "lora", "rank": 3, "alpha": 5, "targets": ["q_proj", "down_proj"]}
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Shelf:
    """A store with `sql@1` and `tone@1`, of other ranks, layers, test data and answer lengths, on one tiny base."""

    store: Store
    base: Base
    folder: Path

    def logits(self, adapter: Any) -> list[torch.Tensor]:
        runtime = Runtime(self.base, self.store)
        try:
            return runtime.logits(peers.ROWS, adapter)
        finally:
            runtime.close()

    def put(self, ref: str, name: str, **changed: Any) -> Ref:
        """A version of the same files with another card."""
        files = {file: self.store.folder(ref) / file for file in FILES}
        return self.store.put(name, dict(files), replace(self.store.card(ref), **changed))


def trained(store: Store, base: Base, folder: Path, name: str, adapter: dict[str, Any], **task: Any) -> Ref:
    """A version trained on data of its own folder; with `task` on other test rows, in another task."""
    folder.mkdir(exist_ok=True)
    path = recipes.write(folder, base, adapter)
    for part in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        both = [{**row, "reply": row["completion"]} for row in rows]
        if task and part == "test":  # rows that the other task cannot read
            both = [{key: row[key] for key in ("prompt", "reply")} for row in both[1:4]]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, both)))
    content = json.loads(path.read_text())
    content["task"] |= task
    path.write_text(json.dumps(content))
    return train(load_recipe(path), store=store, base=base, name=name)


def filled(folder: Path, base: Base) -> Shelf:
    """A store with sql@1 and tone@1, of unlike tasks."""
    store = Store(folder / "store")
    trained(store, base, folder / "sql", "sql", LORA)
    trained(store, base, folder / "tone", "tone", OTHER, max_new_tokens=3, completion="reply")
    return Shelf(store, base, folder)


def restored(made: Shelf) -> Iterator[Shelf]:
    """The shelf; what a test adds is removed after it."""
    before = {(e.name, e.version) for e in made.store.list()}
    yield made
    for entry in reversed(made.store.list()):
        if (entry.name, entry.version) not in before:
            made.store.remove(f"{entry.name}@{entry.version}", force=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Any) -> Shelf:
    return filled(tmp_path_factory.mktemp("combine"), tiny_base("llama"))


@pytest.fixture
def shelf(made: Shelf) -> Iterator[Shelf]:
    yield from restored(made)


def deltas(store: Store, ref: str | Ref) -> dict[str, torch.Tensor]:
    """Each module's whole change in float64, from the stored files."""
    tensors = load_file(store.folder(ref) / FILES[1])
    spec = stored_adapter(store.read(store.resolve(ref))).spec
    found = {}
    for key, down in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[key.replace("lora_A", "lora_B")]
            found[module] = spec.scaling(module, down.shape[0]) * up.double() @ down.double()
    return found


def brute(shelf: Shelf, weights: Mapping[str, float]) -> list[torch.Tensor]:
    """Logits of plain transformers with the weighted whole changes added to its weights."""
    model = peers.plain(shelf.base.source.folder, "CAUSAL_LM")
    for ref, weight in weights.items():
        for module, delta in deltas(shelf.store, ref).items():
            frozen = model.get_submodule(module).weight
            frozen.data = (frozen.data.double() + weight * delta).float()
    return peers.logits(model)


def test_the_package_has_them() -> None:
    assert (ahl.combine, ahl.convert, ahl.conflicts) == (combine, convert, conflicts)


# --- what it does ------------------------------------------------------------------------------------------------


def test_a_mix_is_the_base_plus_the_weighted_changes(shelf: Shelf) -> None:
    weights = {"sql@1": 0.7, "tone@1": -0.4}
    ref = combine(weights, store=shelf.store, base=shelf.base, name="less")
    assert str(ref) == "less@1"
    found = shelf.logits(ref)
    peers.assert_logits_equal(found, brute(shelf, weights), 2e-5)
    peers.assert_logits_equal(found, shelf.logits(weights), 2e-5)  # as a runtime mixes them
    assert max(float((a - b).abs().max()) for a, b in zip(found, shelf.logits(None), strict=True)) > 1e-2


@pytest.mark.parametrize(("method", "factors"), [("cat", (0.5, 0.5)), ("task_arithmetic", (1.0, 1.0))])
def test_weights_that_are_not_given(shelf: Shelf, method: str, factors: tuple[float, float]) -> None:
    ref = combine(["sql@1", "tone"], method, store=shelf.store, evaluate=False)
    assert (ref.name, shelf.store.card(ref).origin["weights"]) == ("sql-tone-mix", list(factors))
    peers.assert_logits_equal(
        shelf.logits(ref), brute(shelf, dict(zip(("sql@1", "tone@1"), factors, strict=True))), 2e-5
    )


def test_the_error_in_the_card_is_that_of_the_whole_matrices(shelf: Shelf) -> None:
    found = make_combined(
        ["sql@1", "tone@1"], "svd", Options(rank=2), Setting(shelf.store, evaluate=False), weights=[1.0, 1.0]
    )
    one, two, kept = (deltas(shelf.store, ref) for ref in ("sql@1", "tone@1", found.ref))
    exact = {m: one.get(m, 0.0) + two.get(m, torch.zeros(1, dtype=torch.float64)) for m in {*one, *two}}
    lost = sum(float((exact[m] - kept[m]).square().sum()) for m in exact)
    whole = sum(float(exact[m].square().sum()) for m in exact)
    told = shelf.store.card(found.ref).origin
    assert told["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert told["error"] > 0.01
    assert told["layers"]["count"] == len(exact)
    assert told["layers"]["rank"]["largest"] == 2
    worst = max(exact, key=lambda m: float((exact[m] - kept[m]).norm() / exact[m].norm()))
    assert told["layers"]["error"]["at"] == worst
    assert told["layers"]["error"]["largest"] == pytest.approx(
        float((exact[worst] - kept[worst]).norm() / exact[worst].norm()), rel=1e-4
    )


def test_peft_loads_it_with_the_same_logits(shelf: Shelf, tmp_path: Path) -> None:
    ref = combine({"sql@1": 1.0, "tone@1": 0.5}, "ties", store=shelf.store, base=shelf.base)
    shelf.store.export(ref, tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(peers.plain(shelf.base.source.folder, "CAUSAL_LM"), tmp_path / "peft")
    peers.assert_logits_equal(shelf.logits(ref), peers.logits(model.eval()), 2e-5)


# --- its card ----------------------------------------------------------------------------------------------------


def test_the_card_says_how_it_was_made(shelf: Shelf) -> None:
    ref = combine({"sql": 1.0, "tone": 0.5}, "dare_ties", store=shelf.store, base=shelf.base, density=0.6, seed=5)
    card, sql = shelf.store.card(ref), shelf.store.card("sql@1")
    assert card.parents == ["sql@1", "tone@1"]
    told = card.origin
    assert (told["kind"], told["method"], told["weights"]) == ("combined", "dare_ties", [1.0, 0.5])
    assert told["options"] == {"density": 0.6, "seed": 5, "majority_sign": "total"}
    assert told["members"] == [
        {"ref": name, "digest": shelf.store.resolve(name).digest, "weight": weight}
        for name, weight in (("sql@1", 1.0), ("tone@1", 0.5))
    ]
    assert 0 < told["error"] < 1
    assert (card.seed, card.recipe, "not_measured" in told) == (5, None, False)
    assert card.base == sql.base
    assert card.adapter["type"] == "lora"
    assert card.task == sql.task  # the heavier one's
    assert set(card.effect) == set(sql.effect)
    assert "torch" in card.libraries
    assert card.duration_seconds is not None


def test_data_is_kept_by_parent_where_they_differ(shelf: Shelf) -> None:
    card = shelf.store.card(combine({"sql@1": 1.0, "tone@1": 0.5}, store=shelf.store, base=shelf.base))
    sql, tone = (shelf.store.card(name) for name in ("sql@1", "tone@1"))
    assert card.data["train"]["sha256"] == sql.data["train"]["sha256"] == tone.data["train"]["sha256"]
    assert set(card.data) == {
        "train", "test", "test of sql@1", "test of tone@1", "validation", "validation of sql@1",
        "validation of tone@1",
    }  # fmt: skip
    assert card.data["test"] == sql.data["test"]
    assert card.data["test of tone@1"] == {**tone.data["test"], "task": tone.task}


def test_every_parents_test_set_is_answered_by_it_and_alone(shelf: Shelf) -> None:
    found = make_combined({"sql@1": 1.0, "tone@1": 0.5}, "linear", Options(), Setting(shelf.store, shelf.base))
    assert [(one.parent, one.split, one.rows, one.reason) for one in found.measured] == [
        ("sql@1", "test of sql@1", 5, ""),
        ("tone@1", "test of tone@1", 3, ""),
    ]
    for one in found.measured:
        alone = evaluate(one.parent, store=shelf.store, base=shelf.base, compare=False)
        assert one.alone == alone.metrics
        again = evaluate(found.ref, store=shelf.store, base=shelf.base, split=one.split, compare=False)
        assert (one.made, again.rows) == (again.metrics, one.rows)
        assert found.card.metrics[one.split] == one.made
    assert found.card.metrics["test"] == found.card.metrics["test of sql@1"]
    assert [one["parent"] for one in found.card.origin["measured"]] == ["sql@1", "tone@1"]
    rows = read_jsonl(shelf.folder / "tone" / "test.jsonl")
    runtime = Runtime(shelf.base, shelf.store)
    try:
        said = runtime.answer([row["prompt"] for row in rows], found.ref, max_new_tokens=3)
        alone_said = runtime.answer([row["prompt"] for row in rows], "tone@1", max_new_tokens=3)
    finally:
        runtime.close()
    assert found.card.examples["test of tone@1"]["answers"] == said  # with tone's length of answers
    assert said != alone_said
    assert found.card.examples["test"]["rows"] == [0, 1, 2, 3, 4]


def test_parents_that_agree_have_one_test_set(shelf: Shelf) -> None:
    twin = trained(shelf.store, shelf.base, shelf.folder / "sql", "twin", {**LORA, "rank": 3})
    found = make_combined(["sql@1", twin], "linear", Options(), Setting(shelf.store, shelf.base))
    assert set(found.card.data) == {"train", "validation", "test"}
    assert [(one.parent, one.split) for one in found.measured] == [("sql@1", "test"), ("twin@1", "test")]
    assert list(found.card.metrics) == ["test"]


def test_a_mix_of_mixes_is_measured_on_what_their_parents_were(shelf: Shelf) -> None:
    first = combine({"sql@1": 1.0, "tone@1": 0.5}, store=shelf.store, base=shelf.base, name="first")
    found = make_combined({"first": 0.5, "sql@1": 0.3}, "linear", Options(), Setting(shelf.store, shelf.base))
    assert found.card.parents == [str(first), "sql@1"]
    assert [(one.parent, one.split) for one in found.measured] == [
        ("first@1", "test of sql@1"), ("first@1", "test of tone@1"), ("sql@1", "test of sql@1"),
    ]  # fmt: skip
    assert {one.reason for one in found.measured} == {""}
    assert found.card.metrics["test"] == found.measured[0].made == found.measured[2].made
    peers.assert_logits_equal(shelf.logits(found.ref), brute(shelf, {"sql@1": 0.8, "tone@1": 0.25}), 2e-5)


def test_data_that_has_moved_is_told_and_ends_nothing(shelf: Shelf) -> None:
    moved = {**shelf.store.card("tone@1").data["test"], "path": str(shelf.folder / "gone.jsonl")}
    shelf.put("tone@1", "moved", data={"test": moved})
    shelf.put("sql@1", "none", data={})
    shelf.put("sql@1", "idle", task={})
    found = make_combined(
        ["sql@1", "moved@1", "none@1", "idle@1"], "linear", Options(), Setting(shelf.store, shelf.base)
    )
    reasons = {one.parent: one.reason for one in found.measured}
    assert reasons["sql@1"] == ""
    assert "is not at" in reasons["moved@1"]
    assert "without test data" in reasons["none@1"]
    assert "names no task" in reasons["idle@1"]
    assert found.card.effect


def test_events_say_how_it_goes(shelf: Shelf) -> None:
    events: list[Any] = []
    combine({"sql@1": 0.7, "tone@1": 0.3}, "ties", store=shelf.store, base=shelf.base, on_event=events.append)
    stages = [event.title for event in events if isinstance(event, Stage)]
    assert "combining 0.7 * sql@1 + 0.3 * tone@1 by ties" in stages
    titles = {event.title for event in events if isinstance(event, Progress)}
    assert "measuring sql-tone-mix on test of tone@1" in titles
    assert "measuring sql-tone-mix on test of sql@1: 5 rows (8 answers in all)" in stages
    assert not any("alone" in title for title in titles)  # the parents were measured when they were trained


# --- where it works ----------------------------------------------------------------------------------------------


def test_parents_stay_while_it_is_there(shelf: Shelf) -> None:
    ref = combine(["sql@1", "tone@1"], store=shelf.store, evaluate=False)
    for parent in ("sql@1", "tone@1"):
        with pytest.raises(StoreError, match=f"in use by {ref}"):
            shelf.store.remove(parent)
    assert [e.name for e in shelf.store.search("origin:combined parent:tone@1")] == ["sql-tone-mix"]


def test_it_is_used_as_any_version_is(shelf: Shelf, tmp_path: Path) -> None:
    store, base = shelf.store, shelf.base
    ref = combine({"sql@1": 1.0, "tone@1": 0.5}, store=store, base=base, name="mix")
    rows = read_jsonl(shelf.folder / "sql" / "test.jsonl")
    runtime = Runtime(base, store)
    try:
        answers = [row["answer"] for row in predict_rows(runtime, ref, rows)]
    finally:
        runtime.close()
    assert answers == store.card(ref).examples["test"]["answers"]
    assert evaluate(ref, store=store, base=base).metrics == store.card(ref).metrics["test"]
    assert verify_deep([ref], store=store) == ([], [])
    found = diff("sql@1", ref, store=store, base=base, outputs=3)
    assert (found.outputs_refused, found.recipe_note) == ("", "only sql@1 has one")
    assert found.weights is not None
    assert [one.name for one in found.metrics if one.split == "test" and one.same_data]
    decision = promote(ref, "prod", store=store, base=base)
    assert decision.accepted
    assert store.resolve("mix:prod").digest == ref.digest
    report = merge(ref, tmp_path / "merged", store=store, base=base)
    assert report.passed
    assert str(ref) in json.loads((tmp_path / "merged" / "merge_report.json").read_text())["adapter"]


def test_what_is_pushed_names_no_folder_of_this_machine(shelf: Shelf) -> None:
    ref = combine({"sql@1": 1.0, "tone@1": 0.5}, store=shelf.store, base=shelf.base)
    files = {path.name: path.read_bytes() for path in shelf.store.folder(ref).iterdir()}
    assert {"data.test.path", "data.test of tone@1.path", "base.name"} <= set(local_paths(files))
    pushed, digest = without_local_paths(files)
    assert local_paths(pushed) == []
    card = Card.from_bytes(pushed["card.json"])
    assert str(shelf.folder) not in pushed["card.json"].decode()
    text = model_card(card, parse_adapter_config(pushed["adapter_config.json"]), str(ref), digest, "me/mix")
    assert "test of tone@1" in text


def test_an_export_keeps_its_digest_and_leads_to_no_data_elsewhere(shelf: Shelf, tmp_path: Path) -> None:
    ref = combine({"sql@1": 1.0, "tone@1": 0.5}, store=shelf.store, base=shelf.base)
    shelf.store.export(ref, tmp_path / "mix.tar")
    other = Store(tmp_path / "other")
    got = other.import_(tmp_path / "mix.tar", "got")
    assert got.digest == ref.digest
    card = other.card(got)
    assert (card.origin["kind"], card.parents) == ("imported", [])
    assert all("path" not in facts for facts in card.data.values())
    assert [split_rows(card, split) for split in card.data] == [None] * len(card.data)
    with pytest.raises(DataError, match="not at"):
        evaluate(got, store=other, base=shelf.base)


def test_what_a_foreign_card_claims_is_not_followed_by_what_is_made_of_it(shelf: Shelf, monkeypatch: Any) -> None:
    """An imported version's base and data sets are names in a file; the mix is ours, and must not vouch for them."""
    mark = shelf.base.fingerprint.to_dict()
    foreign = {"name": "evil/base", "repo": "evil/base", "commit": "c" * 40, "revision": None, "fingerprint": mark}
    dataset = {"hub": "evil/data", "split": "test"}
    facts = {"source": "x", "sha256": "0" * 64, "rows": 1, "path": "/etc/passwd", "hub": dataset}
    for name, source in (("foreign", "sql@1"), ("strange", "tone@1")):
        shelf.put(source, name, base=foreign, data={"test": facts}, recipe=None, origin={"kind": "imported"})
    followed: list[Any] = []
    for reader in ("read_hub", "read_jsonl"):
        monkeypatch.setattr(f"adapterhub_lite.workflows.data.{reader}", lambda *given: followed.append(given))
    assert split_rows(shelf.store.card("foreign@1"), "test") is None
    found = make_combined(["foreign@1", "strange@1"], "linear", Options(), Setting(shelf.store))
    assert "evil/base" in found.not_measured
    assert "--base evil/base" in found.not_measured
    assert "evil" not in json.dumps({**found.card.base, "data": found.card.data})
    assert "/etc/passwd" not in json.dumps(found.card.data)
    assert found.card.base["fingerprint"] == mark
    with pytest.raises(DataError, match="not at x"):
        evaluate(found.ref, store=shelf.store)
    with pytest.raises(Unsupported, match="does not say which base"):
        evaluate(found.ref, store=shelf.store, data=shelf.folder / "sql" / "test.jsonl")
    assert followed == []
    assert shelf.logits(found.ref)  # on the base that somebody names


def test_a_dataset_of_the_hub_is_found_again_as_the_parent_found_it(shelf: Shelf, monkeypatch: Any) -> None:
    rows = replace(read_jsonl(shelf.folder / "sql" / "test.jsonl"), source="org/data:test", is_file=False)
    card = shelf.store.card("sql@1")
    assert card.recipe is not None
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("adapterhub_lite.workflows.data.read_hub", lambda *a: (asked.append(a), rows)[1])
    dataset = {"hub": "org/data", "split": "test", "config": None, "revision": "abc"}
    recipe = {**card.recipe, "data": {**card.recipe["data"], "test": dataset}}
    shelf.put("sql@1", "hubbed", recipe=recipe, data={"test": rows.summary()})
    found = make_combined(["hubbed@1", "tone@1"], "linear", Options(), Setting(shelf.store, shelf.base))
    assert found.measured[0].reason == ""
    asked.clear()
    again = evaluate(found.ref, store=shelf.store, base=shelf.base, split="test of hubbed@1", compare=False)
    assert asked == [("org/data", "test", None, "abc")]
    assert again.rows == 5


# --- without a base, and on the wrong one ------------------------------------------------------------------------


def test_without_its_base_it_is_stored_unmeasured(shelf: Shelf) -> None:
    gone = {**shelf.store.card("sql@1").base, "name": "/nowhere/base"}
    shelf.put("sql@1", "far", base=gone)
    shelf.put("tone@1", "away", base=gone)
    found = make_combined(["far@1", "away@1"], "linear", Options(), Setting(shelf.store))
    assert found.not_measured == "The base /nowhere/base is not on this disk; --base BASE names another place."
    assert (found.card.effect, found.card.metrics, found.measured) == ({}, {}, ())
    assert found.card.origin["not_measured"] == found.not_measured
    assert found.card.base == gone
    peers.assert_logits_equal(shelf.logits(found.ref), brute(shelf, {"sql@1": 0.5, "tone@1": 0.5}), 2e-5)


def test_a_base_that_has_changed_is_not_measured_on(shelf: Shelf, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(shelf.base.source.folder, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rope_theta": 999.0, "rms_norm_eps": 1e-3}))
    base = {**shelf.store.card("sql@1").base, "name": str(changed)}
    shelf.put("sql@1", "drifted", base=base)
    found = make_combined(["drifted@1"], "linear", Options(), Setting(shelf.store), weights=[0.5])
    assert "config differ" in found.not_measured
    with pytest.raises(BaseMismatch):
        combine(["drifted@1"], weights=[0.5], store=shelf.store, base=str(changed))


def test_its_own_base_is_loaded_where_it_is_on_the_disk(shelf: Shelf) -> None:
    found = make_combined(["sql@1", "tone@1"], "linear", Options(), Setting(shelf.store))
    assert (found.not_measured, len(found.measured)) == ("", 2)
    asked = make_combined(["sql@1", "tone@1"], "linear", Options(), Setting(shelf.store, evaluate=False))
    assert (asked.not_measured, asked.card.effect) == ("Measuring was turned off.", {})


def test_adapters_of_two_bases_are_refused(shelf: Shelf) -> None:
    base = shelf.store.card("tone@1").base
    mark = {**base["fingerprint"], "weights": "0" * 64}
    shelf.put("tone@1", "alien", base={**base, "name": "other", "fingerprint": mark})
    with pytest.raises(BaseMismatch, match=r"sql@1 was made for .*, alien@1 was made for other .*weights differ"):
        combine(["sql@1", "alien@1"], store=shelf.store)
    with pytest.raises(BaseMismatch):
        conflicts(["sql@1", "alien@1"], store=shelf.store)
    with pytest.raises(BaseMismatch, match="alien@1 was made for other"):
        combine(["sql@1", "alien@1"], store=shelf.store, base=shelf.base)


def test_an_adapter_of_unknown_base_needs_the_base_named(shelf: Shelf) -> None:
    unknown = {"name": "some/base", "fingerprint": {}}
    shelf.put("tone@1", "stray", base=unknown, origin={"kind": "imported"}, recipe=None)
    with pytest.raises(Unsupported, match=r"stray@1 tells no fingerprint.*--base some/base"):
        combine(["sql@1", "stray@1"], store=shelf.store)
    found = make_combined(
        {"sql@1": 0.5, "stray@1": 1.0}, "linear", Options(), Setting(shelf.store, str(shelf.base.source.folder))
    )
    assert found.card.base == {**shelf.store.card("sql@1").base, "name": str(shelf.base.source.folder)}
    assert found.card.effect
    peers.assert_logits_equal(shelf.logits(found.ref), brute(shelf, {"sql@1": 0.5, "tone@1": 1.0}), 2e-5)


def test_members_trained_in_other_precisions_are_told(shelf: Shelf) -> None:
    base = shelf.store.card("tone@1").base
    mark = {**base["fingerprint"], "quantization": "nf4"}
    shelf.put("tone@1", "coarse", base={**base, "quantization": "nf4", "fingerprint": mark})
    events: list[Any] = []
    combine(["sql@1", "coarse@1"], store=shelf.store, evaluate=False, on_event=events.append)
    notes = [event for event in events if isinstance(event, Note)]
    assert any("sql@1 on none, coarse@1 on nf4" in note.text and note.level == "warning" for note in notes)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (([],), {}, "No adapter is named"),
        ((["sql@1", "tone@1"],), {"weights": [1.0]}, "2 adapters have 1 weights"),
        ((["sql@1", "sql"],), {}, "sql is named twice, as sql@1"),
        (({"sql@1": 1.0},), {"weights": [1.0]}, "Weights are given twice"),
        (([("sql@1", 0.5), "tone@1"],), {}, "tone@1 has no weight"),
        ((["sql@1"],), {"weights": [float("nan")]}, "not a finite number"),
        ((["sql@1"],), {"weights": [True]}, "not a finite number"),
        ((["sql@1", "tone@1"], "tie"), {}, r"no method 'tie'.*Did you mean ties\?"),
        ((["sql@1", "tone@1"], "qwerty"), {}, r"no method 'qwerty'\. There are linear, cat"),
        ((["sql@1", "tone@1"],), {"rank": 2, "error": 0.1}, "both given"),
        ((["sql@1", "tone@1"],), {"rank": 0}, "A rank of 0"),
        ((["sql@1", "tone@1"],), {"error": 1.0}, "no relative error"),
        ((["sql@1"], "slerp"), {}, "takes 2 adapters"),
        ((["sql@1"],), {"head": "tone@1"}, "tone@1 is not among the adapters"),
        ((["sql@1", "tone@1"],), {"head": "sql@1"}, "has no head"),
        ((["sql@1"],), {"evaluate": False}, "sql@1 alone, with weight 1, would be stored again"),
        (({"sql@1": 1, "tone@1": 0},), {}, "With the weight 0 of tone@1, sql@1 alone"),
        ((["sql@1"], "magnitude_prune"), {"density": 1.0}, "sql@1 alone"),
        ((["sql@1"], "ties"), {"density": 0.0}, "no share of values"),
    ],
)
def test_what_is_refused_stores_nothing(shelf: Shelf, given: Any, options: dict[str, Any], message: str) -> None:
    before = shelf.store.list()
    with pytest.raises(Unsupported, match=message):
        combine(*given, store=shelf.store, **options)
    assert shelf.store.list() == before


def test_names_are_checked_before_the_work(shelf: Shelf) -> None:
    with pytest.raises(InvalidName):
        combine(["sql@1"], store=shelf.store, name="No Name")
    with pytest.raises(InvalidName):
        convert("sql@1", rank=1, store=shelf.store, name="../x")


def test_what_cancels_is_not_stored(shelf: Shelf) -> None:
    shelf.put("sql@1", "again", seed=77)
    with pytest.raises(NoEffect):
        combine({"sql@1": 1.0, "again@1": -1.0}, store=shelf.store, base=shelf.base)
    with pytest.raises(NoEffect):
        combine({"sql@1": 0.0, "tone@1": 0.0}, store=shelf.store)
    assert {e.name for e in shelf.store.list()} == {"sql", "tone", "again"}


def test_an_adapter_that_moves_no_logit_of_the_live_base_is_not_stored(shelf: Shelf, monkeypatch: Any) -> None:
    def nothing(*_: Any) -> Any:
        raise NoEffect("moves no logit")

    monkeypatch.setattr("adapterhub_lite.workflows.combine_measure.measure", nothing)
    before = shelf.store.list()
    with pytest.raises(NoEffect):
        combine(["sql@1", "tone@1"], store=shelf.store, base=shelf.base)
    assert shelf.store.list() == before


def test_a_mix_that_is_too_small_to_be_a_name_gets_a_shorter_one(shelf: Shelf) -> None:
    names = ["a" * 40, "b" * 40]
    for name, source in zip(names, ("sql@1", "tone@1"), strict=True):
        shelf.put(source, name)
    assert combine(names, store=shelf.store, evaluate=False).name == "a" * 40 + "-mix"
