"""Prompts as token ids: through the base's chat template where it has one, as they are otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, Unsupported
from ..recipe.template import columns
from ..recipe.template import fill as fill_template

Message = Mapping[str, str]


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Put a row's columns into the `{column}` places of a template.

    Raises:
        DataError: the row lacks a column, or the template (of a foreign card, say) is none.
    """
    try:
        missing = [name for name in columns(template) if name not in row]
    except ValueError as error:
        raise DataError(f"The prompt template is not usable: {error}.", "Write plain {column} places.") from error
    if missing:
        raise DataError(f"The template needs field {missing[0]!r}.", f"The row has: {', '.join(sorted(row))}.")
    return fill_template(template, row)


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant answers.

    Raises:
        Unsupported: the base has no chat template.
    """
    if not tokenizer.chat_template:
        raise Unsupported("This base has no chat template.", "Use generate() with raw text.")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer: Any, prompt: str, system: str | None = None) -> list[int]:
    """Token ids of a single question, as a user's turn where the base has a chat template."""
    if tokenizer.chat_template:
        first = [{"role": "system", "content": system}] if system else []
        return chat_ids(tokenizer, [*first, {"role": "user", "content": prompt}])
    return list(tokenizer(f"{system}\n\n{prompt}" if system else prompt)["input_ids"])


def completion_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an answer with the end token."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
