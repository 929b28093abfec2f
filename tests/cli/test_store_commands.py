"""Commands on the store: list, show, alias, remove, export, import, verify."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.cli.conftest import Shop, ahl, told


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


@pytest.mark.parametrize("wrong", [["parrot", "1"], ["parrot:prod", "1", "--remove"]])
def test_alias_refuses_what_makes_no_sense(store: Path, wrong: list[str]) -> None:
    assert ahl("alias", *wrong, "--store", store).exit_code == 2


def test_export_then_import_is_the_same_adapter(store: Path, tmp_path: Path) -> None:
    exported = told("export", "parrot@1", tmp_path / "out", "--store", store)
    assert (Path(exported["path"]) / "adapter_config.json").is_file()
    made = told("import", tmp_path / "out", "--name", "copy", "--base", "renamed", "--store", store)
    assert (made["ref"], made["base"]) == ("copy@1", "renamed")
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
    assert ahl("import", tmp_path / "out", "--name", "odd", "--base", "a\x1b[2Jb", "--store", store).exit_code == 0
    for arguments in (["list"], ["show", "odd"]):
        assert "\x1b" not in ahl(*arguments, "--store", store).stdout
