"""What is wrong with a recipe is said before its base is loaded, with the recipe's line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import RecipeError
from adapterhub_lite.recipe import changed_recipe, load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import plan as planning
from adapterhub_lite.workflows import search_group
from adapterhub_lite.workflows import train as workflow
from adapterhub_lite.workflows.plan import plan
from adapterhub_lite.workflows.sweep import sweep
from adapterhub_lite.workflows.train import train, train_together
from tests.training import recipes

LORA = {"type": "lora", "rank": 4, "alpha": 8}


def as_yaml(path: Path, **changes: Any) -> Path:
    """The recipe with one field a line, and other ones."""
    recipe = {**json.loads(path.read_text()), **changes}
    lines = []
    for key, value in recipe.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {json.dumps(one)}" for name, one in value.items())]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def line_of(path: Path, start: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(start))


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (workflow, planning, search_group):
        monkeypatch.setattr(module, "load_base", lambda *a, **k: pytest.fail("a base is loaded"))


@pytest.mark.parametrize(
    ("adapter", "path", "said"),
    [
        ({"method": "VERRA"}, "adapter.method", "VERRA is not trained through PEFT's layers. Did you mean 'VERA'?"),
        ({"method": "ADALORA"}, "adapter.method", "It is a schedule as well as layers; train LoRA."),
        ({"method": "XLORA"}, "adapter.method", "it is a mixture of other adapters"),
        ({"method": "VERA", "options": {"rank": 4}}, "adapter.options.rank", "unknown key"),
        ({"method": "VERA", "options": {"vera_dropot": 0}}, "adapter.options", "Did you mean 'vera_dropout'?"),
        ({"method": "VERA", "options": {"r": 0}}, "adapter.options.r", "expected a whole number from 1 to"),
        ({"method": "LOHA", "options": {"r": "many"}}, "adapter.options.r", "expected a whole number"),
        ({"method": "GRALORA", "options": {"r": 7}}, "adapter.options.r", "is no multiple of gralora_k"),
        ({"method": "VERA", "options": {"target_modules": ["q"]}}, "adapter.options", "Use adapter.targets."),
    ],
)
def test_what_no_method_has(
    tiny_base: Callable[..., Base], tmp_path: Path, no_base: None, adapter: dict[str, Any], path: str, said: str
) -> None:
    file = as_yaml(recipes.write(tmp_path, tiny_base("llama"), LORA), adapter={"type": "peft", **adapter})
    for run in (lambda: train(file, store=Store(tmp_path / "s")), lambda: plan(file, store=Store(tmp_path / "s")),
                lambda: sweep(file, ["learning_rate=1e-3,1e-4"], store=Store(tmp_path / "s"))):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            run()
        (problem,) = caught.value.problems
        assert problem.path.startswith(path)
        assert said in str(problem)
        assert problem.line == line_of(file, "method" if path == "adapter.method" else "options")
        assert str(file) in caught.value.message
    assert not (tmp_path / "s").exists()


def test_peft_reads_options_too(
    tiny_base: Callable[..., Base], tmp_path: Path, no_base: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only PEFT refuses is refused by PEFT, as early."""
    import peft

    def refuses(self: Any) -> None:
        raise ValueError("no such thing\nat all")

    monkeypatch.setattr(peft.VeraConfig, "__post_init__", refuses)
    file = recipes.write(tmp_path, tiny_base("llama"), {"type": "peft", "method": "vera", "options": {"r": 4}})
    with pytest.raises(RecipeError, match=r"adapter.options.*PEFT refuses them for VERA: no such thing"):
        train(file, store=Store(tmp_path / "s"))


@pytest.fixture
def trained(tiny_base: Callable[..., Base], tmp_path: Path) -> tuple[Path, Store]:
    base, store = tiny_base("llama"), Store(tmp_path / "store")
    path = recipes.write(tmp_path, base, LORA)
    train(path, store=store, base=base)
    return path, store


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_from": "tiny@7"}, "tiny"),
        ({"start_from": "nobody"}, "nobody"),
        ({"adapter": {**LORA, "rank": 8}}, "tiny@1 has rank 4, the recipe's 8."),
        ({"adapter": {**LORA, "alpha": 16}}, "tiny@1 is scaled by 2, the recipe's by 4 (alpha, rslora)."),
        ({"adapter": {**LORA, "rslora": True}}, "tiny@1 is scaled by 2, the recipe's by 4 (alpha, rslora)."),
        ({"adapter": {**LORA, "type": "dora"}}, "tiny@1 is no adapter of type dora, which the recipe trains."),
        ({"adapter": {"type": "prefix"}}, "tiny@1 is no adapter of type prefix"),
        ({"adapter": {"type": "peft", "method": "IA3"}}, "Adapters of type peft cannot start from a stored version."),
    ],
)
def test_what_nothing_can_start_from(
    trained: tuple[Path, Store], no_base: None, changes: dict[str, Any], said: str
) -> None:
    path, store = trained
    as_yaml(path, **{"start_from": "tiny@1", **changes})
    with pytest.raises(RecipeError) as caught:
        train(path, store=store)
    (problem,) = caught.value.problems
    assert problem.path == "start_from"
    assert problem.line == line_of(path, "start_from") > 0
    assert said in problem.message
    with pytest.raises(RecipeError):
        train_together([path, path], store=store)
    assert store.versions("tiny") == [1]


def test_patterns_are_compared_when_the_base_is_there(
    trained: tuple[Path, Store], tiny_base: Callable[..., Base]
) -> None:
    """Another rank in words, the same in layers."""
    path, store = trained
    every = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 4}
    alphas = dict.fromkeys(every, 8)
    as_yaml(path, start_from="tiny@1", adapter={**LORA, "rank": 2, "rank_pattern": every, "alpha_pattern": alphas})
    assert str(train(path, store=store, base=tiny_base("llama"))) == "tiny@2"


def test_every_point_of_a_grid_is_looked_at(trained: tuple[Path, Store], no_base: None) -> None:
    path, store = trained
    as_yaml(path, start_from="tiny@1")
    with pytest.raises(RecipeError, match=r"tiny@1 has rank 4, the recipe's 16"):
        sweep(path, {"rank": [4, 16]}, store=store)


def test_lines_are_those_of_the_file_and_not_of_overrides(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    path = as_yaml(recipes.write(tmp_path, tiny_base("llama"), LORA))
    recipe = load_recipe(path, {"training.epochs": 2})
    assert recipe.line_of("adapter.rank") == line_of(path, "rank:")
    assert recipe.line_of("adapter.dropout") == line_of(path, "adapter:")
    assert recipe.line_of("training.epochs") == line_of(path, "training:")
    assert recipe.line_of("start_from") == 0
    assert load_recipe(path, {"adapter": LORA}).line_of("adapter.rank") == 0
    assert changed_recipe(recipe, {"adapter.rank": 8}).line_of("adapter.rank") == 0
    assert recipe == load_recipe(path, {"training.epochs": 2})
