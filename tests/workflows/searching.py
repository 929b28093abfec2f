"""Searches on tiny bases, and ways to break them off."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub_lite.adapters.adapter import stored_adapter
from adapterhub_lite.events import Evaluated, Note
from adapterhub_lite.store import Store
from tests.training import recipes

LORA = {"type": "lora", "rank": 4, "alpha": 8}
TRAINING = {"epochs": 3, "checkpoint_every": 1}


class Killed(BaseException):
    """Stands for the death of the process."""


def recipe(folder: Path, base: Any, **training: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return recipes.write(folder, base, LORA, {**TRAINING, **training})


def at_evaluation(count: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """A listener that acts at the n-th evaluation of the validation part."""
    seen = 0

    def listen(event: Any) -> None:
        nonlocal seen
        if isinstance(event, Evaluated) and event.split == "validation":
            seen += 1
            if seen == count:
                act()

    return listen


def notes_into(found: list[str]) -> Callable[[Any], None]:
    """A listener that collects what is said in notes."""

    def listen(event: Any) -> None:
        if isinstance(event, Note):
            found.append(event.text)

    return listen


def die() -> None:
    raise Killed


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def values(store: Store, ref: Any) -> dict[str, Any]:
    return {key: tensor.clone() for key, tensor in stored_adapter(store.read(ref)).tensors.items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((one[key] == other[key]).all()) for key in one)


def figures(result: Any) -> list[tuple[Any, ...]]:
    """What a search found, without times."""
    return [(t.number, t.parameters, t.state, t.loss, t.steps, t.evaluations) for t in result.trials]
