"""Texts as token ids for a base, and whether they fit its positions."""

from __future__ import annotations

from collections.abc import Sequence

from ..bases.load import Base
from ..errors import CapacityError, Unsupported
from ..tasks.prompts import prompt_ids
from ..tasks.task import Task
from .batch import BatchPlan


def raw_ids(base: Base, text: str) -> list[int]:
    """Token ids of a text as it is."""
    ids = list(base.tokenizer(text)["input_ids"])
    if not ids:
        raise Unsupported("An empty prompt has no tokens.", "Give at least one character.")
    return ids


def question_ids(base: Base, text: str, task: Task | None) -> list[int]:
    """Token ids of a question as a task (None: the base's chat template) poses it."""
    if task is not None:
        return task.encode(text, base.tokenizer, base.kind, 0)
    return raw_ids(base, text) if base.kind == "seq2seq" else prompt_ids(base.tokenizer, text)


def class_ids(base: Base, text: str, task: Task | None, virtual: int) -> list[int]:
    """Token ids of a text for a classification head, cut to what the base's positions and the task leave.

    Args:
        virtual: virtual tokens of the adapter, which need positions too.
    """
    limit = class_limit(base, task, virtual)
    if task is None:
        return list(base.tokenizer(text, truncation=True, max_length=limit)["input_ids"])
    return task.encode(text, base.tokenizer, "encoder", limit)


def class_limit(base: Base, task: Task | None, virtual: int) -> int:
    """Most tokens of a text for a head: what the base's positions and the task leave beside `virtual` ones."""
    limit = (position_limit(base) or 512) - virtual
    return min(limit, int(task.config.get("max_length") or limit)) if task is not None else limit


def position_limit(base: Base) -> int | None:
    """Most tokens of one row, or None where there is no limit."""
    config = base.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if config.model_type in ("roberta", "xlm-roberta", "camembert") and limit:
        return int(limit) - int(config.pad_token_id) - 1
    return limit if base.kind != "seq2seq" else None


def check_lengths(base: Base, plan: BatchPlan, prompts: Sequence[list[int]], new_tokens: int) -> None:
    """Raise CapacityError for a row that does not fit the base's positions, Unsupported for an empty one."""
    limit = position_limit(base)
    if not all(prompts):
        raise Unsupported("An empty prompt has no tokens.", "Give at least one character.")
    for row, prompt in zip(plan.rows, prompts, strict=True):
        virtual = row.virtual_tokens if row else 0
        if limit is not None and len(prompt) + virtual + new_tokens > limit:
            before = f"{len(prompt)} prompt tokens" + (f" + {virtual} virtual ones" if virtual else "")
            raise CapacityError(
                f"{before} + {new_tokens} new ones exceed this base's {limit} positions.",
                "Shorten the prompt or lower max_new_tokens.",
            )
