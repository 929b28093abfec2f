"""What is said of an adapter that does nothing, with what to change of its training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import NoEffect
from adapterhub_lite.events import Evaluated
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import publish
from adapterhub_lite.workflows.train import train, train_together
from tests.training import recipes

LORA = {"type": "lora", "rank": 4, "alpha": 8}


def test_what_learnt_nothing_is_told_what_to_try(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base, store = tiny_base("llama"), Store(tmp_path / "store")
    path = recipes.write(tmp_path, base, LORA, {"learning_rate": 1e-30})
    with pytest.raises(NoEffect, match="moves no logit") as caught:
        train(path, store=store, base=base)
    assert "3 steps at a rate of 1e-30 at most took the loss from " in caught.value.hint
    assert "raise training.learning_rate (the default is 0.0005) or training.epochs" in caught.value.hint
    assert store.names() == []


def test_what_is_not_finite_learnt_too_fast(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any) -> Any:
        raise NoEffect("tiny makes logits of a base that are not finite.", "The training diverged.")

    monkeypatch.setattr(publish, "_measured", measured)
    base = tiny_base("llama")
    with pytest.raises(NoEffect) as caught:
        train(recipes.write(tmp_path, base, LORA), store=Store(tmp_path / "store"), base=base)
    assert caught.value.hint.startswith("The training diverged. 3 steps at a rate of 0.05")
    assert "lower training.learning_rate" in caught.value.hint
    assert "raise" not in caught.value.hint


def test_one_alone_has_no_name_in_its_lines_and_several_have(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base, told = tiny_base("llama"), list[Any]()
    path = recipes.write(tmp_path, base, LORA)
    train(path, store=Store(tmp_path / "one"), base=base, on_event=told.append)
    assert {event.learner for event in told if isinstance(event, Evaluated)} == {""}
    told.clear()
    train_together([path, path], store=Store(tmp_path / "two"), base=base, on_event=told.append)
    assert {event.learner for event in told if isinstance(event, Evaluated)} == {"tiny"}
