"""Versions converted to LoRA, heads in mixes, and what needs a base's frozen weights, quantised or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save

from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.combining.combine import Options
from adapterhub_lite.errors import BaseMismatch, StoreError, Unsupported
from adapterhub_lite.events import Note
from adapterhub_lite.names import Ref
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.combine import combine, make_combined
from adapterhub_lite.workflows.combine_setting import Setting
from adapterhub_lite.workflows.conflicts import conflicts
from adapterhub_lite.workflows.convert import convert, make_converted
from adapterhub_lite.workflows.publish import base_summary
from adapterhub_lite.workflows.train import train
from tests import peers, tiny
from tests.training import recipes


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def logits(base: Base, store: Store, adapter: Any) -> list[torch.Tensor]:
    runtime = Runtime(base, store)
    try:
        return runtime.logits(peers.ROWS, adapter)
    finally:
        runtime.close()


def trained(store: Store, base: Base, folder: Path, name: str, adapter: dict[str, Any]) -> Ref:
    folder.mkdir(exist_ok=True)
    return train(recipes.load(folder, base, adapter), store=store, base=base, name=name)


def imported(store: Store, base: Base, folder: Path, family: str, name: str, settings: Any) -> tuple[Ref, Any]:
    """A PEFT adapter with random values, stored with the facts of its base; and PEFT's model."""
    model = peers.wrap(peers.plain(base.source.folder, peers.task_type(family)), settings)
    for key, parameter in model.named_parameters():
        if "ia3_" in key:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder / name, save_embedding_layers=False)
    return store.import_(folder / name, name, base_summary(base)), model


# --- ranks and errors --------------------------------------------------------------------------------------------


def test_a_smaller_rank_is_the_best_one_and_is_measured(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("llama")
    trained(store, base, tmp_path / "data", "sql", {"type": "lora", "rank": 6, "alpha": 12})
    found = make_converted("sql@1", Setting(store, base), rank=2)
    assert str(found.ref) == "sql-r2@1"
    card = found.card
    assert (card.parents, card.origin["kind"], card.origin["from"], card.origin["to"]) == (
        ["sql@1"], "converted", "lora", "lora",
    )  # fmt: skip
    assert card.origin["options"] == {"rank": 2}
    assert card.adapter["rank"] == 2
    lost = whole = 0.0
    before, after = (load_file(store.folder(ref) / "adapter_model.safetensors") for ref in ("sql@1", found.ref))
    for key in before:
        if key.endswith("lora_A.weight"):
            up = key.replace("lora_A", "lora_B")
            exact = 2 * before[up].double() @ before[key].double()
            values = torch.linalg.svdvals(exact)
            kept = after[up].double() @ after[key].double()
            assert float((exact - kept).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-3, abs=1e-7)
            lost, whole = lost + float((exact - kept).square().sum()), whole + float(exact.square().sum())
    assert card.origin["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert [(one.parent, one.split, one.reason) for one in found.measured] == [("sql@1", "test", "")]
    assert set(card.data) == {"train", "validation", "test"}
    assert list(card.metrics) == ["test"]
    with pytest.raises(StoreError, match="sql-r2@1"):
        store.remove("sql@1")
    assert store.verify() == []


def test_an_error_chooses_the_ranks(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("llama")
    trained(store, base, tmp_path / "data", "sql", {"type": "lora", "rank": 6, "alpha": 12})
    small, exact = convert("sql@1", error=0.5, store=store, base=base), convert("sql@1", store=store, evaluate=False)
    assert (small.name, exact.name, exact.version) == ("sql-lora", "sql-lora", 2)
    told = store.card(small).origin
    assert 0 < told["layers"]["error"]["largest"] <= 0.5
    assert store.card(small).adapter["parameters"] < store.card("sql@1").adapter["parameters"]
    assert store.card(exact).origin["error"] == pytest.approx(0, abs=1e-9)
    peers.assert_logits_equal(logits(base, store, exact), logits(base, store, "sql@1"), 1e-5)


def test_a_rank_that_it_has_already_is_refused(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("llama")
    trained(store, base, tmp_path / "data", "sql", {"type": "lora", "rank": 3, "alpha": 12})
    for rank in (3, 400):
        with pytest.raises(Unsupported, match="sql@1 has rank 3 already") as caught:
            convert("sql@1", rank=rank, store=store, evaluate=False)
        assert caught.value.hint == "Give less than 3; `ahl alias` gives it another name."
    assert [entry.name for entry in store.list()] == ["sql"]
    settings = peft.LoKrConfig(r=2, alpha=4, target_modules=["q_proj"], init_weights=False)
    ref, _ = imported(store, base, tmp_path, "llama", "other", settings)
    events: list[Any] = []
    found = make_converted(ref, Setting(store, base, evaluate=False, on_event=events.append), rank=1000)
    rank = found.card.adapter["rank"]
    assert 0 < rank < 1000
    assert found.ref.name == f"other-r{rank}"
    note = f"Rank {rank} holds all of it: rank 1000 was asked for."
    assert note in [event.text for event in events if isinstance(event, Note)]
    assert note in found.combined.notes


def test_a_large_error_is_warned_of(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("llama")
    trained(store, base, tmp_path / "data", "sql", {"type": "lora", "rank": 6, "alpha": 12})
    for error, warned in ((0.6, True), (0.05, False)):
        events: list[Any] = []
        found = make_converted("sql@1", Setting(store, base, evaluate=False, on_event=events.append), error=error)
        large = [event for event in events if isinstance(event, Note) and event.level == "warning"]
        assert (found.combined.error > 0.2) == warned == bool(large)
        assert found.card.origin["from_parameters"] == store.card("sql@1").adapter["parameters"]


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_methods_of_their_own_become_lora(store: Store, tiny_base: Any, tmp_path: Path, kind: str) -> None:
    base = tiny_base("llama")
    settings = getattr(peft, kind)(r=2, alpha=4, target_modules=["q_proj", "down_proj"], init_weights=False)
    ref, _ = imported(store, base, tmp_path, "llama", "other", settings)
    found = make_converted(ref, Setting(store, base))
    assert (found.card.origin["from"], found.card.adapter["type"]) == (kind.removesuffix("Config").lower(), "lora")
    peers.assert_logits_equal(logits(base, store, found.ref), logits(base, store, ref), 1e-4)


def test_a_prefix_stays_a_prefix(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("llama")
    settings = peers.config("llama", "prefix", "CAUSAL_LM")
    ref, _ = imported(store, base, tmp_path, "llama", "front", settings)
    for attempt in (lambda: convert(ref, rank=2, store=store), lambda: combine([ref], store=store)):
        with pytest.raises(Unsupported, match="keys and values before the text, not a change of weights"):
            attempt()
    trained(store, base, tmp_path / "data", "sql", {"type": "lora", "rank": 2, "alpha": 4})
    events: list[Any] = []
    for both in (conflicts, combine):
        with pytest.raises(Unsupported, match="front@1 is a prefix"):
            both(["sql@1", ref], store=store, on_event=events.append)
    assert events == []
    store.remove("sql@1")
    with pytest.raises(Unsupported, match="'vera' is not a method"):
        convert(ref, to="vera", store=store)
    with pytest.raises(Unsupported, match="both given"):
        convert(ref, rank=2, error=0.1, store=store)
    assert [e.name for e in store.list()] == ["front"]


# --- frozen weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_dora_is_read_from_the_checkpoint_as_its_base_computes(
    store: Store, tiny_base: Any, tmp_path: Path, quantize: str
) -> None:
    """At full rank nothing is lost: the same logits. Weights that were quantised go that way before they are read."""
    base = tiny_base("llama", quantize, hidden_size=64, intermediate_size=128)
    trained(store, base, tmp_path / "data", "dora", {"type": "dora", "rank": 2, "alpha": 4})
    found = make_converted("dora@1", Setting(store, base), rank=64)
    assert (found.card.origin["from"], found.card.adapter["type"]) == ("dora", "lora")
    assert found.card.origin["error"] < 1e-5
    before, after = logits(base, store, "dora@1"), logits(base, store, found.ref)
    peers.assert_logits_equal(after, before, 1e-4)
    effect = max(float((a - b).abs().max()) for a, b in zip(before, logits(base, store, None), strict=True))
    assert effect > 0.05


def test_no_model_is_loaded_for_frozen_weights(store: Store, tiny_base: Any, tmp_path: Path, monkeypatch: Any) -> None:
    base = tiny_base("llama")
    trained(store, base, tmp_path / "data", "dora", {"type": "dora", "rank": 2, "alpha": 4})
    trained(store, base, tmp_path / "data", "sql", {"type": "lora", "rank": 2, "alpha": 4})

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("adapterhub_lite.workflows.combine_base.load_own_base", refuse)
    monkeypatch.setattr("adapterhub_lite.workflows.combine_base.load_base", refuse)
    ref = combine({"dora@1": 1.0, "sql@1": 1.0}, store=store, evaluate=False)
    assert store.card(ref).origin["error"] > 0.01
    assert any(note.startswith("dora@1 is of full rank") for note in store.card(ref).origin["notes"])
    report = conflicts(["dora@1", "sql@1"], store=store)
    assert report.approximated[0] > report.approximated[1] == 0


def test_a_mix_with_dora(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("llama")
    trained(store, base, tmp_path / "data", "dora", {"type": "dora", "rank": 8, "alpha": 16})
    trained(store, base, tmp_path / "data", "sql", {"type": "lora", "rank": 2, "alpha": 4})
    weights = {"dora@1": 0.6, "sql@1": 0.5}
    ref = combine(weights, store=store, base=base)
    peers.assert_logits_equal(logits(base, store, ref), logits(base, store, weights), 1e-3)


def test_dora_without_its_base_is_refused(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("llama")
    trained(store, base, tmp_path / "data", "dora", {"type": "dora", "rank": 2, "alpha": 4})
    files = {f: store.folder("dora@1") / f for f in ("adapter_config.json", "adapter_model.safetensors")}
    card = store.card("dora@1")
    store.put("lost", dict(files), replace(card, base={**card.base, "name": "/nowhere"}))
    for attempt in (lambda: convert("lost", rank=4, store=store), lambda: conflicts(["lost", "dora"], store=store)):
        with pytest.raises(Unsupported, match=r"DoRA.*--base"):
            attempt()
    convert("lost", rank=4, store=store, base=str(base.source.folder))
    # Another checkpoint under the recorded name is not taken for it.
    wrong = tiny.save("llama", tmp_path / "wrong", seed=9)
    store.put("moved", dict(files), replace(card, base={**card.base, "name": str(wrong)}))
    with pytest.raises(BaseMismatch, match="other weights"):
        convert("moved", rank=4, store=store)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ia3_with_the_layers_own_biases(store: Store, tmp_path: Path, family: str) -> None:
    """Conv1D lies the other way round in the checkpoint, and its outputs' factors take the bias along."""
    model = tiny.model(family)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), device="cpu")
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["k_proj", "v_proj", "down_proj"]}[family]
    settings = peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=targets[-1:])
    ref, theirs = imported(store, base, tmp_path, family, "factors", settings)
    found = make_converted(ref, Setting(store, base))
    assert found.card.origin["from"] == "ia3"
    peers.assert_logits_equal(logits(base, store, found.ref), peers.logits(theirs), 1e-4)
    half = combine([(ref, 0.5)], store=store, base=base)
    peers.assert_logits_equal(logits(base, store, half), logits(base, store, {str(ref): 0.5}), 1e-4)


# --- heads -------------------------------------------------------------------------------------------------------


def moods(
    store: Store, base: Base, folder: Path, name: str, labels: dict[str, str] | None = None, seed: int = 0
) -> Ref:
    """A classifier of three labels; with other names where they are given."""
    folder.mkdir()
    path = recipes.write(folder, base, {"type": "lora", "rank": 2, "alpha": 4}, {"seed": seed, "max_steps": 3})
    for part in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        told = [{**row, "label": (labels or {}).get(row["label"], row["label"])} for row in rows]
        (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(row) for row in told))
    return train(load_recipe(path), store=store, base=base, name=name)


def test_a_mix_of_classifiers_has_one_head(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("bert")
    names = {"even": "glad", "odd": "sad", "third": "calm"}
    moods(store, base, tmp_path / "a", "one")
    moods(store, base, tmp_path / "b", "two", seed=1)
    moods(store, base, tmp_path / "c", "words", names)
    events: list[Any] = []
    for choose, how in (
        ({}, 'head="one@1" or head="two@1"'),
        ({"choose_head": "--head {}"}, "--head one@1 or --head two@1"),
    ):
        with pytest.raises(Unsupported, match="each bring a head of their own") as caught:
            make_combined(
                ["one@1", "two@1"], "linear", Options(), Setting(store, base, on_event=events.append), **choose
            )
        assert caught.value.hint == f"Say whose comes along: {how}."
    assert events == []  # nothing was begun
    report = conflicts(["one@1", "two@1"], store=store, base=base)
    assert "one@1 and two@1: both were trained on the same data: average them (0.5 each) or" in report.advice.why
    (note,) = report.advice.notes
    assert note.endswith("one head alone can come along: `ahl combine ... --head one@1`.")
    assert combine(
        ["one@1", "two@1"], weights=[0.5, 0], store=store, evaluate=False
    )  # who takes no part brings no head
    found = make_combined(
        {"one@1": 0.4, "two@1": 0.5, "words@1": 0.9}, "linear", Options(), Setting(store, base), head="one"
    )
    assert found.card.task == store.card("one@1").task  # not the heaviest one's: its head is another
    assert found.card.origin["head"] == "one@1"
    told = {one.parent: one for one in found.measured}
    assert told["one@1"].made is not None
    assert told["two@1"].made == told["one@1"].made  # the same rows and labels
    assert told["words@1"].made is None
    assert "other labels" in told["words@1"].reason
    assert told["words@1"].alone is not None
    heads = [load_file(store.folder(ref) / "adapter_model.safetensors") for ref in (found.ref, "one@1")]
    key = next(key for key in heads[1] if "classifier" in key and key.endswith("weight"))
    assert torch.equal(heads[0][key], heads[1][key])
    runtime = Runtime(base, store)
    try:
        assert runtime.predict(["red green"], found.ref)[0].label in ("even", "odd", "third")
    finally:
        runtime.close()


def test_the_only_head_decides_the_task(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    """A heavier member without a head does not say what the head's labels are."""
    base = tiny_base("bert")
    moods(store, base, tmp_path / "a", "one")
    moods(store, base, tmp_path / "c", "words", {"even": "glad", "odd": "sad", "third": "calm"})
    folder = store.folder("words@1")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = {**json.loads((folder / "adapter_config.json").read_text()), "modules_to_save": None}
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save({key: t for key, t in tensors.items() if ".classifier" not in key}),
    }
    store.put("bare", dict(files), store.card("words@1"))
    ref = combine({"one@1": 0.3, "bare@1": 0.9}, store=store, evaluate=False)
    assert store.card(ref).task == store.card("one@1").task


def test_a_converted_classifier_keeps_head_and_labels(store: Store, tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("bert")
    moods(store, base, tmp_path / "a", "one")
    found = make_converted("one@1", Setting(store, base))
    assert found.measured[0].made == found.measured[0].alone
    peers.assert_logits_equal(logits(base, store, found.ref), logits(base, store, "one@1"), 1e-5)
