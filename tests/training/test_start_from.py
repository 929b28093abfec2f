"""Training that goes on from a stored version's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import stored_adapter
from adapterhub_lite.errors import AdapterMismatch, BaseMismatch, RecipeError, StoreError
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.train import train
from tests.training import recipes

KINDS = {
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "dora": {"type": "dora", "rank": 4, "alpha": 8},
    "prefix": {"type": "prefix", "tokens": 4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_it_begins_with_the_stored_values(tiny_base, tmp_path: Path, family: str, kind: str):
    """A step of no length leaves them as they were."""
    base, store = tiny_base(family), Store()
    path = recipes.write(tmp_path, base, KINDS[kind])
    first = train(path, store=store, base=base)
    still = {"start_from": "tiny@1", "training.learning_rate": 1e-30, "training.max_steps": 1}
    again = train(path, store=store, base=base, overrides=still)
    one, other = (stored_adapter(store.read(ref)).tensors for ref in (first, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    card = store.card(again)
    assert card.parents == ["tiny@1"]
    assert card.recipe["start_from"] == "tiny@1"
    assert store.card(first).parents == []
    with pytest.raises(StoreError, match="in use by tiny@2"):
        store.remove("tiny@1")


def test_it_goes_on_learning(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    path = recipes.write(tmp_path, base, KINDS["lora"], {"learning_rate": 0.01})
    train(path, store=store, base=base)
    train(path, store=store, base=base, overrides={"start_from": "tiny"})
    first, second = (store.card(f"tiny@{n}").origin["losses"] for n in (1, 2))
    assert second[0] < first[0]
    assert store.card("tiny@2").parents == ["tiny@1"]


@pytest.mark.parametrize(
    ("kind", "changes", "error", "said"),
    [
        ("lora", {"adapter.rank": 8}, RecipeError, r"has rank 4, the recipe's 8"),
        ("lora", {"adapter.alpha": 16}, RecipeError, r"is scaled by 2, the recipe's by 4"),
        ("lora", {"adapter.targets": ["q_proj"]}, AdapterMismatch, r"changes 14 layers, the recipe 2"),
        ("lora", {"adapter": KINDS["dora"]}, RecipeError, "no adapter of type dora"),
        ("lora", {"adapter": KINDS["prefix"]}, RecipeError, "no adapter of type prefix"),
        ("prefix", {"adapter.tokens": 5}, RecipeError, r"has 4 tokens, the recipe's 5"),
        ("prefix", {"adapter.projection": True}, RecipeError, "projection is not stored"),
        ("prefix", {"adapter": KINDS["lora"]}, RecipeError, "no adapter of type lora"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(tiny_base, tmp_path: Path, kind, changes, error, said):
    base, store = tiny_base("llama"), Store()
    path = recipes.write(tmp_path, base, KINDS[kind])
    train(path, store=store, base=base)
    with pytest.raises(error, match=said):
        train(path, store=store, base=base, overrides={"start_from": "tiny@1", **changes})
    assert store.versions("tiny") == [1]
    assert not (store.path / "runs").is_dir() or not any((store.path / "runs").iterdir())


def test_other_labels_are_refused(tiny_base, tmp_path: Path):
    base, store = tiny_base("bert"), Store()
    path = recipes.write(tmp_path, base, KINDS["lora"])
    train(path, store=store, base=base)
    more = {"start_from": "tiny", "task.labels": ["odd", "even", "third"]}
    with pytest.raises(RecipeError, match=r"3 labels \(even, odd, third\), this task 3 \(odd, even, third\)"):
        train(path, store=store, base=base, overrides=more)


def test_another_base_is_refused(tiny_base, tmp_path: Path):
    store = Store()
    train(recipes.write(tmp_path, tiny_base("llama"), KINDS["lora"]), store=store, base=tiny_base("llama"))
    other = tiny_base("llama", seed=5)
    path = recipes.write(tmp_path, other, KINDS["lora"])
    with pytest.raises(BaseMismatch, match="weights differ"):
        train(path, store=store, base=other, overrides={"start_from": "tiny"})


def test_a_version_that_is_not_there(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    path = recipes.write(tmp_path, base, KINDS["lora"])
    with pytest.raises(RecipeError, match="start_from"):
        train(path, store=Store(), base=base, overrides={"start_from": "tiny@3"})
    for wrong in ("tiny@", "no such", "a@b"):
        with pytest.raises(RecipeError, match="start_from"):
            load_recipe(path, {"start_from": wrong})


def test_resuming_needs_the_same_start(tiny_base, tmp_path: Path):
    from adapterhub_lite.errors import TrainingFailed
    from tests.training.test_resume import Killed, at_step

    base, store = tiny_base("llama"), Store()
    path = recipes.write(tmp_path, base, KINDS["lora"], {"checkpoint_every": 1})
    more: dict[str, Any] = {"store": store, "base": base}
    train(path, **more)
    with pytest.raises(Killed):
        train(path, **more, overrides={"start_from": "tiny"}, on_event=at_step(3))
    train(path, **more)
    with pytest.raises(TrainingFailed, match=r"start_from was tiny@1 .*, is tiny@2 "):
        train(path, **more, overrides={"start_from": "tiny"}, resume=True)


def test_from_is_another_spelling(tmp_path):
    from adapterhub_lite.errors import RecipeError
    from adapterhub_lite.recipe import load_recipe

    plain = load_recipe("topics", overrides=["start_from=topics@3"])
    assert load_recipe("topics", overrides=["from=topics@3"]) == plain
    path = tmp_path / "mine.yaml"
    text = "name: mine\nbase: minilm-l6\nfrom: topics@3\ntask: {type: classify}\ndata: {train: x.jsonl}\n"
    text += "adapter: {type: lora}\n"
    path.write_text(text)
    found = load_recipe(path, check_files=False)
    assert (found.start_from, found.line_of("start_from")) == ("topics@3", 3)
    path.write_text(text + "start_from: topics@2\n")
    with pytest.raises(RecipeError, match="the same as 'start_from'"):
        load_recipe(path, check_files=False)
