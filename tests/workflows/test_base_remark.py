"""That a base is not exactly an adapter's own is heard once: by a listener, or as a warning where nobody listens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import BaseDiffers
from adapterhub_lite.events import Note
from adapterhub_lite.runtime import remark
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.train import train
from tests.cli.conftest import ahl
from tests.training import recipes

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # what nf4 packs in blocks


@pytest.fixture
def store(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with tiny@1 and tiny@2, trained on the dense base."""
    monkeypatch.setattr(remark, "_warned", set())
    made, base = Store(tmp_path / "store"), tiny_base("llama", **WIDE)
    for rank in (1, 2):
        plan = recipes.load(tmp_path, base, {"type": "lora", "rank": rank, "alpha": 4}, {"max_steps": 1})
        train(plan, store=made, base=base)
    return made


def test_another_precision_is_warned_of_once_a_pair(tiny_base: Any, store: Store) -> None:
    base = tiny_base("llama", "nf4", **WIDE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # also over two runtimes
            runtime = Runtime(base, store, slots=1)
            for ref in ("tiny@1", "tiny@2", "tiny@1"):
                runtime.generate(["x"], ref, max_new_tokens=1)
            runtime.close()
    mine = [one for one in caught if one.category is BaseDiffers]
    assert [str(one.message).partition(" was trained on ")[0] for one in mine] == ["tiny@1", "tiny@2"]
    assert all("this base has the same weights in nf4" in str(one.message) for one in mine)
    assert {one.filename for one in mine} == {__file__}


def test_the_very_base_is_nothing_to_warn_of(tiny_base: Any, store: Store) -> None:
    runtime = Runtime(tiny_base("llama", **WIDE), store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.load("tiny@1")
    runtime.close()


def test_a_listener_is_told_instead(tiny_base: Any, store: Store) -> None:
    said: list[Any] = []
    runtime = Runtime(tiny_base("llama", "nf4", **WIDE), store, on_event=said.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.load("tiny@1")
    runtime.close()
    (note,) = [event for event in said if isinstance(event, Note)]
    assert (note.level, "the same weights in nf4" in note.text) == ("warning", True)


@pytest.mark.parametrize("debug", ["", "1"])
def test_the_command_line_says_it_once(store: Store, monkeypatch: pytest.MonkeyPatch, debug: str) -> None:
    monkeypatch.setenv("AHL_DEBUG", debug)
    result = ahl("run", "-a", "tiny@1", "--quantize", "nf4", "--max-new-tokens", "1", "x", "--store", store.path)
    assert result.exit_code == 0
    assert result.stderr.count("the same weights in nf4") == 1
    assert "BaseDiffers" not in result.stderr
