"""The tasks there are, by the name a recipe gives in `task.type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import Unsupported
from .classify import Classify
from .instruct import Instruct
from .task import Task

TASKS: dict[str, Callable[[Mapping[str, Any]], Task]] = {
    "instruct": Instruct,
    "classify": Classify,
}


def make_task(config: Mapping[str, Any]) -> Task:
    """The task of a recipe's or a card's task part.

    Raises:
        Unsupported: a type that is not here.
    """
    kind = str(config.get("type"))
    if kind not in TASKS:
        raise Unsupported(f"Task type {kind!r} is unknown.", f"Known: {', '.join(TASKS)}.")
    return TASKS[kind](config)
