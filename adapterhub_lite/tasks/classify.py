"""Classify: one label a text. An encoder gets a head kept with the adapter; a causal base scores label words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, Unsupported
from .metrics import accuracy, macro_f1
from .prompts import completion_ids, fill, prompt_ids
from .rows import Rows
from .task import IGNORED, Example


class Classify:
    """`config` is the recipe's task part: text, label, labels, template, words; labels are filled in by `prepare`."""

    required = frozenset({"text", "label"})
    primary_metric = "accuracy"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    @property
    def labels(self) -> list[str]:
        """Label names; the index in this list is the class."""
        return list(self.config.get("labels") or ())

    @property
    def words(self) -> list[str]:
        """What a causal base writes for each label."""
        words = self.config.get("words") or {}
        return [str(words.get(label, label)) for label in self.labels]

    def prepare(self, train: Rows) -> None:
        """Collect the labels in sorted order, or check them against the recipe's.

        Raises:
            DataError: fewer than two labels, or one that the recipe does not list (with its line).
        """
        seen = {str(train.field(i, self.config["label"])) for i in range(len(train))}
        if not self.labels:
            self.config["labels"] = sorted(seen)
        if len(self.labels) < 2:
            raise DataError(
                f"{train.source}: {len(self.labels)} label(s) in field {self.config['label']!r}.", "Two at least."
            )
        self.targets(train)

    def targets(self, rows: Rows) -> list[int]:
        """Class index of every row.

        Raises:
            DataError: a label that was not in training, with its line.
        """
        index = {label: i for i, label in enumerate(self.labels)}
        found = []
        for i in range(len(rows)):
            label = str(rows.field(i, self.config["label"]))
            if label not in index:
                raise DataError(
                    f"{rows.source}, line {rows.lines[i]}: label {label!r} is unknown.", f"Labels: {', '.join(index)}."
                )
            found.append(index[label])
        return found

    def inputs(self, rows: Rows) -> list[str]:
        """The text column."""
        return [str(rows.field(i, self.config["text"])) for i in range(len(rows))]

    def encode(self, text: str, tokenizer: Any, kind: str, max_length: int) -> list[int]:
        """Token ids of one text, cut to `max_length`; for a causal base the question about it.

        Raises:
            Unsupported: an encoder-decoder base.
        """
        if kind == "encoder":
            return list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        if kind != "causal":
            raise Unsupported("Classification runs on encoders and causal bases.", "For this base use type: instruct.")
        template = self.config.get("template")
        question = (
            fill(template, {self.config["text"]: text, "text": text})
            if template
            else f"{text}\n\nWhich of these describes the text above: {', '.join(self.words)}? Answer in one word."
        )
        return prompt_ids(tokenizer, question)

    def word_ids(self, tokenizer: Any) -> list[list[int]]:
        """Token ids of each label's word, with the end token."""
        return [completion_ids(tokenizer, word) for word in self.words]

    def examples(self, rows: Rows, tokenizer: Any, kind: str, max_length: int) -> list[Example]:
        """One example a row: the class for an encoder, the label's word as completion for a causal base."""
        targets = self.targets(rows)
        texts = self.inputs(rows)
        if kind == "encoder":
            return [
                Example(self.encode(t, tokenizer, kind, max_length), [y]) for t, y in zip(texts, targets, strict=True)
            ]
        words = self.word_ids(tokenizer)
        made = []
        for i, (text, target) in enumerate(zip(texts, targets, strict=True)):
            prompt, answer = self.encode(text, tokenizer, kind, max_length), words[target]
            if len(prompt) + len(answer) > max_length:
                raise DataError(
                    f"{rows.source}, line {rows.lines[i]}: {len(prompt) + len(answer)} tokens with its question, "
                    f"more than max_length {max_length}.",
                    "Raise training.max_length or shorten the text.",
                )
            made.append(Example([*prompt, *answer], [*[IGNORED] * len(prompt), *answer]))
        return made

    def metrics(self, rows: Rows, answers: Sequence[str]) -> dict[str, float]:
        """accuracy and macro-averaged F1 of predicted labels."""
        expected = [str(rows.field(i, self.config["label"])) for i in range(len(rows))]
        return {"accuracy": accuracy(answers, expected), "macro_f1": macro_f1(answers, expected)}
