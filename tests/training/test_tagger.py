"""Taggers through their whole life: trained by a recipe, stored, measured, served, promoted, merged, read by PEFT."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from adapterhub_lite.bases.fetch import cached
from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import DataError, EffectChanged, RecipeError, Unsupported
from adapterhub_lite.formats.peft_config import LoraSpec
from adapterhub_lite.recipe import TagTask, load_recipe
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.rows import Rows, read_jsonl
from adapterhub_lite.tasks.spans import spans
from adapterhub_lite.tasks.tag import Tag
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Learner, Row, Settings, make_computation
from adapterhub_lite.training.trainable import TrainableLora
from adapterhub_lite.workflows.deep_verify import verify_deep
from adapterhub_lite.workflows.diff import diff
from adapterhub_lite.workflows.evaluate import evaluate
from adapterhub_lite.workflows.merge import merge
from adapterhub_lite.workflows.model_card import model_card
from adapterhub_lite.workflows.predict import predict_rows
from adapterhub_lite.workflows.promote import promote
from adapterhub_lite.workflows.train import train
from tests import peers, tiny
from tests.cli.conftest import ahl, told
from tests.runtime.test_tagging import plain

NAMES, PLACES = ["ann", "bob", "eve", "ida"], ["rome", "oslo", "bonn", "york"]
ADAPTERS = {
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "dora": {"type": "dora", "rank": 4, "alpha": 8},
    "prefix": {"type": "prefix", "tokens": 5},
}


def toy(count: int, seed: int) -> list[dict[str, Any]]:
    """Names are told from places by the word before them, first from second names by nothing else."""
    chance, made = random.Random(seed), []
    for _ in range(count):
        tokens, tags = [], []
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.5:
                tokens += ["Mr", chance.choice(NAMES), chance.choice(NAMES)]
                tags += ["O", "B-PER", "I-PER"]
            else:
                tokens += ["in", chance.choice(PLACES)]
                tags += ["O", "B-LOC"]
        made.append({"words": tokens, "ner": tags})
    return made


def write(folder: Path, base: Base, adapter: dict[str, Any], rows: int = 8, **training: Any) -> Path:
    """A recipe for the toy task, and its data."""
    for seed, (part, count) in enumerate({"train": rows, "validation": 6, "test": 20}.items()):
        (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(r) for r in toy(count, seed)))
    recipe = {
        "name": "names",
        "base": str(base.source.folder),
        "task": {"type": "tag", "tokens": "words", "tags": "ner"},
        "data": {p: f"{p}.jsonl" for p in ("train", "validation", "test")},
        "adapter": adapter,
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 0.02, "max_length": 64, **training},
    }
    path = folder / "names.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_peft_gives_what_we_trained(tiny_base, tmp_path: Path, recwarn, family: str, kind: str):
    base, store = tiny_base(family), Store()
    before = base.live_digest()
    ref = train(write(tmp_path, base, ADAPTERS[kind]), store=store, base=base)
    assert base.live_digest() == before
    assert not base.model.training
    folder = store.export(ref, tmp_path / "out")
    recwarn.clear()
    wrapped = peft.PeftModel.from_pretrained(plain(base.source.folder, 4), folder).eval()
    said = [str(w.message).lower() for w in recwarn]
    assert [m for m in said if "missing" in m or "unexpected" in m] == []
    peers.assert_logits_equal(Runtime(base, store).logits(peers.ROWS, ref), peers.logits(wrapped))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("TOKEN_CLS", ["classifier"])
    assert not [k for k in load_file(folder / "adapter_model.safetensors") if "pooler" in k]
    card = store.card(ref)
    assert card.task["labels"] == ["B-LOC", "B-PER", "I-PER", "O"]
    assert set(card.metrics["test"]) == {"f1", "precision", "recall", "accuracy"}
    assert store.verify() == []


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_loss_and_gradients_of_a_head_are_those_of_transformers(tiny_base, family: str):
    base = tiny_base(family)
    theirs = plain(base.source.folder, 4)
    slot = base.view("TOKEN_CLS").head
    head = slot.build({n: p.detach().clone() for n, p in theirs.classifier.named_parameters()}).requires_grad_(True)
    examples = [
        Example([1, 5, 6, 7, 2], [IGNORED, 0, IGNORED, 3, IGNORED]),
        Example([1, 30, 2], [IGNORED, 2, IGNORED]),
    ]
    adapter = TrainableLora(LoraSpec(rank=1, alpha=1), {}, torch.Generator())
    computation = make_computation(base, [Learner(adapter, head, "TOKEN_CLS")], Settings(dropout_of_base=False))
    (found,) = computation.gradients([Row(example) for example in examples])
    ids, labels = torch.tensor([[1, 5, 6, 7, 2], [1, 30, 2, 0, 0]]), torch.full((2, 5), IGNORED)
    labels[0, 1], labels[0, 3], labels[1, 1] = 0, 3, 2
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert found.count == 3
    assert found.total / 3 == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = dict(theirs.classifier.named_parameters())
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad / 3, expected[name].grad, rtol=1e-4, atol=1e-6)
    best = [int(t) for t in theirs(input_ids=ids, attention_mask=mask).logits.argmax(-1)[labels != IGNORED]]
    assert found.hits == sum(b == w for b, w in zip(best, [0, 3, 2], strict=True))


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """A store with names@1, learnt, and names@2, which had one step; and their base."""
    from adapterhub_lite.bases.load import load_base

    base = load_base(str(tiny_folder("bert")), device="cpu")
    folder = tmp_path_factory.mktemp("names")
    store = Store(folder / "store")
    path = write(folder, base, {**ADAPTERS["lora"], "rank": 8}, rows=128, epochs=16, batch_size=8, learning_rate=0.01)
    good = train(path, store=store, base=base)
    return store, base, good, train(path, store=store, base=base, overrides={"training.max_steps": 1})


def test_it_learns(trained):
    store, base, good, poor = trained
    assert store.card(good).metrics["test"]["f1"] > 0.9
    assert store.card(poor).metrics["test"]["f1"] < 0.5
    evaluations = store.card(good).origin["evaluations"]
    assert evaluations[-1]["accuracy"] > 0.95
    assert store.card(good).effect["max_logit_change"] > 0
    (found,) = Runtime(base, store).tag([["in", "rome", "Mr", "bob", "ida"]], good)
    assert [w.tag for w in found] == ["O", "B-LOC", "O", "B-PER", "I-PER"]


def test_eval_and_promote(trained):
    store, base, good, poor = trained
    report = evaluate(good, store=store, base=base)
    assert report.metrics == store.card(good).metrics["test"]
    assert (report.primary_metric, report.base_metrics) == ("f1", None)
    assert promote(good, "prod", store=store, base=base).accepted
    refused = promote(poor, "prod", store=store, base=base)
    assert (refused.accepted, refused.metric) == (False, "f1")
    assert promote(poor, "other", store=store, base=base, metric="recall", again=True).candidate_value < 0.5


def test_its_effect_is_verified(trained, tmp_path: Path):
    store, base, good, _ = trained
    assert verify_deep([good], store=store, device="cpu") == ([], [])
    card = store.card(good)
    worse = Store(tmp_path / "worse")
    stored = store.read(good)
    changed = type(card)(**{**card.__dict__, "effect": {**card.effect, "loss": card.effect["loss"] + 1}})
    other = worse.put(
        "names", {"adapter_config.json": stored.config, "adapter_model.safetensors": stored.weights}, changed
    )
    with pytest.raises(EffectChanged):
        Runtime(base, worse).load(other)


def test_answers_compare(trained):
    store, base, good, poor = trained
    found = diff(good, poor, store=store, base=base, outputs=4)
    assert found.outputs_refused == ""
    answers = found.answers[-1]
    assert answers.live
    assert answers.changed
    first = answers.changed[0]
    assert first.prompt.split()
    assert set(first.reference.split()) <= {"B-LOC", "B-PER", "I-PER", "O"}
    assert len(first.a.split()) == len(first.prompt.split())


def test_rows_of_a_file_are_tagged(trained, tmp_path: Path):
    store, base, good, _ = trained
    path = tmp_path / "rows.jsonl"
    rows = [{"words": ["in", "(oslo)"], "id": 1, "text": "Mr eve bob."}, {"words": [], "id": 2, "text": ""}]
    path.write_text("\n".join(map(json.dumps, rows)))
    runtime = Runtime(base, store)
    plain_row, empty = predict_rows(runtime, good, read_jsonl(path))
    assert plain_row["predicted_words"] == plain_row["words"] == ["in", "(oslo)"]
    assert len(plain_row["predicted_tags"]) == 2
    assert plain_row["id"] == 1
    assert len(plain_row["predicted_scores"]) == 2
    assert empty["predicted_tags"] == []
    found, _ = predict_rows(runtime, good, read_jsonl(path), field="text")
    assert found["predicted_words"] == ["Mr", "eve", "bob", "."]
    assert found["predicted_tags"][:3] == ["O", "B-PER", "I-PER"]


def test_merged_it_is_transformers_class(trained, tmp_path: Path):
    store, base, good, _ = trained
    report = merge(good, tmp_path / "out", store=store, base=base)
    assert report.passed
    model = transformers_of(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(store.card(good).task["labels"]))
    found = peers.logits(model)
    peers.assert_logits_equal(found, Runtime(base, store).logits(peers.ROWS, good))


def transformers_of(folder: Path) -> Any:
    from transformers import AutoModelForTokenClassification

    model, told_of = AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not told_of["missing_keys"]
    assert not told_of["unexpected_keys"]
    return model.eval()


def test_the_command_line(trained, tmp_path: Path):
    store, _, good, _ = trained
    at = ("--store", store.path)
    lines = ahl("run", "-a", "names@1", "Mr bob eve in rome", *at).stdout.splitlines()
    assert lines[0].split() == ["WORD", "TAG", "SCORE"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["Mr", "O"],
        ["bob", "B-PER"],
        ["eve", "I-PER"],
        ["in", "O"],
        ["rome", "B-LOC"],
    ]
    found = told("run", "-a", "names@1", "in rome", *at)
    assert [(w["word"], w["tag"], w["start"], w["end"]) for w in found["words"]] == [
        ("in", "O", 0, 2),
        ("rome", "B-LOC", 3, 7),
    ]
    assert found["words"][1]["score"] > 0.5
    assert told("eval", "names@1", *at)["metrics"] == store.card(good).metrics["test"]
    listed = told("list", *at)
    assert next(e for e in listed["adapters"] if e["ref"] == "names@1")["metric"]["name"] == "f1"
    out = tmp_path / "out.jsonl"
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"words": ["in", "oslo"]}\n')
    assert ahl("predict", "names@1", "--input", rows, "--output", out, *at).exit_code == 0
    assert json.loads(out.read_text())["predicted_tags"] == ["O", "B-LOC"]


def test_its_readme_names_class_and_labels(trained):
    store, _, good, _ = trained
    text = model_card(store.card(good), store.spec(good), "names@1", "0" * 64, "me/names")
    assert "AutoModelForTokenClassification.from_pretrained(" in text
    assert "num_labels=4" in text


def test_a_tag_that_training_does_not_know(tiny_base, tmp_path: Path):
    base = tiny_base("bert")
    path = write(tmp_path, base, ADAPTERS["lora"])
    (tmp_path / "validation.jsonl").write_text('{"words": ["x"], "ner": ["B-ORG"]}\n')
    with pytest.raises(DataError, match=r"validation\.jsonl, line 1: tag 'B-ORG' is unknown"):
        train(path, store=Store(), base=base)


def test_a_language_model_is_no_tagger(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    with pytest.raises(Unsupported, match="encoder"):
        train(write(tmp_path, base, ADAPTERS["lora"]), store=Store(), base=base)


def test_recipes_of_taggers(tmp_path: Path, tiny_base):
    path = write(tmp_path, tiny_base("bert"), ADAPTERS["lora"])
    assert load_recipe(path).task == TagTask(tokens="words", tags="ner")
    assert isinstance(load_recipe("entities").task, TagTask)
    for wrong, why in (
        ({"task.tags": "words"}, "column of the words"),
        ({"task.labels": ["O", "B LOC"]}, "white space"),
        ({"task.labels": ["O"]}, "2"),
        ({"task.text": "x"}, "belongs to type classify"),
    ):
        with pytest.raises(RecipeError, match=why):
            load_recipe(path, wrong)


DATA = os.environ.get("AHL_DATA")
RECIPE = """
name: names
base: minilm-l6
task: {{type: tag, tokens: tokens, tags: ner_tags}}
data: {{train: {folder}/train.jsonl, test: {folder}/validation.jsonl}}
adapter: {{type: lora, rank: 16, alpha: 32, targets: all-linear}}
training: {{max_steps: 60, batch_size: 32, learning_rate: 2.0e-3, max_length: 96, seed: 0}}
"""


@pytest.mark.models
@pytest.mark.skipif(not DATA, reason="AHL_DATA names no folder of data sets")
@pytest.mark.skipif(cached("minilm-l6") is None, reason="the base minilm-l6 is not in the cache")
def test_sixty_steps_find_names_in_news(tmp_path: Path):
    """Two thirds of an epoch of CoNLL-2003; whole runs do better."""
    folder = Path(str(DATA)) / "conll2003"
    recipe = tmp_path / "names.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    store = Store(tmp_path / "store")
    card = store.card(train(recipe, store=store))
    assert card.metrics["test"]["f1"] > 0.4
    assert card.metrics["test"]["accuracy"] > 0.85


@pytest.mark.skipif(not DATA, reason="AHL_DATA names no folder of data sets")
@pytest.mark.parametrize("name", ["wnut17", "conll2003"])
def test_real_data_is_read_as_it_is(tiny_base, name: str):
    """In IOB2 the spans are as many as their first words, and every word with a token comes back."""
    task = Tag({"type": "tag", "tokens": "tokens", "tags": "ner_tags"})
    rows = read_jsonl(Path(str(DATA)) / name / "train.jsonl")
    task.prepare(rows)
    tags = [task.expected(rows, i) for i in range(len(rows))]
    assert sum(len(spans(one)) for one in tags) == sum(tag.startswith("B-") for one in tags for tag in one)
    assert task.metrics(rows, [" ".join(one) for one in tags]) == dict.fromkeys(
        ("f1", "precision", "recall", "accuracy"), 1.0
    )
    some = Rows(rows.rows[:200], rows.lines[:200], rows.source, rows.sha256)
    for limit in (32, 512):
        examples = task.examples(some, tiny_base("bert").tokenizer, "encoder", limit)
        labelled = sum(label != IGNORED for e in examples for label in e.labels)
        assert labelled == sum(bool(word.strip()) for words in task.words(some) for word in words)
        assert max(len(e.ids) for e in examples) <= limit
