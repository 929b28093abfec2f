"""Commands about this machine: recipes, base, doctor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Shop, ahl, told


def test_recipes_lists_what_can_be_trained() -> None:
    names = [recipe["name"] for recipe in told("recipes")["recipes"]]
    assert {"sql", "sentiment", "topics"} <= set(names)
    assert all(name in ahl("recipes").stdout for name in names)


def test_recipes_show_prints_yaml() -> None:
    assert yaml.safe_load(ahl("recipes", "show", "sql").stdout)["name"] == "sql"
    assert yaml.safe_load(told("recipes", "show", "sql")["yaml"])["name"] == "sql"
    near = ahl("recipes", "show", "sqll")
    assert near.exit_code == 1
    assert "Did you mean sql? `ahl recipes` says what they do." in near.stderr.replace("\n", " ")


def test_recipes_show_reads_no_other_file(shop: Shop) -> None:
    assert ahl("recipes", "show", shop.recipe("parrot")).exit_code == 1


def test_base_list_says_what_is_here() -> None:
    bases = told("base", "list")["bases"]
    assert {base["name"] for base in bases} >= {"smollm2-135m-instruct", "minilm-l6"}
    assert all(base["folder"] is None for base in bases)
    assert "no" in ahl("base", "list").stdout


def test_base_show_of_a_folder_and_of_one_that_is_not_here(shop: Shop) -> None:
    found = told("base", "show", shop.causal)
    assert (found["model_type"], found["folder"]) == ("llama", shop.causal)
    assert "ahl base pull minilm-l6" in ahl("base", "show", "minilm-l6").stdout
    assert ahl("base", "show", "nonsense").exit_code == 1


def test_base_pull_of_a_folder_and_without_a_network(shop: Shop) -> None:
    assert told("base", "pull", shop.causal)["origin"] == "folder"
    off = ahl("base", "pull", "minilm-l6")
    assert off.exit_code == 1
    assert "No source of the base minilm-l6 answered" in off.stderr


def test_doctor_says_each_choice_and_why(shop: Shop) -> None:
    found = told("doctor", "--store", shop.store)
    facts = {fact["name"]: fact for fact in found["facts"]}
    assert found["sound"]
    assert {"device", "dtype", "CPU kernels", "quantisation", "store", "cache", "torch"} <= set(facts)
    assert facts["device"]["reason"]
    assert facts["store"]["reason"] == "asked for with --store"
    assert facts["base minilm-l6"]["state"] == "warning"
    assert "Everything works." in ahl("doctor").stdout


def test_doctor_finds_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "file" / "cache"))
    found = told("doctor", code=1)
    wrong = [fact["name"] for fact in found["facts"] if fact["state"] == "trouble"]
    assert wrong == ["cache"]


def test_doctor_finds_old_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from adapterhub_lite.cli import diagnosis

    def version(name: str) -> str:
        if name == "rich":
            raise PackageNotFoundError(name)
        return "0.0.1"

    monkeypatch.setattr(diagnosis, "version", version)
    states = {fact.name: fact for fact in diagnosis._versions()}
    assert states["torch"].state == states["rich"].state == "trouble"
    assert "pip install 'torch>=" in states["torch"].reason


def test_demo_hands_over_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub_lite.events import Listener
    from adapterhub_lite.store import Store
    from adapterhub_lite.workflows import demo

    def run_demo(json_path: Path | None, *, store: Store, say: Callable[[str], None], on_event: Listener) -> None:
        say(f"{json_path} {store.path}")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    figures = tmp_path / "figures.json"
    assert ahl("demo", "--json", figures).stdout == f"{figures} {tmp_path / 'home'}\n"
