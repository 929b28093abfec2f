"""Every refusal with its field path, line and hint."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from adapterhub_lite import recipe as recipes
from adapterhub_lite.errors import RecipeError
from adapterhub_lite.recipe import (
    load_recipe,
)
from tests.recipe.build import GOOD, LEAST, problems, write

REPLACED = [
    # written, instead, path, message, line
    ("rank: 8", "rnk: 8", "adapter.rnk", "Did you mean 'rank'?", 8),
    ("rank: 8", "tokens: 8", "adapter.tokens", "'tokens' belongs to type prefix", 8),
    ("rank: 8", "rank: 0", "adapter.rank", "whole number from 1 to 1024, found '0'", 8),
    ("rank: 8", "rank: 1025", "adapter.rank", "found '1025'", 8),
    ("rank: 8", "rank: 8.0", "adapter.rank", "found '8.0'", 8),
    ("rank: 8", "rank: 010", "adapter.rank", "found '010'", 8),
    ("rank: 8", "rank: 1_000", "adapter.rank", "found '1_000'", 8),
    ("rank: 8", "rank: true", "adapter.rank", "found 'true'", 8),
    ("rank: 8", 'rank: "8"', "adapter.rank", "Remove the quotes", 8),
    ("rank: 8", "rank: [8]", "adapter.rank", "found a list", 8),
    ("rank: 8", "rank: ", "adapter.rank", "found nothing", 8),
    ("rank: 8", "rank: 99999999999999999999999", "adapter.rank", "found '999", 8),
    ("alpha: 32", "alpha: 0", "adapter.alpha", "above 0", 8),
    ("alpha: 32", "alpha: .inf", "adapter.alpha", "found '.inf'", 8),
    ("alpha: 32", "alpha: .nan", "adapter.alpha", "found '.nan'", 8),
    ("alpha: 32", "alpha: 1e999", "adapter.alpha", "found '1e999'", 8),
    ("alpha: 32", "alpha: 1:30", "adapter.alpha", "found '1:30'", 8),
    ("alpha: 32", "rslora: maybe", "adapter.rslora", "expected true or false", 8),
    ("targets: all-linear", "targets: all", "adapter.targets", "all-linear or a list", 8),
    ("targets: all-linear", "targets: [a, a]", "adapter.targets", "something twice", 8),
    ("targets: all-linear", "targets: []", "adapter.targets", "at least 1 entry", 8),
    ("targets: all-linear", "targets: ['.*q']", "adapter.targets[0]", "patterns are not read", 8),
    ("targets: all-linear", "rank_pattern: {'q|v': 3}", "adapter.rank_pattern.q|v", "not a module name", 8),
    ("targets: all-linear", "rank_pattern: {q: 0}", "adapter.rank_pattern.q", "whole number", 8),
    ("targets: all-linear", "rank_pattern: 3", "adapter.rank_pattern", "a mapping", 8),
    ("type: lora", "type: prefix", "adapter.rank", "belongs to type lora", 8),
    ("type: lora", "type: Lora", "adapter.type", "Did you mean 'lora'?", 8),
    ("type: lora, ", "", "adapter", "'type' is missing", 8),
    ("type: classify", "type: [classify]", "task.type", "found a list", 6),
    ("text: text", "prompt: text", "task.prompt", "belongs to type instruct", 6),
    ("text: text", "text: ''", "task.text", "must not be empty", 6),
    ("text: text", "text: null", "task.text", "found nothing", 6),
    ("text: text", 'text: "\\u0007"', "task.text", "control character", 6),
    ("text: text", f"text: {'x' * 201}", "task.text", "the limit is 200", 6),
    ("text: text", "labels: [a]", "task.labels", "at least 2 entries", 6),
    ("text: text", "template: 'Is {txt} good?'", "task.template", "text column {text}", 6),
    ("text: text", "labels: [a, b], words: {a: x, c: y}", "task.words", "differ in 'b', 'c'", 6),
    ("text: text", "words: {a: x, b: ' x'}", "task.words", "same word", 6),
    ("text: text", "metrics: [exact]", "task.metrics", "belongs to type instruct", 6),
    ("train: train.jsonl, ", "", "data", "'train' is missing", 7),
    ("seed: 0", "early_stopping: 3", "training.early_stopping", "expected a mapping", 9),
    ("seed: 0", "early_stopping: {}", "training.early_stopping", "'patience' is missing", 9),
    ("seed: 0", "early_stopping: {patience: 0}", "training.early_stopping.patience", "from 1 to 10000", 9),
    ("seed: 0", "early_stopping: {patience: 1, metric: f1}", "training.early_stopping.metric", "loss, accuracy", 9),
    ("seed: 0", "keep: worst", "training.keep", "one of best, last", 9),
    ("seed: 0", "checkpoint_every: 0", "training.checkpoint_every", "from 1 to", 9),
    ("seed: 0", "checkpoint_every: soon", "training.checkpoint_every", "30s, 5min or 2h, or never", 9),
    ("seed: 0", "checkpoint_every: 0s", "training.checkpoint_every", "30s, 5min or 2h, or never", 9),
    ("seed: 0", "checkpoint_every: 1.5h", "training.checkpoint_every", "30s, 5min or 2h, or never", 9),
    ("quantize: none", "start_from: sql@0", "start_from", "", 5),
    ("quantize: none", "start_from: ../sql", "start_from", "", 5),
    ("train: train.jsonl", "trian: train.jsonl", "data.trian", "Did you mean 'train'?", 7),
    ("train: train.jsonl", "train: gone.jsonl", "data.train", "there is no file", 7),
    ("train: train.jsonl", "train: trains.jsonl", "data.train", "Did you mean 'train.jsonl'?", 7),
    ("train: train.jsonl", "train: ./test.jsonl", "data.test", "is the same as train", 7),
    ("train: train.jsonl", "train: [a.jsonl]", "data.train", "a file or {hub", 7),
    ("train: train.jsonl", "train: {hub: org/x}", "data.train", "'split' is missing", 7),
    ("train: train.jsonl", "train: {hub: ../x, split: train}", "data.train.hub", "not a Hub id", 7),
    ("train: train.jsonl", "train: {hub: a/b, split: s, revision: main}", "data.train.revision", "40 hex", 7),
    ("train: train.jsonl", "train: folder/", "data.train", "not the path of a file", 7),
    ("name: topics", "name: ../x", "name", "not a valid adapter name", 3),
    ("name: topics", "name: Topics", "name", "1 to 64 of a-z", 3),
    ("name: topics\n", "", "recipe", "'name' is missing", 0),
    ("quantize: none", "quantize: nf5", "quantize", "Did you mean 'nf4'?", 5),
    ("quantize: none", "quantise: none", "quantise", "Did you mean 'quantize'?", 5),
    ("quantize: none", "<<: {quantize: none}", "<<", "unknown key", 5),
    ("epochs: 3", "epochs: 0", "training.epochs", "above 0", 9),
    ("epochs: 3", "warmup: 1.5", "training.warmup", "from 0 to 1", 9),
    ("epochs: 3", "seed: 0", "training.seed", "is given twice. First on line 9", 9),
    ("epochs: 3", "seed: -1", "training.seed", "whole number from 0", 9),
    ("epochs: 3", "schedule: cosin", "training.schedule", "Did you mean 'cosine'?", 9),
    ("epochs: 3", "? [a] : 1", "training", "a key must be one word", 9),
    ("epochs: 3", "epochs: !!python/object/apply:os.system [id]", "training.epochs", "tags", 9),
    ("epochs: 3", "epochs: ! 3", "training.epochs", "tags (!) are not read", 9),
    ("epochs: 3", "epochs: &a 3", "training.epochs", "anchors (&a)", 9),
    ("epochs: 3", "epochs: *a", "training.epochs", "aliases (*a)", 9),
    ("epochs: 3", 'epochs: "\\ud800"', "training.epochs", "half a character", 9),
    ("epochs: 3", "epochs: [3", "recipe", "not valid YAML", 9),
    ("epochs: 3", 'epochs: "\\UFFFFFFFF"', "recipe", "not valid YAML", 0),
    ("seed: 0}", "seed: 0}\n---\nname: b", "recipe", "more than one document", 10),
]


@pytest.mark.parametrize(("old", "new", "path", "message", "line"), REPLACED, ids=[f"{r[1][:30]}" for r in REPLACED])
def test_refusal(folder: Path, old: str, new: str, path: str, message: str, line: int) -> None:
    assert old in GOOD
    found = problems(folder, GOOD.replace(old, new, 1))
    matching = [problem for problem in found if problem.path == path and message in f"{problem.message} {problem.hint}"]
    assert matching, found
    assert line in (0, matching[0].line), matching


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("[1, 2]", "expected a mapping, found a list"),
        ("hello", "expected a mapping, found 'hello'"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"name: \x00", "not valid YAML"),
        ("name: " + "[" * 30 + "]" * 30, "nested deeper than 20"),
        ("[" * 100_000, "nested deeper than 20"),
        ("#" * (256 * 1024 + 1), "larger than 256 KiB"),
        ("%YAML 9.0\n---\na: b", "not valid YAML"),
        ("a: b\n\tc: d", "not valid YAML"),
    ],
)
def test_refused_text(folder: Path, text: str | bytes, message: str) -> None:
    assert message in problems(folder, text)[0].message


def test_instruct_refusals(folder: Path) -> None:
    def of(task: str) -> str:
        return str(problems(folder, LEAST.replace("{type: instruct}", f"{{type: instruct, {task}}}"))[0])

    assert "exclude each other" in of("prompt: q, template: '{q}'")
    assert "expected one of rouge_l, exact_match, sql_execution" in of("metrics: [bleu]")
    assert "Did you mean 'exact_match'?" in of("metrics: [exact_mach]")
    assert "at least 1 entry" in of("metrics: []")
    assert "from 1 to 8192" in of("max_new_tokens: 0")


def test_prefix_refusals(folder: Path) -> None:
    assert "not used with init: random" in str(
        problems(folder, LEAST.replace("prefix", "prefix, init: random, text: hello"))[0]
    )


def test_all_problems_at_once(folder: Path) -> None:
    text = GOOD.replace("rank: 8", "rnk: 8, tokens: 3").replace("epochs: 3", "epochs: -1, sed: 4").replace("none", "4")
    found = problems(folder, text)
    paths = ["adapter.rnk", "adapter.tokens", "quantize", "training.epochs", "training.sed"]
    assert sorted(problem.path for problem in found) == paths
    with pytest.raises(RecipeError, match=r"5 problems\n  .*\n  "):
        load_recipe(write(folder, text))


def test_many_problems_stay_quick(folder: Path) -> None:
    assert len(problems(folder, "".join(f"k{i}: {i}\n" for i in range(9000)))) == 100


def test_missing_files_can_wait(folder: Path) -> None:
    found = load_recipe(write(folder, GOOD.replace("train.jsonl", "gone.jsonl")), check_files=False)
    assert [problem.path for problem in recipes.check_files(found)] == ["data.train"]


def test_error_survives_pickling(folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, "name: 1\n"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.problems) == (str(caught.value), caught.value.problems)
