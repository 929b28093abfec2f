"""Tag: one label a word (named entities, parts of speech). An encoder gets a head, kept with the adapter, that reads
every token; a word's label is that of its first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, Unsupported
from .rows import Rows
from .spans import OUTSIDE, span_scores
from .task import IGNORED, Example
from .words import pieces, split_words

_NO_LIMIT = 1 << 30


class Tag:
    """`config` is the recipe's task part: tokens, tags, labels; labels are filled in by `prepare`, metrics always."""

    required = frozenset({"tokens", "tags"})
    primary_metric = "f1"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {**config, "metrics": [self.primary_metric, "precision", "recall", "accuracy"]}

    @property
    def labels(self) -> list[str]:
        """Tag names; the index in this list is the class."""
        return list(self.config.get("labels") or ())

    def prepare(self, train: Rows) -> None:
        """Collect the tags in sorted order, or check them against the recipe's.

        Raises:
            DataError: fewer than two tags, one that the recipe does not list, or rows that are no tagged words.
        """
        if not self.labels:
            self.config["labels"] = sorted({tag for i in range(len(train)) for tag in self.expected(train, i)})
        if len(self.labels) < 2:
            raise DataError(
                f"{train.source}: {len(self.labels)} tag(s) in field {self.config['tags']!r}.", "Two at least."
            )
        self.targets(train)

    def words(self, rows: Rows) -> list[list[str]]:
        """The words of every row.

        Raises:
            DataError: a row whose field is no list of texts.
        """
        return [self._texts(rows, i, self.config["tokens"]) for i in range(len(rows))]

    def expected(self, rows: Rows, index: int) -> list[str]:
        """The tags of a row, one a word. Numbers, as data sets of the Hub have them, count into `labels`.

        Raises:
            DataError: no list of tags, or not one a word.
        """
        words = self._texts(rows, index, self.config["tokens"])
        tags = self._texts(rows, index, self.config["tags"])
        if len(tags) != len(words):
            raise DataError(
                f"{rows.source}, line {rows.lines[index]}: {len(words)} words and {len(tags)} tags.", "One tag a word."
            )
        return tags

    def targets(self, rows: Rows) -> list[list[int]]:
        """Class indices of every row's words.

        Raises:
            DataError: a tag that was not in training, with its line.
        """
        index = {label: i for i, label in enumerate(self.labels)}
        found = []
        for i in range(len(rows)):
            tags = self.expected(rows, i)
            unknown = next((tag for tag in tags if tag not in index), None)
            if unknown is not None:
                raise DataError(
                    f"{rows.source}, line {rows.lines[i]}: tag {unknown!r} is unknown.", f"Tags: {', '.join(index)}."
                )
            found.append([index[tag] for tag in tags])
        return found

    def inputs(self, rows: Rows) -> list[str]:
        """The words of each row, joined by spaces: to be read, not to be split again."""
        return [" ".join(words) for words in self.words(rows)]

    def encode(self, text: str, tokenizer: Any, kind: str, max_length: int) -> list[int]:
        """Token ids of a text as its words are seen, as many as `max_length` (0: all) takes."""
        words = [text[begin:end] for begin, end in split_words(text)]
        made = pieces(words, tokenizer, max_length or _NO_LIMIT)
        return made[0].ids if made else list(tokenizer("")["input_ids"])

    def examples(self, rows: Rows, tokenizer: Any, kind: str, max_length: int) -> list[Example]:
        """Examples of every row, more than one of a row that is longer than `max_length`; rows without words have none.

        Raises:
            Unsupported: a base that is no encoder.
        """
        if kind != "encoder":
            raise Unsupported("A tagger is trained on an encoder.", "Use an encoder such as minilm-l6 as base.")
        made = []
        for words, targets in zip(self.words(rows), self.targets(rows), strict=True):
            for piece in pieces(words, tokenizer, max_length):
                labels = [IGNORED] * len(piece.ids)
                for word, place in piece.first:
                    labels[place] = targets[word]
                made.append(Example(piece.ids, labels))
        if not made:
            raise DataError(f"{rows.source} holds no words.", "Nothing can be learnt from it.")
        return made

    def metrics(self, rows: Rows, answers: Sequence[str]) -> dict[str, float]:
        """F1, precision and recall of spans, and accuracy of tags; an answer is a row's tags, joined by spaces."""
        expected = [self.expected(rows, i) for i in range(len(rows))]
        said = [(a.split() + [OUTSIDE] * len(e))[: len(e)] for a, e in zip(answers, expected, strict=True)]
        return span_scores(said, expected)

    def _texts(self, rows: Rows, index: int, field: str) -> list[str]:
        where = f"{rows.source}, line {rows.lines[index]}"
        values = rows.field(index, field)
        if not isinstance(values, list | tuple):
            raise DataError(f"{where}: {field!r} is no list.", "A row has a list of words and a list of tags.")
        if field != self.config["tags"]:
            return [str(value) for value in values]
        return [self._tag(value, where) for value in values]

    def _tag(self, value: Any, where: str) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(self.labels):
                raise DataError(f"{where}: tag {value} is a number.", "List the tags' names, in order, as task.labels.")
            return self.labels[value]
        tag = str(value)
        if not tag or tag.split() != [tag]:
            raise DataError(f"{where}: {tag!r} is no tag.", "A tag is a word without white space.")
        return tag
