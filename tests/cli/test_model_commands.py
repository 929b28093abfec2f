"""Commands that load a base: train, run, predict, eval, merge, chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checks import assert_store_sound
from tests.cli.conftest import Shop, ahl, told


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_train_stores_a_version_and_says_so(shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    changes = ["-o", "training.max_steps=1", "-o", "adapter.rank=1"]
    result = ahl("train", shop.recipe("parrot"), *changes, "--name", "mine", "--store", store)
    assert result.exit_code == 0
    assert result.stdout.startswith("mine@1: test exact_match")
    assert "step 1/1" in result.stderr
    made = told("train", shop.recipe("parrot"), *changes, "--name", "mine", "--store", store)
    assert (made["ref"], made["adapter"]["rank"], set(made["metrics"])) == ("mine@2", 1, {"test"})
    assert_store_sound(store)


def test_train_reports_every_problem_of_a_recipe(shop: Shop, tmp_path: Path) -> None:
    wrong = ["-o", "training.epoch=1", "-o", "adapter.rank=0"]
    result = ahl("train", shop.recipe("parrot"), *wrong, "--store", tmp_path / "store")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "2 problems" in result.stderr
    assert "epochs" in result.stderr
    assert "adapter.rank" in result.stderr
    error = told("train", shop.recipe("parrot"), *wrong, "--store", tmp_path / "store", code=1)["error"]
    assert error["type"] == "RecipeError"
    assert len(error["problems"]) == 2
    assert not (tmp_path / "store").exists()


def test_run_prints_the_answer_alone(shop: Shop) -> None:
    result = ahl("run", "--adapter", "parrot", "say 3", "--store", shop.store)
    assert result.exit_code == 0
    assert result.stderr == ""
    found = told("run", "--adapter", "parrot", "say 3", "--store", shop.store)
    assert result.stdout == found["answer"] + "\n"
    assert (found["adapter"], found["base"]) == ("parrot@1", shop.causal)


def test_run_reads_the_prompt_from_stdin(shop: Shop) -> None:
    arguments = ["run", "--base", shop.causal, "--max-new-tokens", "4", "--raw", "--store", str(shop.store)]
    assert ahl(*arguments, input="say 3\n").stdout == ahl(*arguments, "say 3").stdout
    empty = ahl(*arguments, input="")
    assert empty.exit_code == 2
    assert "empty" in empty.stderr


def test_run_with_a_seed_repeats(shop: Shop) -> None:
    sample = ["run", "--base", shop.causal, "--temperature", "1", "--max-new-tokens", "12", "--store", str(shop.store)]
    first, again, other = (ahl(*sample, "--seed", seed, "hi").stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_run_with_a_head_answers_with_a_label(shop: Shop) -> None:
    assert ahl("run", "-a", "moods", "text 1", "--store", shop.store).stdout.strip() in ("glad", "sad")
    found = told("run", "-a", "moods", "text 1", "--store", shop.store)
    assert sum(found["scores"].values()) == pytest.approx(1)


def test_predict_keeps_rows_and_adds_answers(shop: Shop, tmp_path: Path) -> None:
    source, out = shop.folder / "parrot-test.jsonl", tmp_path / "out.jsonl"
    assert told("predict", "parrot", "--input", source, "--output", out, "--store", shop.store)["rows"] == 4
    made = _rows(out)
    assert [{k: v for k, v in row.items() if k != "answer"} for row in made] == _rows(source)
    alone = told("run", "-a", "parrot", "say 0", "--store", shop.store)["answer"]
    assert made[0]["answer"] == alone


def test_predict_does_not_overwrite_a_column(shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ahl("predict", "moods", "-i", shop.folder / "moods-test.jsonl", "-o", out, "--store", shop.store)
    row = _rows(out)[0]
    assert row["label"] == "glad"
    assert row["predicted_label"] in ("glad", "sad")
    assert row["predicted_score"] == max(row["predicted_scores"].values())
    (tmp_path / "bare.jsonl").write_text('{"text": "text 1", "id": 7}\n')
    ahl("predict", "moods", "-i", tmp_path / "bare.jsonl", "-o", out, "--store", shop.store)
    assert set(_rows(out)[0]) == {"text", "id", "label", "score", "scores"}


def test_predict_that_fails_leaves_the_old_output(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"other": 1}\n')
    (tmp_path / "out.jsonl").write_text("old")
    result = ahl("predict", "moods", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--store", shop.store)
    assert result.exit_code == 1
    assert "line 1" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) + sorted(p.name for p in tmp_path.glob(".*")) == [
        "in.jsonl",
        "out.jsonl",
    ]
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_predict_does_not_write_over_its_input(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "text 1"}\n')
    same = ahl(
        "predict", "moods", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "." / "in.jsonl", "--store", shop.store
    )
    assert same.exit_code == 1
    assert "is the input itself" in same.stderr
    assert (tmp_path / "in.jsonl").read_text() == '{"text": "text 1"}\n'


def test_predict_with_an_imported_adapter(shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ahl("export", "parrot", tmp_path / "peft", "--store", shop.store)
    ahl("import", tmp_path / "peft", "--name", "foreign", "--store", store)
    (tmp_path / "in.jsonl").write_text('{"ask": "say 1"}\n')
    arguments = ["predict", "foreign", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--store", store]
    unasked = ahl(*arguments, "--field", "ask")
    assert unasked.exit_code == 1
    assert f"--base {shop.folder / 'llama'}" in unasked.stderr
    arguments += ["--base", shop.folder / "llama"]
    assert ahl(*arguments).exit_code == 1
    assert ahl(*arguments, "--field", "ask").exit_code == 0
    assert set(_rows(tmp_path / "out.jsonl")[0]) == {"ask", "answer"}
    assert ahl("eval", "foreign", "--store", store).exit_code == 1


def test_eval_measures_adapter_and_base(shop: Shop) -> None:
    found = told("eval", "parrot", "--store", shop.store)
    assert set(found["metrics"]) == set(found["base_metrics"]) == {"exact_match"}
    assert (found["rows"], found["primary_metric"]) == (4, "exact_match")
    text = ahl("eval", "parrot", "--store", shop.store).stdout
    assert "parrot@1" in text
    assert "GAIN" in text
    assert "4 rows of" in text


def test_eval_equals_what_the_card_says(shop: Shop) -> None:
    card = told("show", "moods", "--store", shop.store)["card"]
    found = told("eval", "moods", "--store", shop.store)
    assert found["metrics"] == pytest.approx(card["metrics"]["test"])
    assert found["base_metrics"] is None


def test_eval_on_other_rows(shop: Shop) -> None:
    other = shop.folder / "parrot.jsonl"
    found = told("eval", "parrot", "--data", other, "--no-base", "--store", shop.store)
    assert (found["rows"], found["base_metrics"]) == (12, None)


def test_eval_says_when_the_data_has_moved(shop: Shop, tmp_path: Path) -> None:
    for file in shop.folder.glob("parrot*"):
        shutil.copy(file, tmp_path)
    store = tmp_path / "store"
    assert ahl("train", tmp_path / "parrot.yaml", "-o", "training.max_steps=1", "--store", store).exit_code == 0
    (tmp_path / "parrot-test.jsonl").rename(tmp_path / "elsewhere.jsonl")
    moved = ahl("eval", "parrot", "--store", store)
    assert moved.exit_code == 1
    assert "--data" in moved.stderr
    assert ahl("eval", "parrot", "--data", tmp_path / "elsewhere.jsonl", "--store", store).exit_code == 0
    unknown = ahl("eval", "parrot", "--split", "validation", "--store", store)
    assert unknown.exit_code == 1
    assert "without validation data" in unknown.stderr


def test_merge_writes_a_checkpoint(shop: Shop, tmp_path: Path) -> None:
    found = told("merge", "parrot", "--out", tmp_path / "merged", "--store", shop.store)
    assert found["passed"]
    assert (tmp_path / "merged/model.safetensors").is_file()
    again = ahl("merge", "parrot", "--out", tmp_path / "merged", "--store", shop.store)
    assert again.exit_code == 1
    assert "merged" in again.stderr


def test_chat_answers_and_switches(shop: Shop) -> None:
    lines = "hi\n/use parrot\nsay 1\n/adapters\n/use nothing\n/nonsense\n/use\n/base\n/reset\n/help\n\n/quit\nnever\n"
    result = ahl("chat", "--base", shop.causal, "--max-new-tokens", "3", "--store", shop.store, input=lines)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) >= 2
    said = result.stderr.splitlines()
    assert "now with parrot@1" in said
    assert "now without adapter" in said
    assert "forgotten" in said
    assert any(line.startswith("moods@1") for line in said)
    assert sum(line.startswith("error:") for line in said) == 3


def test_chat_in_json_is_one_object_a_line(shop: Shop) -> None:
    arguments = ["chat", "-a", "parrot", "--max-new-tokens", "3", "--json", "--store", str(shop.store)]
    result = ahl(*arguments, input="one\ntwo\n")
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["one", "two"]
    assert {turn["adapter"] for turn in turns} == {"parrot@1"}


def test_chat_refuses_an_encoder(shop: Shop) -> None:
    result = ahl("chat", "--base", shop.folder / "bert", "--store", shop.store, input="hi\n")
    assert result.exit_code == 1
    assert "encoder" in result.stderr
