"""The demo from end to end on a tiny base: every figure is there and comes from the run."""

from __future__ import annotations

import json
from functools import partial

import pytest

from adapterhub_lite.errors import StoreError
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import demo


@pytest.fixture
def tiny_demo(monkeypatch, tiny_folder):
    """The demo with a tiny base and two steps of training; its thresholds judge a random model, so they are wide."""
    folder = tiny_folder("llama", hidden_size=64, intermediate_size=128, max_position_embeddings=4096)
    changes = {
        "base": str(folder),
        "training.max_steps": 2,
        "training.max_length": 2048,
        "training.learning_rate": 0.05,
    }

    def load(name: str):
        return load_recipe(name, {**changes, **({"task.max_new_tokens": 2} if name == "sql" else {})})

    monkeypatch.setattr(demo, "BASE", str(folder))
    monkeypatch.setattr(demo, "load_recipe", load)
    return partial(demo.run_demo)


def test_the_demo_runs_and_writes_every_figure(tmp_path, tiny_demo):
    said: list[str] = []
    store = Store(tmp_path / "store")
    figures = tiny_demo(tmp_path / "figures.json", store=store, say=said.append)
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(json.dumps(figures))
    assert [e.name for e in store.list()] == ["sentiment", "sql"]
    assert figures["frozen"]["digest_before"] == figures["frozen"]["digest_after"]
    assert figures["mixed_batch"]["equal"] == figures["mixed_batch"]["rows"] == 11
    assert [s["adapter"] for s in figures["swap"]["steps"]] == [None, "sql@1", "sentiment@1", None]
    assert figures["merge"]["passed"] is True
    assert figures["merge"]["metrics"].keys() == figures["quality"]["sql"]["adapter"].keys()
    assert set(figures["quality"]) == {"sql", "sentiment"}
    text = "\n".join(said)
    for heading in (
        "1. Base",
        "2. Trained",
        "3. Trained",
        "4. On the untouched",
        "5. Swapping",
        "6. One batch",
        "7. Merged",
    ):
        assert heading in text
    assert text.count("   ahl ") == 3
    assert "was not measured" not in text  # the metric follows


def test_an_unwritable_json_file_is_found_before_the_work(tmp_path, tiny_demo):
    with pytest.raises(StoreError, match="cannot be written"):
        tiny_demo(tmp_path / "no" / "figures.json", store=Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
