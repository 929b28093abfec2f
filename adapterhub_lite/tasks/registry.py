"""The tasks there are, by the name a recipe gives in `task.type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Unsupported
from .classify import Classify
from .instruct import Instruct
from .tag import Tag
from .task import Task

TASKS: dict[str, type[Instruct] | type[Classify] | type[Tag]] = {
    "instruct": Instruct,
    "classify": Classify,
    "tag": Tag,
}


def make_task(config: Mapping[str, Any]) -> Task:
    """The task of a recipe's or a card's task part.

    Raises:
        Unsupported: a type that is not here.
    """
    kind = str(config.get("type"))
    if kind not in TASKS:
        raise Unsupported(f"Task type {kind!r} is unknown.", f"Known: {', '.join(TASKS)}.")
    missing = TASKS[kind].required - {key for key, value in config.items() if value is not None}
    if missing:
        raise Unsupported(f"A task of type {kind} needs {', '.join(sorted(missing))}.", "Its card is not complete.")
    return TASKS[kind](config)
