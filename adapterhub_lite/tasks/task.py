"""What every task offers, whatever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .rows import Rows

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        ids: input tokens (for a causal base: prompt and completion).
        labels: same length for a causal base, IGNORED where no loss is; the completion for an encoder-decoder;
            for an encoder one class index, or in a tagger's example one a token, IGNORED within words.
    """

    ids: list[int]
    labels: list[int]


class Task(Protocol):
    """A task: rows in, examples and metrics out."""

    config: dict[str, Any]
    primary_metric: str

    def prepare(self, train: Rows) -> None:
        """Learn what only the training data says (label names); kept in `config`."""

    def examples(self, rows: Rows, tokenizer: Any, kind: str, max_length: int) -> list[Example]:
        """Training examples for a base of this kind."""
        ...

    def inputs(self, rows: Rows) -> list[str]:
        """The text of each row that is given to the model."""
        ...

    def encode(self, text: str, tokenizer: Any, kind: str, max_length: int) -> list[int]:
        """Token ids of one input as the adapter was trained to see it."""
        ...

    def metrics(self, rows: Rows, answers: Sequence[str]) -> Mapping[str, float]:
        """Figures in 0..1 of the model's answers against the rows."""
        ...
