"""Commands on the store: list, show, alias, remove, export, import, verify."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.cli.conftest import Shop, ahl, told
from tests.formats.build import lora_files


@pytest.fixture
def store(shop: Shop, tmp_path: Path) -> Path:
    """A copy of the shop's store, to be changed."""
    return shutil.copytree(shop.store, tmp_path / "store", copy_function=shutil.copy)


def test_list_shows_every_version_with_its_facts(shop: Shop) -> None:
    result = ahl("list", "--store", shop.store)
    head, moods, parrot = result.stdout.splitlines()
    assert head.split() == ["ADAPTER", "TYPE", "BASE", "QUANT", "METRIC", "ALIASES", "CREATED", "SIZE"]
    assert moods.startswith("moods@1")
    assert "accuracy" in moods
    assert parrot.startswith("parrot@1")
    assert "exact_match" in parrot
    assert "llama" in parrot
    assert result.exit_code == 0
    assert result.stderr == ""


def test_list_fits_a_narrow_terminal(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "32")
    lines = ahl("list", "--store", shop.store).stdout.splitlines()
    assert all(len(line) <= 32 for line in lines)
    assert lines[1].startswith("moods@1")


def test_list_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    assert "ahl train sql" in ahl("list", "--store", tmp_path / "none").stdout
    assert told("list", "--store", tmp_path / "none")["adapters"] == []
    assert not (tmp_path / "none").exists()


def test_list_as_json(shop: Shop) -> None:
    one = told("list", "--store", shop.store)["adapters"][1]
    assert (one["ref"], one["type"], one["quantization"], one["task"]) == ("parrot@1", "lora", "none", "instruct")
    assert one["metric"]["name"] == "exact_match"
    assert one["metric"]["split"] == "test"


def test_show_tells_the_card(shop: Shop) -> None:
    text = ahl("show", "parrot", "--store", shop.store).stdout
    for part in ("parrot@1: lora, trained", "fingerprint", "3 steps", "adapter_model.safetensors", "training: {"):
        assert part in text
    found = told("show", "parrot@1", "--store", shop.store)
    assert found["ref"] == "parrot@1"
    assert found["card"]["recipe"]["name"] == "parrot"
    assert set(found["files"]) == {"adapter_config.json", "adapter_model.safetensors", "card.json"}


def test_the_recipe_that_show_prints_is_that_recipe(shop: Shop, tmp_path: Path) -> None:
    from adapterhub_lite.recipe import load_recipe, recipe_dict

    text = ahl("show", "parrot", "--store", shop.store).stdout
    lines = text.partition("recipe:\n")[2].partition("\n\n")[0].splitlines()
    (tmp_path / "again.yaml").write_text("\n".join(line[2:] for line in lines), "utf-8")
    again = load_recipe(tmp_path / "again.yaml", check_files=False)
    assert recipe_dict(again) == recipe_dict(load_recipe(shop.recipe("parrot")))


def test_alias_moves_and_remembers(store: Path) -> None:
    assert ahl("alias", "parrot:prod", "1", "--store", store).stdout == "parrot:prod -> parrot@1\n"
    assert told("show", "parrot:prod", "--store", store)["aliases"] == ["prod"]
    assert told("alias", "parrot:prod", "--remove", "--store", store)["version"] is None
    history = told("alias", "parrot:prod", "--store", store)["history"]
    assert [move["version"] for move in history] == [1, None]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three versions of sql and one of other."""
    made = Store(tmp_path / "three")
    for seed in range(3):
        made.put("sql", lora_files(seed), Card())
    made.put("other", lora_files(5), Card())
    return made.path


def test_alias_takes_a_reference_of_its_name(three: Path) -> None:
    for text, line in (
        ("sql@1", "sql:prod -> sql@1\n"),
        ("@2", "sql:prod -> sql@2 (was sql@1)\n"),
        ("3", "sql:prod -> sql@3 (was sql@2)\n"),
        ("sql@3", "sql:prod -> sql@3\n"),
    ):
        assert ahl("alias", "sql:prod", text, "--store", three).stdout == line
    assert told("alias", "sql:next", "sql:prod", "--store", three)["version"] == 3
    assert told("alias", "sql:prod", "1", "--store", three)["from"] == 3
    other = ahl("alias", "sql:prod", "other@1", "--store", three)
    assert other.exit_code == 2
    assert "other@1 is no version of sql" in other.stderr
    assert "Versions are 1, 2, 3" in ahl("alias", "sql:prod", "latest", "--store", three).stderr
    assert ahl("alias", "sql:prod", "--remove", "--store", three).stdout == "sql:prod is taken away (was sql@1)\n"


def test_alias_tells_its_moves_by_whole_names(three: Path) -> None:
    opened = Store(three)
    opened.alias("sql", "prod", 1)
    opened.alias("sql", "prod", 2, event="promote")
    opened.refuse("sql", "prod", 3, {})
    opened.rollback("sql", "prod")
    opened.unalias("sql", "prod")
    lines = ahl("alias", "sql:prod", "--store", three).stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [
        "sql:prod is taken away",
        "sql:prod set to sql@1",
        "sql:prod promoted to sql@2",
        "sql:prod NOT promoted to sql@3",
        "sql:prod rolled back to sql@1",
        "sql:prod taken away",
    ]


def test_a_damaged_alias_can_be_set_again(three: Path) -> None:
    Store(three).alias("sql", "prod", 1)
    (three / "aliases/sql/prod@1/move.json").unlink()
    assert ahl("alias", "sql:prod", "--store", three).exit_code == 1
    assert ahl("alias", "sql:prod", "2", "--store", three).stdout == "sql:prod -> sql@2\n"
    found = told("alias", "sql:prod", "3", "--store", three)
    assert (found["version"], found["from"], found["history"]) == (3, 2, None)


def test_remove_says_which_aliases_go_with_it(three: Path) -> None:
    opened = Store(three)
    for alias in ("prod", "next"):
        opened.alias("sql", alias, 2)
    opened.alias("sql", "old", 1)
    refused = ahl("remove", "sql@2", "--store", three)
    assert refused.exit_code == 1
    assert "in use by sql:next, sql:prod" in refused.stderr
    assert "ahl remove sql@2 --force" in refused.stderr
    forced = ahl("remove", "sql@2", "--force", "--store", three)
    assert forced.stdout == "removed sql@2, and its aliases sql:next, sql:prod\n"
    assert told("remove", "sql:old", "--force", "--store", three)["aliases"] == ["sql:old"]
    assert told("remove", "sql@3", "--store", three)["aliases"] == []


def test_an_alias_that_was_moved_away_meanwhile_is_not_told_as_gone(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = Store.remove
    Store(three).alias("sql", "prod", 2)

    def late(store: Store, ref: Ref, force: bool) -> Ref:
        Store(three).alias("sql", "prod", 3)
        return remove(store, ref, force)

    monkeypatch.setattr(Store, "remove", late)
    assert ahl("remove", "sql@2", "--force", "--store", three).stdout == "removed sql@2\n"


@pytest.mark.parametrize("wrong", [["parrot", "1"], ["parrot:prod", "1", "--remove"]])
def test_alias_refuses_what_makes_no_sense(store: Path, wrong: list[str]) -> None:
    assert ahl("alias", *wrong, "--store", store).exit_code == 2


def test_export_then_import_is_the_same_adapter(store: Path, tmp_path: Path) -> None:
    exported = told("export", "parrot@1", tmp_path / "out", "--store", store)
    assert (Path(exported["path"]) / "adapter_config.json").is_file()
    made = told("import", tmp_path / "out", "--name", "copy", "--store", store)
    assert (made["ref"], made["digest"], made["outcome"]) == ("copy@1", exported["digest"], "stored")
    files = [told("show", ref, "--store", store)["files"]["adapter_model.safetensors"] for ref in ("parrot", "copy")]
    assert files[0] == files[1]
    assert_store_sound(store)


def test_remove_asks_which_version_and_respects_aliases(store: Path, tmp_path: Path) -> None:
    ahl("export", "parrot@1", tmp_path / "out", "--store", store)
    (tmp_path / "out" / "card.json").unlink()  # with it, it would be the version that is there already
    ahl("import", tmp_path / "out", "--name", "parrot", "--store", store)
    vague = ahl("remove", "parrot", "--store", store)
    assert vague.exit_code == 2
    assert "ahl remove parrot@2" in vague.stderr
    ahl("alias", "parrot:prod", "1", "--store", store)
    assert ahl("remove", "parrot@1", "--store", store).exit_code == 1
    assert told("remove", "parrot@1", "--force", "--store", store)["removed"] == "parrot@1"
    assert Store(store).versions("parrot") == [2]
    assert ahl("remove", "parrot", "--store", store).stdout == "removed parrot@2\n"
    assert_store_sound(store)


def test_verify_finds_a_changed_byte(store: Path) -> None:
    assert "sound (2 versions checked)" in ahl("verify", "--store", store).stdout
    file = store / "adapters/parrot/1/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    found = told("verify", "--store", store, code=1)
    assert not found["sound"]
    assert any("parrot@1" in one["where"] for one in found["findings"])
    assert told("verify", "moods", "--store", store)["sound"]
    damaged = ahl("verify", "parrot@1", "--store", store)
    assert damaged.exit_code == 1
    assert "does not match" in damaged.stdout
    assert damaged.stderr == ""


def test_a_damaged_version_does_not_hide_the_others(store: Path) -> None:
    (store / "adapters/parrot/1/card.json").unlink()
    text = ahl("list", "--store", store).stdout
    assert "moods@1" in text
    assert "damaged" in text
    assert ahl("verify", "nothing", "--store", store).exit_code == 1


def test_hostile_text_of_a_folder_cannot_steer_the_terminal(store: Path, tmp_path: Path) -> None:
    ahl("export", "parrot@1", tmp_path / "out", "--store", store)
    Store(store).import_(tmp_path / "out", "odd", {"name": "a\x1b[2Jb"})
    for arguments in (["list"], ["show", "odd"], ["log", "odd"], ["import", str(tmp_path / "out"), "--name", "odd"]):
        result = ahl(*arguments, "--store", store)
        assert result.exit_code == 0, result.stderr
        assert "[2Jb" in result.stdout
        assert "\x1b" not in result.stdout
