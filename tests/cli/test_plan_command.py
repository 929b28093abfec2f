"""`ahl plan`."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_lite.cli.planning import plan_lines
from adapterhub_lite.recipe import load_recipe
from tests.cli.conftest import Shop, ahl, told


def test_a_plan_is_told_as_one_object(shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    found = told("plan", shop.recipe("parrot"), "--store", store)
    assert set(found) == {
        "base", "learnings", "setup", "choices", "steps", "tokens", "computed", "packs", "memory", "time", "fit",
        "overrides", "tokens_per_second",
    }  # fmt: skip
    assert found["setup"] == {
        "pack_tokens": 1024, "checkpointing": False, "working_copies": False, "recompute_mlp": False, "offload": False,
        "table_on_host": False,
    }  # fmt: skip
    assert found["overrides"] == ["training.pack_tokens=1024", "training.checkpointing=false"]
    assert set(found["memory"]) == {
        "base", "adapters", "work", "writing", "peak", "available", "above", "on_host", "host_room"
    }  # fmt: skip
    assert set(found["time"]) == {"total", "evaluating", "writing"}
    assert found["choices"]["computation"]["value"] == "fused decoder"
    assert all(choice["reason"] for choice in found["choices"].values())
    assert (found["steps"], found["learnings"][0]["rows"], found["fit"]) == (3, 12, None)
    assert not store.exists()


def test_a_plan_for_people(shop: Shop) -> None:
    result = ahl("plan", shop.recipe("moods"), "-o", "training.epochs=2", "--fit", "900GB")
    assert result.exit_code == 0, result.stderr
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert lines["moods"].split()[1:5] == ["lora", "of", "rank", "2"]
    assert "fused encoder" in lines["computation"]
    assert "the base is built as BERT is" in lines["computation"]
    assert "the card" not in lines["dtype"]
    assert "6, in 6 packs (1.0 a step)" in lines["steps"]
    assert "at most: the process with the base loaded" in lines["memory"]
    assert "--fit 900 GB" in lines["memory"]
    assert "tokens/s" in lines["time"]
    assert "As overrides: -o training.pack_tokens=1024 -o training.checkpointing=false" in result.stdout


def test_what_does_not_fit_is_an_error_with_numbers(shop: Shop) -> None:
    found = told("plan", shop.recipe("parrot"), "--fit", "1MB", code=1)["error"]
    assert found["type"] == "CapacityError"
    assert "1.00 MB may be taken (--fit)" in found["message"]
    assert "adapter.rank" in found["hint"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--fit", "much"], 1, "is not a size"),
        (["-o", "training.pack_tokens=many"], 1, "training.pack_tokens: expected auto, or a number of tokens"),
        (["-o", "training.checkpointing=perhaps"], 1, "training.checkpointing: expected auto, or true or false"),
        (["-o", "training.pack_tokens=0"], 1, "training.pack_tokens"),
    ],
)
def test_what_cannot_be_planned(shop: Shop, arguments: list[str], code: int, message: str) -> None:
    result = ahl("plan", shop.recipe("parrot"), *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_several_are_planned_when_asked_to(shop: Shop, tmp_path: Path) -> None:
    twice = [shop.recipe("parrot")] * 2
    assert ahl("plan", *twice).exit_code == 2
    assert ahl("plan", *twice, "--together", "--write", tmp_path / "x.yaml").exit_code == 2
    found = told("plan", *twice, "--together")
    assert len(found["learnings"]) == 2
    assert found["steps"] == 3


def test_a_recipe_that_fits_is_written(shop: Shop, tmp_path: Path) -> None:
    target = tmp_path / "fitting.yaml"
    result = ahl("plan", shop.recipe("parrot"), "--write", target)
    assert result.exit_code == 0, result.stderr
    assert f"ahl train {target}" in result.stdout
    assert load_recipe(target).training.pack_tokens == 1024
    assert ahl("plan", shop.recipe("parrot"), "--write", target).exit_code == 1
    result = ahl("train", target, "--store", tmp_path / "store")
    assert result.exit_code == 0, result.stderr


def test_several_learners_have_a_line_each(shop: Shop) -> None:
    from adapterhub_lite.workflows.plan import plan

    made = plan(shop.recipe("parrot"), load_recipe(shop.recipe("parrot"), {"name": "other"}))
    lines = plan_lines(made)
    assert [line.split()[0] for line in lines[2:4]] == ["parrot", "other"]


def test_advice_says_whether_one_change_is_enough() -> None:
    from adapterhub_lite.workflows.plan_refusal import _advice

    knobs = [(600, "quantize: nf4"), (300, "adapter.rank: 8"), (0, "a smaller base")]
    assert _advice(knobs, 500).startswith("Change one of these: quantize: nf4 takes about 600 B less; ")
    assert _advice(knobs, 800).startswith("It needs 800 B less; change several of these: ")
    assert _advice(knobs, 1000).startswith("It needs 1.00 kB less, more than all of these save: ")
