"""What a recipe may say: values, templates, overrides, the plain form, built-in recipes."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adapterhub_lite import recipe as recipes
from adapterhub_lite.errors import NotFound, RecipeError
from adapterhub_lite.recipe import (
    ClassifyTask,
    EarlyStopping,
    FileData,
    HubData,
    InstructTask,
    LoraAdapter,
    PrefixAdapter,
    load_recipe,
    recipe_dict,
    template,
)
from adapterhub_lite.recipe.training import LEARNING_RATES
from tests.recipe.build import GOOD, LEAST, problems, write


def test_full_recipe(folder: Path) -> None:
    found = load_recipe(write(folder, GOOD))
    assert (found.name, found.base, found.quantize) == ("topics", "minilm-l6", "none")
    assert found.task == ClassifyTask()
    assert found.adapter == LoraAdapter(rank=8)
    assert found.training.learning_rate == 1e-3
    assert found.training.epochs == 3.0
    assert found.folder == folder
    assert found.data.train == FileData("train.jsonl")
    assert found.data.train.resolve(found.folder) == folder / "train.jsonl"
    assert len(found.sha256) == 64


def test_defaults_are_filled_in(folder: Path) -> None:
    found = load_recipe(write(folder, LEAST))
    assert found.task == InstructTask()
    assert found.adapter == PrefixAdapter()
    assert found.data.train == HubData("org/set", "train")
    assert found.data.validation is None
    assert found.quantize == "none"
    assert (found.training.batch_size, found.training.seed) == (8, 0)


@pytest.mark.parametrize("kind", ["lora", "dora", "prefix"])
def test_learning_rate_follows_the_adapter(folder: Path, kind: str) -> None:
    text = LEAST.replace("prefix", kind)
    assert load_recipe(write(folder, text)).training.learning_rate == LEARNING_RATES[kind]
    assert load_recipe(write(folder, text + "training: {epochs: 1}\n")).training.learning_rate == LEARNING_RATES[kind]
    assert load_recipe(write(folder, text + "training: {learning_rate: 0.5}\n")).training.learning_rate == 0.5


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 0.001), ("1E-3", 0.001), ("1.e-3", 0.001), (".5", 0.5), ("1", 1.0), ("+2e0", 2.0)]
)
def test_numbers_that_yaml_takes_for_text(folder: Path, written: str, value: float) -> None:
    assert load_recipe(write(folder, LEAST + f"training: {{learning_rate: {written}}}")).training.learning_rate == value


@pytest.mark.parametrize(("written", "value"), [("yes", True), ("Off", False), ("TRUE", True), ("false", False)])
def test_flags(folder: Path, written: str, value: bool) -> None:
    adapter = load_recipe(write(folder, LEAST.replace("prefix", f"lora, rslora: {written}"))).adapter
    assert isinstance(adapter, LoraAdapter)
    assert adapter.rslora is value


def test_words_that_yaml_takes_for_flags_and_numbers(folder: Path) -> None:
    task = "{type: classify, text: on, label: no, labels: [yes, no, 010, 1e3], words: {yes: y, no: n, 010: o, 1e3: e}}"
    found = load_recipe(write(folder, LEAST.replace("{type: instruct}", task))).task
    assert isinstance(found, ClassifyTask)
    assert (found.text, found.label) == ("on", "no")
    assert found.labels == ("yes", "no", "010", "1e3")
    assert found.words == {"yes": "y", "no": "n", "010": "o", "1e3": "e"}


def test_null_means_the_default_of_an_optional_field(folder: Path) -> None:
    text = LEAST.replace("{type: instruct}", "{type: instruct, system: null, template: ~}")
    assert load_recipe(write(folder, text)).task == InstructTask()


def test_patterns_and_targets(folder: Path) -> None:
    adapter = "lora, targets: [q_proj, self.query], rank_pattern: {q_proj: 4}, alpha_pattern: {layer.0.v: 1.5}"
    found = load_recipe(write(folder, LEAST.replace("prefix", adapter))).adapter
    assert found == LoraAdapter(
        targets=("q_proj", "self.query"), rank_pattern={"q_proj": 4}, alpha_pattern={"layer.0.v": 1.5}
    )


def test_byte_order_mark_and_crlf(folder: Path) -> None:
    assert load_recipe(write(folder, "\ufeff".encode() + GOOD.replace("\n", "\r\n").encode())).name == "topics"


BAD_TEMPLATES = ["{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{", "a}", "{ a}", "{\n}"]


@pytest.mark.parametrize("bad", BAD_TEMPLATES)
def test_bad_template(bad: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        template.columns(bad)


def test_template_fills() -> None:
    assert template.columns("{a} {{b}} {c d} {a}") == ("a", "c d")
    assert template.fill("{a} {{b}} {c d}", {"a": "{x}", "c d": 3, "e": ""}) == "{x} {b} 3"


AS_MAPPING = {"training.epochs": 1, "quantize": "nf4"}


@pytest.mark.parametrize("overrides", [AS_MAPPING, ["training.epochs=1", "quantize=nf4"]])
def test_overrides(folder: Path, overrides: object) -> None:
    found = load_recipe(write(folder, GOOD), overrides)  # type: ignore[arg-type]
    assert (found.training.epochs, found.quantize) == (1.0, "nf4")


def test_overrides_make_sections_and_hold_lists(folder: Path) -> None:
    found = load_recipe(write(folder, LEAST), ["training.max_steps=5", "adapter={type: lora, targets: [q, v]}"])
    assert found.training.max_steps == 5
    assert found.adapter == LoraAdapter(targets=("q", "v"))
    found = load_recipe(write(folder, LEAST), {"adapter": {"type": "lora", "rslora": True, "targets": ["q"]}})
    assert found.adapter == LoraAdapter(rslora=True, targets=("q",))


def test_override_clears_an_optional_field(folder: Path) -> None:
    for overrides in ({"data.test": None}, ["data.test="], ["data.test=null"]):
        assert load_recipe(write(folder, GOOD), overrides).data.test is None  # type: ignore[arg-type]


def test_files_in_overrides_are_seen_from_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder / "elsewhere"
    here.mkdir()
    (here / "mine.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    data = load_recipe(write(folder, GOOD), ["data.train=mine.jsonl"]).data
    assert data.train == FileData(str(here / "mine.jsonl"))


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("training.epohs=1", "training.epohs", "Did you mean 'epochs'?"),
        ("trainin.epochs=1", "trainin", "Did you mean 'training'?"),
        ("training.epochs=-1", "training.epochs", "above 0"),
        ("training.epochs=[", "training.epochs", "not valid YAML"),
        ("training.epochs=&a 1", "training.epochs", "anchors"),
        ("training.epochs.x=1", "training.epochs.x", "no mapping"),
        ("training.epochs", "training.epochs", "is not an override"),
        ("=1", "", "is not a field path"),
        ("training.=1", "training.", "is not a field path"),
    ],
)
def test_bad_override(folder: Path, override: str, path: str, message: str) -> None:
    found = problems(folder, GOOD, [override])
    assert [(p.path, p.line) for p in found] == [(path, 0)]
    assert message in str(found[0])


@pytest.mark.parametrize("value", [object(), {"a": object()}, [1, b"x"], float("nan"), "3"])
def test_bad_override_value(folder: Path, value: object) -> None:
    assert problems(folder, GOOD, {"training.epochs": value})[0].path.startswith("training.epochs")


TEMPLATED = LEAST.replace("{type: instruct}", "{type: instruct, template: 'Q: {q}'}")
PATTERNED = LEAST.replace("prefix", "dora, targets: [q, v], rank_pattern: {q: 2}")


@pytest.mark.parametrize("text", [GOOD, LEAST, TEMPLATED, PATTERNED])
def test_plain_form_is_the_same_recipe_again(folder: Path, text: str) -> None:
    first = load_recipe(write(folder, text))
    again = load_recipe(write(folder, yaml.safe_dump(recipe_dict(first))))
    assert dataclasses.replace(again, sha256=first.sha256) == first
    assert recipe_dict(again) == recipe_dict(first)


def test_recipe_is_frozen_and_pickles(folder: Path) -> None:
    found = load_recipe(write(folder, GOOD))
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"  # type: ignore[misc]


def test_built_in_by_name(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = library / "elsewhere"
    (elsewhere / "topics").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert load_recipe("topics").folder == library
    assert recipes.list_recipes() == [
        ("plain", "", library / "plain.yaml"),
        ("topics", "Topics of short texts.", library / "topics.yaml"),
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("topic", r"Did you mean topics\? `ahl recipes` says"),
        ("TOPICS", r"Did you mean topics\?"),
        ("plaintopics", "Did you mean topics or plain?"),
        ("zzz", "Known: plain, topics. `ahl recipes` says"),
        ("./topic.yaml", "name or the path"),
        ("", "Pass a built-in"),
        ("a\0b", "Pass a built-in"),
        ("x" * 5000, "Known"),
        ("..", "Known"),
    ],
)
def test_unknown_recipe(library: Path, name: str, hint: str) -> None:
    with pytest.raises(NotFound, match=hint):
        load_recipe(name)


def test_unknown_path_gets_the_nearest(library: Path) -> None:
    with pytest.raises(NotFound, match=r"Did you mean topics\.yaml\?"):
        load_recipe(library / "topcis.yaml")


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="permissions do not bind here")
def test_unreadable_recipe(folder: Path) -> None:
    path = Path(write(folder, GOOD))
    path.chmod(0)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


def test_folder_with_a_recipe_name(folder: Path) -> None:
    (folder / "x.yaml").mkdir()
    with pytest.raises(NotFound):
        load_recipe(folder / "x.yaml")


def test_room_loads_nothing_heavy() -> None:
    code = "import sys, adapterhub_lite.recipe as r; r.list_recipes(); print(*sys.modules)"
    package = str(Path(recipes.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": package})
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "peft", "datasets", "numpy"} & set(done.stdout.split())


def test_stopping_keeping_and_checkpoints(folder: Path) -> None:
    found = load_recipe(write(folder, GOOD)).training
    assert (found.early_stopping, found.keep, found.checkpoint_every) == (None, None, "5min")
    assert (found.checkpoint_steps, found.checkpoint_seconds, found.checkpoints) == (None, 300.0, True)
    more = "seed: 0, early_stopping: {patience: 2, metric: accuracy}, keep: last, checkpoint_every: 40"
    found = load_recipe(write(folder, GOOD.replace("seed: 0", more))).training
    assert found.early_stopping == EarlyStopping(2, "accuracy")
    assert (found.keep, found.checkpoint_steps, found.checkpoint_seconds) == ("last", 40, None)
    found = load_recipe(write(folder, GOOD.replace("seed: 0", "checkpoint_every: never"))).training
    assert (found.checkpoint_steps, found.checkpoint_seconds, found.checkpoints) == (None, None, False)


@pytest.mark.parametrize("more", ["early_stopping: {patience: 2}", "keep: best"])
def test_what_needs_a_validation_part(folder: Path, more: str) -> None:
    without = GOOD.replace("validation: validation.jsonl, ", "")
    load_recipe(write(folder, without))
    load_recipe(write(folder, GOOD.replace("seed: 0", more)))
    with pytest.raises(RecipeError, match=r"needs data\.validation"):
        load_recipe(write(folder, without.replace("seed: 0", more)))


def test_a_start(folder: Path) -> None:
    for text in ("sql", "sql@3", "sql:prod"):
        found = load_recipe(write(folder, GOOD + f"start_from: {text}\n"))
        assert found.start_from == text
        again = load_recipe(write(folder, yaml.safe_dump(recipe_dict(found))))
        assert again.start_from == text
    assert load_recipe(write(folder, GOOD)).start_from is None
