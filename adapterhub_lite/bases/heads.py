"""Which whole modules may come with an adapter: the classification head of its class, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import Unsupported

HEAD_NAMES = ("classifier", "score", "classification_head")
"""Attribute names of heads in transformers' *ForSequenceClassification and *ForTokenClassification classes."""
_HEADLESS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


def check_heads(task_type: str | None, tensors: Iterable[str]) -> None:
    """Refuse whole tensors (names inside the base, of PEFT's `modules_to_save`) that no base has a place for.

    Raises:
        Unsupported: a module that is no classification head, or a head for a class that has none.
    """
    for tensor in tensors:
        module = tensor.rpartition(".")[0] or tensor
        if tensor.split(".")[0] not in HEAD_NAMES:
            raise Unsupported(
                f"The adapter brings a copy of its own of {module} (modules_to_save), which is a part of the base. "
                "The base is shared by all adapters and stays as it is, so this can never be loaded.",
                f"Train it without that in modules_to_save; only a classification head ({', '.join(HEAD_NAMES)}) "
                "comes with an adapter.",
            )
        if task_type in _HEADLESS:
            raise Unsupported(
                f"The adapter brings the head {module} (modules_to_save), but its task type {task_type} has none, "
                "so this can never be loaded.",
                "Train it with task type SEQ_CLS or TOKEN_CLS, or without modules_to_save.",
            )
