"""Instruct: a prompt, and a completion that the model writes. The loss is on the completion alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, Unsupported
from .metrics import METRICS
from .prompts import completion_ids, fill, prompt_ids
from .rows import Rows
from .task import IGNORED, Example


class Instruct:
    """`config` is the recipe's task part: prompt, completion, template, system, max_new_tokens, metrics."""

    required = frozenset({"completion", "metrics", "max_new_tokens"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.primary_metric: str = self.config["metrics"][0]

    def prepare(self, train: Rows) -> None:
        """Nothing to learn; checks that the training rows have the fields."""
        for i in range(len(train)):
            train.field(i, self.config["completion"])

    def inputs(self, rows: Rows) -> list[str]:
        """The prompt column, or the template filled."""
        template = self.config.get("template")
        if template:
            return [fill(template, row) for row in rows]
        return [str(rows.field(i, self.config["prompt"])) for i in range(len(rows))]

    def encode(self, text: str, tokenizer: Any, kind: str, max_length: int) -> list[int]:
        """Prompt ids; an encoder-decoder reads the prompt as plain text."""
        if kind == "encoder":
            raise Unsupported("An encoder writes no text.", "Use a causal or encoder-decoder base.")
        if kind == "seq2seq":
            return list(tokenizer(text)["input_ids"])
        return prompt_ids(tokenizer, text, self.config.get("system"))

    def examples(self, rows: Rows, tokenizer: Any, kind: str, max_length: int) -> list[Example]:
        """Prompt and completion of every row.

        Raises:
            DataError: rows longer than `max_length`, whose answers would be cut off; says which lines.
        """
        made, too_long = [], []
        for i, text in enumerate(self.inputs(rows)):
            prompt = self.encode(text, tokenizer, kind, max_length)
            answer = completion_ids(tokenizer, str(rows.field(i, self.config["completion"])))
            if not answer:
                raise DataError(
                    f"{rows.source}, line {rows.lines[i]}: the completion is empty.", "Nothing can be learnt from it."
                )
            if max(len(prompt), len(answer)) > max_length or (
                kind == "causal" and len(prompt) + len(answer) > max_length
            ):
                too_long.append((len(prompt) + len(answer), rows.lines[i]))
            if kind == "causal":
                made.append(Example([*prompt, *answer], [*[IGNORED] * len(prompt), *answer]))
            else:
                made.append(Example(prompt, answer))
        if too_long:
            longest = max(too_long)
            raise DataError(
                f"{rows.source}: {len(too_long)} rows are longer than max_length {max_length} "
                f"(line {longest[1]} has {longest[0]} tokens); their answers would be cut off.",
                f"Set training.max_length to {longest[0]}, or shorten the rows.",
            )
        return made

    def metrics(self, rows: Rows, answers: Sequence[str]) -> dict[str, float]:
        """The recipe's metrics, each a mean over the rows."""
        target = self.config["completion"]
        result = {}
        for name in self.config["metrics"]:
            score = METRICS[name]
            hits = [score(a, str(rows.field(i, target)), rows[i]) for i, a in enumerate(answers)]
            result[name] = sum(hits) / len(hits)
        return result
