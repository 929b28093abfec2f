"""Instruct: a prompt, and a completion that the model writes. The loss is on the completion alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, Unsupported
from .metrics import METRICS
from .prompts import completion_ids, fill, prompt_ids
from .rows import Rows
from .task import IGNORED, Example

_SHOWN = 5  # lines


class Instruct:
    """`config` is the recipe's task part: prompt, completion, template, system, max_new_tokens, metrics."""

    required = frozenset({"completion", "metrics", "max_new_tokens"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.primary_metric: str = self.config["metrics"][0]
        self.remarks: list[str] = []

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
        """Prompt and completion of every row, cut to `max_length`; `remarks` tells of answers that lost their end.

        Raises:
            DataError: an empty completion, or prompts that leave no room for any of their answer; says which lines.
        """
        made: list[Example] = []
        cut: list[tuple[int, int]] = []  # tokens that a row needs, and its line
        lost: list[tuple[int, int]] = []
        for i, text in enumerate(self.inputs(rows)):
            prompt = self.encode(text, tokenizer, kind, max_length)
            answer = completion_ids(tokenizer, str(rows.field(i, self.config["completion"])))
            if not answer:
                raise DataError(
                    f"{rows.source}, line {rows.lines[i]}: the completion is empty.", "Nothing can be learnt from it."
                )
            need = len(prompt) + len(answer) if kind == "causal" else max(len(prompt), len(answer))
            if need > max_length:
                (lost if kind == "causal" and len(prompt) >= max_length else cut).append((need, rows.lines[i]))
            if kind == "causal":
                ids, labels = [*prompt, *answer], [*[IGNORED] * len(prompt), *answer]
                made.append(Example(ids[:max_length], labels[:max_length]))
            else:
                made.append(Example(prompt[:max_length], answer[:max_length]))
        if lost:
            raise DataError(
                f"{rows.source}: {len(lost)} rows have prompts of max_length {max_length} tokens or more "
                f"({_lines(lost)}); nothing of their answers would be left.",
                f"Set training.max_length to {max(need for need, _ in [*lost, *cut])}, or shorten the rows.",
            )
        if cut:
            self.remarks.append(
                f"{rows.source}: {len(cut)} rows are longer than max_length {max_length} ({_lines(cut)}) and are cut, "
                f"so their ends are not learnt. training.max_length {max(need for need, _ in cut)} would hold them all."
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


def _lines(found: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(str(line) for _, line in found[:_SHOWN])
    return f"line{'s' if len(found) > 1 else ''} {shown}{', ...' if len(found) > _SHOWN else ''}"
