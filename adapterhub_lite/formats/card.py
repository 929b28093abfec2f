"""The card of a version: everything PEFT's files cannot say, as canonical JSON beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from ..errors import FormatError
from .fields import problems_error, shown
from .injected import METHODS
from .strict_json import dump, finite_integer, parse_object

SCHEMA = 2
MAX_EXAMPLES, MAX_ANSWER = 8, 400  # rows of a split, characters of an answer
MAX_BYTES = 4 << 20
_OWN_TYPES = ("lora", "dora", "adalora", "loha", "lokr", "ia3", "prefix", "prompt")
ADAPTER_TYPES = (*_OWN_TYPES, *(method.lower() for method in METHODS))
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", re.ASCII)


def utc_now() -> str:
    """The time as cards write it: ISO 8601 UTC in seconds, `2026-01-31T12:00:00Z`. A label, never an order."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def spread(total: int, most: int = MAX_EXAMPLES) -> list[int]:
    """Indices of at most `most` rows, evenly over `total` rows: two cards with as many rows name the same ones."""
    count = min(total, most)
    return [i * total // count for i in range(count)]


def examples_of(answers: Sequence[str]) -> dict[str, Any]:
    """What a card keeps of the answers to all rows of a split: a few of them, cut, with the rows they belong to."""
    rows = spread(len(answers))
    return {"rows": rows, "answers": [answers[i][:MAX_ANSWER] for i in rows]}


@dataclass(frozen=True)
class Card:
    """What is known about one version.

    `base` holds name, revision, kind, fingerprint (digest, config, tokenizer, chat_template, weights), quantization and
    dtype, and repo and commit where it came from the Hub; `data` maps a split to source, sha256 and rows; `metrics` a
    split to metrics; `examples` a split to rows (indices) and answers (texts), as `examples_of` gives them; `parents`
    are references `name@version`; `origin` says in `kind` whether it was trained, imported or combined. Times are UTC,
    durations seconds.

    A card of schema 1, which had no `examples`, stays one: it is written as the very bytes that it was read from, since
    the digest of its version covers them.
    """

    adapter: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    effect: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=utc_now)
    duration_seconds: float | None = None
    schema: int = SCHEMA

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, UTF-8, a newline at the end.

        Raises:
            FormatError: a field of the wrong type, NaN, or more than `MAX_BYTES`; so what is written can be read.
        """
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.schema == 1 and not self.examples:  # with examples it is refused below
            del content["examples"]
        try:
            data = dump(content, indent=2)
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"The card cannot be written as JSON: {error}.") from None
        self.from_bytes(data)
        return data

    @classmethod
    def from_bytes(cls, data: bytes | str) -> Card:
        """Read a card.

        Raises:
            FormatError: all problems at once; for a newer schema, that an upgrade reads it.
        """
        raw = parse_object(data, "card.json", limit=MAX_BYTES, depth=32, integer=finite_integer)
        schema = raw.get("schema")
        if type(schema) is int and schema > SCHEMA:
            message = f"card.json has schema {schema}; this version of adapterhub-lite reads up to {SCHEMA}."
            raise FormatError(message, "Upgrade with: pip install --upgrade adapterhub-lite")
        problems = _problems(raw, _FIRST if type(schema) is int and schema == 1 else _FIELDS)
        if problems:
            raise problems_error("card.json", problems)
        return cls(**raw)


def _problems(raw: dict[str, Any], known: dict[str, tuple[Callable[[Any], bool], str]]) -> list[str]:
    unknown = [f"{shown(key)}: unknown key" for key in raw if key not in known]
    missing = [f"{key}: is missing" for key in known if key not in raw]
    wrong = [
        f"{key}: expected {expected}, got {shown(raw[key])}"
        for key, (check, expected) in known.items()
        if key in raw and not check(raw[key])
    ]
    return [*unknown, *missing, *wrong]


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


def is_base(value: object) -> bool:
    """Whether this can be the `base` of a card."""
    if not isinstance(value, dict) or not _texts(value.get("fingerprint", {})):
        return False
    return all(item is None or isinstance(item, str) for key, item in value.items() if key != "fingerprint")


def _splits(value: Any) -> bool:
    """An object by splits: their names are shown as they are."""
    return isinstance(value, dict) and all(map(str.isprintable, value))


def _parts(value: Any) -> bool:
    return _splits(value) and all(isinstance(facts, dict) for facts in value.values())


def _task(value: Any) -> bool:
    """What listings rely on; the rest is between a task and its maker."""
    if not isinstance(value, dict) or not isinstance(value.get("type") or "", str):
        return False
    metrics = value.get("metrics") or []
    return isinstance(metrics, list) and all(isinstance(name, str) for name in metrics)


def _effect(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _origin(value: Any) -> bool:
    losses = value.get("losses", []) if isinstance(value, dict) else None
    return isinstance(losses, list) and all(map(_number, losses))


def _metrics(value: Any) -> bool:
    return _splits(value) and all(_splits(split) and all(map(_number, split.values())) for split in value.values())


def _examples(value: Any) -> bool:
    return _splits(value) and all(map(_answered, value.values()))


def _answered(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"rows", "answers"}:
        return False
    rows, answers = value["rows"], value["answers"]
    if not isinstance(rows, list) or not isinstance(answers, list) or len(rows) != len(answers):
        return False
    numbered = len(rows) <= MAX_EXAMPLES and all(type(row) is int and row >= 0 for row in rows)
    said = all(isinstance(text, str) and len(text) <= MAX_ANSWER for text in answers)
    return numbered and said and len(set(rows)) == len(rows)


def _adapter(value: Any) -> bool:
    return isinstance(value, dict) and (not value or value.get("type") in ADAPTER_TYPES)


def _time(value: Any) -> bool:
    if not (isinstance(value, str) and _TIME.fullmatch(value)):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adapter": (_adapter, f"an object whose type is one of {', '.join(ADAPTER_TYPES)}"),
    "base": (is_base, "an object of texts whose fingerprint is an object of texts"),
    "task": (_task, "an object whose type is a text and whose metrics are a list of texts"),
    "recipe": (lambda value: value is None or _object(value), "an object or null"),
    "data": (_parts, "an object of objects with printable names"),
    "seed": (lambda value: value is None or type(value) is int, "a whole number or null"),
    "libraries": (_texts, "an object of texts"),
    "metrics": (_metrics, "an object of splits, each an object of numbers, with printable names"),
    "effect": (_effect, "an object of numbers"),
    "examples": (
        _examples,
        f"an object of splits, each with rows (whole numbers, {MAX_EXAMPLES} at most, none twice) and as many answers"
        f" (texts of at most {MAX_ANSWER} characters)",
    ),
    "parents": (
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "a list of texts",
    ),
    "origin": (_origin, "an object; its losses a list of numbers"),
    "created": (_time, "a UTC time such as 2026-01-31T12:00:00Z"),
    "duration_seconds": (lambda value: value is None or (_number(value) and value >= 0), "seconds or null"),
    "schema": (lambda value: type(value) is int and 1 <= value <= SCHEMA, f"a whole number from 1 to {SCHEMA}"),
}
_FIRST = {key: told for key, told in _FIELDS.items() if key != "examples"}
