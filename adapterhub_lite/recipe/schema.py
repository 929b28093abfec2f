"""The recipe as frozen dataclasses: every field with its type, limits, default and meaning."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..names import Ref, check_name
from . import fields
from .fields import read_section, readable
from .nodes import Scalar, Table
from .options import PeftAdapter
from .readers import At, read_checked, read_choice, read_integer, read_number
from .template import columns
from .training import TrainingConfig

METRICS = ("rouge_l", "exact_match", "sql_execution")
"""What an instruct task can be measured by."""
QUANTIZATIONS = ("none", "int8", "nf4", "nf4-double")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


# --- task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstructTask:
    """Answer a prompt; the loss is on the completion alone."""

    type: Literal["instruct"] = fields.choice("instruct", among=("instruct",))
    prompt: str = fields.text("prompt")
    """Column with the prompt."""
    completion: str = fields.text("completion")
    """Column with the answer."""
    template: str | None = fields.template(None)
    """The prompt made of several {columns}; used instead of `prompt`."""
    system: str | None = fields.text(None, limit=20_000)
    """System message; None leaves it to the base's chat template."""
    max_new_tokens: int = fields.integer(64, low=1, high=8192)
    """Longest answer when the task is measured."""
    metrics: tuple[str, ...] = fields.choices(("rouge_l", "exact_match"), among=METRICS)
    """What answers are measured by; the first decides. Of free text hardly any answer is the expected one word for
    word, but more or less of it is."""

    def contradictions(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """What is wrong between fields, of which `given` were written."""
        if self.template is not None and "prompt" in given and self.prompt != "prompt":  # the plain form says both
            yield "template", "prompt and template exclude each other."


@dataclass(frozen=True)
class ClassifyTask:
    """Give a text one of several labels: by a head on an encoder, by label words on a causal base."""

    type: Literal["classify"] = fields.choice("classify", among=("classify",))
    text: str = fields.text("text")
    """Column with the text."""
    label: str = fields.text("label")
    """Column with the label."""
    labels: tuple[str, ...] | None = fields.texts(None, least=2)
    """All labels in their order; None takes those of the training data, sorted."""
    template: str | None = fields.template(None)
    """Prompt for causal bases, with the text column in braces; None takes the task's own."""
    words: dict[str, str] | None = fields.words()
    """What a causal base says for a label; None takes the label itself."""

    def contradictions(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """What is wrong between fields, of which `given` were written."""
        if self.template is not None and self.text not in columns(self.template):
            yield "template", f"does not hold the text column {{{self.text}}}."
        words = self.words or {}
        if self.labels is not None and words and set(words) != set(self.labels):
            odd = sorted(set(words) ^ set(self.labels))
            yield "words", f"and labels differ in {', '.join(map(repr, odd[:3]))}."
        if len({word.strip() for word in words.values()}) < len(words):
            yield "words", "two labels have the same word."


@dataclass(frozen=True)
class TagTask:
    """Give each word of a text one of several tags, by a head on an encoder."""

    type: Literal["tag"] = fields.choice("tag", among=("tag",))
    tokens: str = fields.text("tokens")
    """Column with the list of words."""
    tags: str = fields.text("tags")
    """Column with the list of their tags: B-, I- and O for spans, or any words."""
    labels: tuple[str, ...] | None = fields.texts(None, least=2)
    """All tags in their order; None takes those of the training data, sorted."""

    def contradictions(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """What is wrong between fields, of which `given` were written."""
        if self.tokens == self.tags:
            yield "tags", "is the column of the words."
        if any(len(label.split()) != 1 for label in self.labels or ()):
            yield "labels", "hold a tag with white space."


Task = InstructTask | ClassifyTask | TagTask


# --- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileData:
    """A file of rows."""

    path: str
    """As written: absolute, or relative to the folder of the recipe."""

    def resolve(self, folder: Path | None) -> Path:
        """The absolute path, for a recipe in `folder` (None: the working folder)."""
        return ((folder or Path()) / Path(self.path).expanduser()).absolute()


def _hub_id(text: str) -> str:
    if not _HUB_ID.fullmatch(text):
        raise ValueError("is not a Hub id such as org/name")
    return text


def _commit(text: str) -> str:
    if not _COMMIT.fullmatch(text):
        raise ValueError("is not a commit of 40 hexadecimal digits, which alone stays the same")
    return text


@dataclass(frozen=True)
class HubData:
    """A split of a data set on the Hub."""

    hub: str = fields.checked(_hub_id)
    """Id of the data set."""
    split: str = fields.text()
    """Required: a default would let a test part train."""
    config: str | None = fields.text(None)
    """Name of the configuration, where there are several."""
    revision: str | None = fields.checked(_commit, None)
    """The exact commit; None takes the newest."""


DataSource = FileData | HubData


def _file_path(text: str) -> str:
    if "\0" in text or text.endswith(("/", "\\")):
        raise ValueError("is not the path of a file")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error).rstrip(".").lower()) from error
    return text


def _read_source(at: At) -> DataSource | None:
    if isinstance(at.node, Table):
        return read_section(at, HubData)
    if not isinstance(at.node, Scalar):
        at.expected("a file or {hub: id, split: name}")
        return None
    path = read_checked(at, check=_file_path)
    return None if path is None else FileData(path)


@dataclass(frozen=True)
class DataConfig:
    """The rows to learn from, to watch and to judge by."""

    train: DataSource = fields.section(_read_source)
    validation: DataSource | None = fields.section(_read_source, None)
    """Measured while training."""
    test: DataSource | None = fields.section(_read_source, None)
    """Measured once, at the end."""

    def parts(self) -> Iterator[tuple[str, DataSource]]:
        """The parts that there are, with their names."""
        for name, source in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if source is not None:
                yield name, source

    def contradictions(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """The same rows in two parts."""
        seen: dict[object, str] = {}
        for name, source in self.parts():
            rows = os.path.normpath(source.path) if isinstance(source, FileData) else source
            if rows in seen:
                yield name, f"is the same as {seen[rows]}."
            seen.setdefault(rows, name)


# --- adapter -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank updates of linear layers; `dora` learns their magnitudes too."""

    type: Literal["lora", "dora"] = fields.choice("lora", among=("lora", "dora"))
    rank: int = fields.integer(16, low=1, high=1024)
    alpha: float = fields.number(32.0, low=0, high=1e6, above=True)
    """The update is scaled by alpha / rank (by alpha / sqrt(rank) with rslora)."""
    targets: str | tuple[str, ...] = fields.targets("all-linear")
    """`all-linear` (all but the output layer), or the last parts of module names."""
    dropout: float = fields.number(0.0, low=0, high=0.9)
    rslora: bool = fields.flag(False)
    rank_pattern: dict[str, int] = fields.per_module(partial(read_integer, low=1, high=1024))
    """Ranks of single modules, by the last parts of their names."""
    alpha_pattern: dict[str, float] = fields.per_module(partial(read_number, low=0, high=1e6, above=True))
    """Alphas of single modules, likewise."""


@dataclass(frozen=True)
class PrefixAdapter:
    """Learnt keys and values before every layer's own."""

    type: Literal["prefix"] = fields.choice("prefix", among=("prefix",))
    tokens: int = fields.integer(20, low=1, high=1024)
    projection: bool = fields.flag(False)
    """Learn through a small network that is dropped after training."""
    init: Literal["text", "random"] = fields.choice("text", among=("text", "random"))
    """`text` starts from the keys and values that the base computes for a text."""
    text: str | None = fields.text(None, limit=20_000)
    """That text; None takes the task's own."""

    def contradictions(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """What is wrong between fields, of which `given` were written."""
        if self.text is not None and self.init == "random":
            yield "text", "is not used with init: random."


Adapter = LoraAdapter | PrefixAdapter | PeftAdapter


# --- training and the whole --------------------------------------------------------------------------------------


def _read_typed(at: At, classes: dict[str, type[Any]]) -> Any:
    """Read a table into the class that its `type` names."""
    if not isinstance(at.node, Table):
        at.expected("a mapping")
        return None
    if "type" not in at.node.entries:
        at.wrong("'type' is missing.", f"One of: {', '.join(classes)}.")
        return None
    kind = at.node.entries["type"]
    cls = classes.get(kind.text) if isinstance(kind, Scalar) else None
    if cls is None:
        read_choice(at.child("type"), among=tuple(classes))
        return None
    foreign: dict[str, str] = {}
    for name, other in classes.items():
        for key in readable(other):
            foreign.setdefault(key, name)
    return read_section(at, cls, foreign=foreign)


def _reference(text: str) -> str:
    return str(Ref.parse(text))


_TASKS: dict[str, type[Any]] = {"instruct": InstructTask, "classify": ClassifyTask, "tag": TagTask}
_ADAPTERS: dict[str, type[Any]] = {
    "lora": LoraAdapter,
    "dora": LoraAdapter,
    "prefix": PrefixAdapter,
    "peft": PeftAdapter,
}


@dataclass(frozen=True)
class Recipe:
    """What to train, on what and how; complete, with every default filled in."""

    name: str = fields.checked(check_name)
    """Name of the adapter in the store."""
    base: str = fields.text(limit=1024)
    """Catalogue name, folder or Hub id."""
    task: Task = fields.section(partial(_read_typed, classes=_TASKS))
    data: DataConfig = fields.section(partial(read_section, cls=DataConfig))
    adapter: Adapter = fields.section(partial(_read_typed, classes=_ADAPTERS))
    training: TrainingConfig = fields.section(partial(read_section, cls=TrainingConfig), TrainingConfig())
    start_from: str | None = fields.checked(_reference, None)
    """A stored version (`sql@3`, `sql:prod`, `sql`) whose values the adapter starts with instead of fresh ones."""
    quantize: Literal["none", "int8", "nf4", "nf4-double"] = fields.choice("none", among=QUANTIZATIONS)
    """Form of the base's linear layers; nf4-double quantises the scales of nf4, too."""
    source: str = ""
    """Where it was read from, for messages."""
    folder: Path | None = None
    """What relative data paths start from."""
    sha256: str = ""
    """Digest of the text it was read from, before overrides."""
    lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Where in `source` each field stands, by its path; not of those that overrides set."""

    def line_of(self, path: str) -> int:
        """The line of a field, or of what it lies in; 0 where it was not written in `source`."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path, 0)

    def contradictions(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """What is wrong between parts, of which `given` were written."""
        training = self.training
        if self.data.validation is None and (training.early_stopping or training.keep == "best"):
            what = "early_stopping" if training.early_stopping else "keep: best"
            yield "training", f"{what} needs data.validation to judge by."
