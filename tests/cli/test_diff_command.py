"""`ahl diff`: sections on a screen, JSON, live answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.adapters.compare import Comparison, Overlap
from adapterhub_lite.cli.differences import difference_lines
from adapterhub_lite.workflows.difference import (
    Answers,
    Change,
    ChangedAnswer,
    DataChange,
    Difference,
    MetricChange,
    Side,
)
from tests.cli.conftest import Shop, ahl, told


@pytest.fixture(scope="module")
def store(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop's store with parrot@2, of another rank and rate, and parrot@3, a DoRA."""
    folder = tmp_path_factory.mktemp("diff")
    copy = shutil.copytree(shop.store, folder / "store", copy_function=shutil.copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AHL_CACHE", str(folder / "cache"))
        for changed in (["adapter.rank=3", "training.learning_rate=0.5"], ["adapter.type=dora"]):
            options = [part for one in changed for part in ("-o", one)]
            result = ahl("train", shop.recipe("parrot"), *options, "--store", copy)
            assert result.exit_code == 0, result.stderr
    return copy


def sections(text: str) -> dict[str, list[str]]:
    """Titles and the indented lines below them."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            found[line] = []
        else:
            found[list(found)[-1]].append(line)
    return found


def test_two_versions_on_one_screen(store: Path) -> None:
    result = ahl("diff", "parrot@1", "parrot", "--store", store)
    assert result.exit_code == 0
    text = ahl("diff", "parrot@1", "parrot@2", "--store", store).stdout
    found = sections(text)
    assert text.splitlines()[0].split()[:3] == ["a", "parrot@1", "lora"]
    assert [line.split() for line in found["recipe:"]] == [
        ["FIELD", "parrot@1", "parrot@2"],
        ["adapter.rank", "2", "3"],
        ["training.learning_rate", "0.01", "0.5"],
    ]
    assert found["base: the same"] == []
    assert found["data: the same (train 12 rows, test 4 rows)"] == []
    assert "adapter.rank" not in "\n".join(found["made:"])
    head, *layers, whole = found["weights:"]
    assert head.split() == ["LAYER", "parrot@1", "parrot@2", "COSINE"]
    assert [line.split()[0] for line in layers] == ["model.layers.0", "model.layers.1"]
    weights = told("diff", "parrot@1", "parrot@2", "--store", store)["weights"]
    assert whole.split()[:4] == [
        "whole",
        f"{weights['whole'][0]['norm_a']:.3g}",
        f"{weights['whole'][0]['norm_b']:.3g}",
        f"{weights['whole'][0]['cosine']:+.3f}",
    ]
    assert len(text.splitlines()) < 45


def test_all_modules(store: Path) -> None:
    found = sections(ahl("diff", "parrot@1", "parrot@2", "--layers", "--store", store).stdout)["weights:"]
    modules = told("diff", "parrot@1", "parrot@2", "--store", store)["weights"]["modules"]
    assert len(modules) == 14
    shown = " ".join(found).split()
    assert all(one["name"] in shown and f"{one['cosine']:+.3f}" in shown for one in modules)


def test_recorded_answers_that_changed(store: Path) -> None:
    (answers,) = told("diff", "parrot@1", "parrot@2", "--store", store)["answers"]
    cards = [told("show", f"parrot@{i}", "--store", store)["card"]["examples"]["test"]["answers"] for i in (1, 2)]
    changed = [i for i in range(4) if cards[0][i] != cards[1][i]]
    assert changed
    assert answers["compared"] == 4
    assert [(one["row"], one["prompt"], one["reference"], one["a"], one["b"]) for one in answers["changed"]] == [
        (i, f"say {i}", f"{i}!", cards[0][i], cards[1][i]) for i in changed
    ]
    text = ahl("diff", "parrot@1", "parrot@2", "--store", store).stdout
    lines = sections(text)[f"answers recorded: {len(changed)} of 4 rows of test differ:"]
    assert f"  row {changed[0]}: say {changed[0]}" in lines


def test_live_answers_are_the_recorded_ones(store: Path) -> None:
    recorded, live = told("diff", "parrot@1", "parrot@2", "--outputs", "2", "--store", store)["answers"]
    assert (live["live"], live["compared"]) == (True, 2)
    assert live["changed"] == [one for one in recorded["changed"] if one["row"] in (0, 2)]
    result = ahl("diff", "parrot@1", "parrot@2", "--outputs", "2", "--store", store)
    assert "answers given now: " in result.stdout
    assert "loading" in result.stderr


def test_the_same_is_said(store: Path) -> None:
    ahl("alias", "parrot:prod", "1", "--store", store)
    result = ahl("diff", "parrot:prod", "parrot@1", "--outputs", "3", "--store", store)
    assert result.stdout.startswith("parrot@1 and parrot@1 are the same, byte for byte (digest ")
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""
    assert told("diff", "parrot:prod", "parrot@1", "--store", store)["same"] is True


def test_types_that_cannot_be_compared(store: Path) -> None:
    text = ahl("diff", "parrot@1", "parrot@3", "--store", store).stdout
    assert "weights: not compared: parrot@1 is lora, parrot@3 is dora" in text
    assert told("diff", "parrot@1", "parrot@3", "--store", store)["weights"] is None


def test_adapters_of_different_bases(store: Path) -> None:
    text = ahl("diff", "parrot@1", "moods", "--store", store).stdout
    found = sections(text)
    assert "on other rows" not in text  # no metric in common
    assert any(line.split()[0] == "fingerprint.weights" for line in found["base:"])
    assert "answers recorded: test not compared: recorded on different rows" in found
    refused = ahl("diff", "parrot@1", "moods", "--outputs", "1", "--store", store)
    assert refused.exit_code == 1
    assert "so no base can let both answer" in refused.stderr
    assert "loading" not in refused.stderr
    assert refused.stdout == text, "the rest is printed"
    told_of = told("diff", "parrot@1", "moods", "--outputs", "1", "--store", store, code=1)
    assert "no base can let both answer" in told_of["outputs_refused"]
    assert told_of["base"]


def test_other_columns_are_told_before_a_base_is_loaded(store: Path, tmp_path: Path, shop: Shop) -> None:
    for file in ("parrot.jsonl", "parrot-test.jsonl"):
        text = (shop.folder / file).read_text().replace("question", "ask")
        (tmp_path / file).write_text(text)
    recipe = (shop.folder / "parrot.yaml").read_text().replace("question", "ask").replace("parrot\n", "asker\n", 1)
    (tmp_path / "asker.yaml").write_text(recipe)
    other = shutil.copytree(store, tmp_path / "store", copy_function=shutil.copy)
    assert ahl("train", tmp_path / "asker.yaml", "--store", other).exit_code == 0
    for base in ([], ["--base", shop.causal]):
        refused = ahl("diff", "parrot@1", "asker", "--outputs", "2", *base, "--store", other)
        assert refused.exit_code == 1
        assert "loading" not in refused.stderr
        assert "read other columns" in refused.stderr
        assert refused.stdout == ahl("diff", "parrot@1", "asker", "--store", other).stdout


def test_wrong_usage(store: Path, shop: Shop) -> None:
    for options in (["--base", shop.causal], ["--device", "cpu"], ["--quantize", "none"]):
        result = ahl("diff", "parrot@1", "parrot@2", *options, "--store", store)
        assert result.exit_code == 2
        assert "--outputs" in result.stderr
    assert ahl("diff", "parrot@1", "parrot@2", "--outputs", "-1", "--store", store).exit_code == 2
    assert ahl("diff", "parrot@1", "--store", store).exit_code == 2
    missing = ahl("diff", "parrot@1", "parrot@9", "--store", store)
    assert missing.exit_code == 1
    assert "There is no parrot@9" in missing.stderr


def test_a_base_of_ones_own_choice(store: Path, shop: Shop) -> None:
    options = ["--outputs", "1", "--base", shop.causal, "--store", store]
    assert told("diff", "parrot@1", "parrot@2", *options)["answers"][1]["compared"] == 1
    other = ahl("diff", "parrot@1", "parrot@2", "--outputs", "1", "--base", shop.folder / "bert", "--store", store)
    assert other.exit_code == 1
    assert "was made for" in other.stderr


# --- rendering ---------------------------------------------------------------------------------------------------


def difference(**given: Any) -> Difference:
    sides = [Side(f"sql@{i}", str(i) * 64, "2026-01-31T12:00:00Z", "lora") for i in (1, 2)]
    none: dict[str, Any] = dict.fromkeys(("recipe", "base", "data", "metrics", "made", "answers"), ())
    notes = {"recipe_note": "", "weights": None, "weights_note": "of different kinds"}
    flags = {"same": False, "same_weights": False, "same_config": False}
    return Difference(**{"a": sides[0], "b": sides[1], **flags, **none, **notes, **given})


def layered(count: int, *more: Overlap) -> Comparison:
    layers = tuple(Overlap(f"layers.{i}", "delta", 1.0, 2.0, 2.0 * (-1) ** i) for i in range(count))
    return Comparison("lora", (*layers, *more), layers, (Overlap("whole", "delta", 3.0, 4.0, 6.0),))


def test_what_is_the_same_takes_one_line_each() -> None:
    lines = difference_lines(difference())
    assert lines[2:] == [
        "recipe: the same",
        "base: the same",
        "data: none recorded",
        "metrics: none recorded",
        "made: the same",
        "weights: not compared: of different kinds",
        "answers: none recorded; --outputs N lets both answer now",
    ]
    alike = difference(weights=layered(2), same_weights=True, same_config=True)
    assert "weights: the same" in difference_lines(alike)
    assert "weights: the same" not in difference_lines(alike, modules=True)
    assert "weights: the same" not in difference_lines(difference(weights=layered(2), same_weights=True))
    assert "recipe: only sql@1 has one" in difference_lines(difference(recipe_note="only sql@1 has one"))


def test_many_layers_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    found = difference(weights=layered(30))
    monkeypatch.setenv("COLUMNS", "100")
    lines = difference_lines(found)
    assert all(len(line) <= 100 for line in lines)
    weights = sections("\n".join(lines))["weights:"]
    assert len(weights) == 1 + 15 + 1
    assert [word for word in weights[1].split() if "layers" in word] == ["layers.0", "layers.15"]
    assert [word for word in weights[15].split() if "layers" in word] == ["layers.14", "layers.29"]
    monkeypatch.setenv("COLUMNS", "40")
    assert len(sections("\n".join(difference_lines(found)))["weights:"]) == 32
    monkeypatch.delenv("COLUMNS")  # no terminal: one layer a line, for other programs
    assert len(sections("\n".join(difference_lines(found)))["weights:"]) == 32


def test_bars_and_signs_of_cosines() -> None:
    rows = (
        Overlap("same", "delta", 2.0, 2.0, 4.0),
        Overlap("half", "delta", 2.0, 2.0, -2.0),
        Overlap("none", "delta", 2.0, 2.0, 0.0),
        Overlap("lone", "delta", None, 2.0, 0.0),
        Overlap("wide", "delta", 2.0, 2.0, None),
        Overlap("size", "magnitude", 1.0, 1.0, 1.0),
    )
    found = difference(weights=Comparison("dora", rows, rows, ()))
    cells = {line.split()[0]: line.split()[1:] for line in difference_lines(found, modules=True) if line[:2] == "  "}
    assert cells["same"] == ["2", "2", "+1.000", "████████"]
    assert cells["half"] == ["2", "2", "-0.500", "████"]
    assert cells["none"] == ["2", "2", "+0.000"]
    assert cells["lone"] == ["-", "2", "-"]
    assert cells["wide"] == ["2", "2", "-"]
    assert cells["size"][0] == "magnitude"
    assert "  only in sql@2: lone" in difference_lines(found)


def test_metrics_of_other_rows_are_marked() -> None:
    metrics = (MetricChange("test", "exact_match", 0.5, 0.75, True), MetricChange("validation", "f1", 0.5, 0.25, False))
    data = (DataChange("test", True, None, None), DataChange("train", False, {"rows": 3, "sha256": "a" * 64,
            "source": "x.jsonl"}, None))  # fmt: skip
    found = sections("\n".join(difference_lines(difference(metrics=metrics, data=data))))
    assert found["metrics:"][1].split() == ["test", "exact_match", "0.500", "0.750", "+0.250"]
    assert found["metrics:"][2].endswith("-0.250  on other rows")
    assert found["data:"][1].split()[:3] == ["test", "the", "same"]
    assert "3 rows, aaaaaaaaaaaa, x.jsonl  -" in found["data:"][2]
    same = difference(metrics=(MetricChange("test", "exact_match", 0.5, 0.5, True),))
    assert "metrics: the same (test exact_match 0.500)" in difference_lines(same)
    other = difference(metrics=(MetricChange("test", "exact_match", 0.5, 0.5, False),))
    assert "metrics:" in difference_lines(other)


def test_long_values_are_shown_where_they_differ() -> None:
    recipe = (Change("task.system", "x" * 300 + "Be brief.", "x" * 300 + "Be kind."),)
    line = sections("\n".join(difference_lines(difference(recipe=recipe))))["recipe:"][1]
    assert "Be brief." in line
    assert "Be kind." in line
    assert len(line) < 150


def test_what_the_recipe_says_is_not_said_again() -> None:
    recipe = (Change("training.seed", 0, 1), Change("adapter.rank", 2, 3))
    made = (Change("adapter.rank", 2, 3), Change("seed", 0, 1), Change("duration_seconds", 0.25, 200.0))
    found = sections("\n".join(difference_lines(difference(recipe=recipe, made=made))))["made:"]
    assert [line.split(maxsplit=1) for line in found[1:]] == [["duration_seconds", "0.25 s  3:20"]]
    alone = sections("\n".join(difference_lines(difference(made=made))))["made:"]
    assert [line.split()[0] for line in alone[1:]] == ["adapter.rank", "seed", "duration_seconds"]


def test_answers_cannot_steer_the_terminal_and_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    changed = tuple(ChangedAnswer(i, "a" * 500 + "\x1b[2J", "a" * 500 + "b", "p\n" * 200, "r") for i in range(6))
    found = difference(answers=(Answers("test", False, 8, changed), Answers("test", True, 2, ())))
    lines = difference_lines(found)
    assert all(line.isprintable() and len(line) <= 60 for line in lines)
    block = sections("\n".join(lines))["answers recorded: 6 of 8 rows of test differ:"]
    assert sum(line.startswith("  row ") for line in block) == 4
    assert block[-1] == "  and 2 more; --json shows all"
    assert "\\x1b[2J" in block[1]
    assert "answers given now: the same to all 2 rows of test" in lines
