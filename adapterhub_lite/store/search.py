"""Searching the entries of a store: `sql base:smollm2 accuracy>0.8`.

A query is words, `field:text`, and comparisons of numbers, all of which must hold; `-` before a term turns it round.
Case matters nowhere.
"""

from __future__ import annotations

import difflib
import operator
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import FormatError
from .listing import Entry

MAX_QUERY = 2000  # characters
_COMPARISON = re.compile(r"([a-z_][a-z0-9_.]*)(<=|>=|!=|<|>|=)(.*)", re.ASCII | re.IGNORECASE)
_LONE = re.compile(r"(<=|>=|!=|<|>|=).*")
_FIELD = re.compile(r"([a-z_]+):(.*)", re.ASCII | re.IGNORECASE)
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}
_UNITS = {"": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "k": 1e3, "m": 1e6, "b": 1.0}
_NUMBER = re.compile(
    r"(-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:e[+-]?[0-9]+)?)(%|[kmg]?b|[km])?", re.ASCII | re.IGNORECASE
)
_DATE = re.compile(r"\d{4}-\d\d(-\d\d(T\d\d(:\d\d(:\d\dZ?)?)?)?)?", re.ASCII)
_FIRST = "0000-01-01T00:00:00"  # fills up a date that is not whole
_TAIL = 2  # folders at the end of a path that `data:` looks at beside as many as it names
_VERSION = re.compile(r"[^@]*@[0-9]+", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{6,64}", re.ASCII)

_Test = Callable[[Entry], bool]


def _texts(*keys: str) -> Callable[[Entry], list[str]]:
    def told(entry: Entry) -> list[str]:
        values = (entry.summary.get(key) for key in keys)
        return [str(item) for value in values for item in (value if isinstance(value, list) else [value]) if item]

    return told


FIELDS: Mapping[str, Callable[[Entry], list[str]]] = {
    "name": lambda entry: [entry.name, f"{entry.name}@{entry.version}"],
    "alias": lambda entry: list(entry.aliases),
    "digest": lambda entry: [entry.digest],
    "base": _texts("base", "fingerprint"),
    "revision": _texts("revision"),
    "type": _texts("type"),
    "task": _texts("task"),
    "quant": _texts("quantization"),
    "origin": _texts("origin"),
    "parent": _texts("parents"),
    "data": _texts("data"),
}
"""What can be written before a colon; the text after it may be any part, in any case."""

_EXAMPLES: Mapping[str, str] = dict.fromkeys(FIELDS, "TEXT") | {
    "name": "sql", "alias": "prod", "base": "smollm2", "type": "lora", "task": "classify", "quant": "nf4",
    "origin": "trained", "parent": "sql@1", "data": "train.jsonl",
}  # fmt: skip
NUMBERS: Mapping[str, str] = {"rank": "rank", "alpha": "alpha", "parameters": "parameters", "size": "bytes"} | {
    "tokens": "tokens",
    "seed": "seed",
    "seconds": "seconds",
}
"""Numbers beside the metrics that can be compared, and where the summary has them."""


@dataclass(frozen=True)
class Query:
    """A query that was understood."""

    text: str
    tests: tuple[_Test, ...]

    def matches(self, entry: Entry) -> bool:
        """Whether every term holds."""
        return all(test(entry) for test in self.tests)


def parse_query(text: str) -> Query:
    """Read a query.

    Raises:
        FormatError: an open quote, an unknown field, a field without a text or something that is no number or date,
            with what can be written.
    """
    if len(text) > MAX_QUERY:
        raise FormatError(f"The query has {len(text)} characters; the limit is {MAX_QUERY}.")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise FormatError(f"The query cannot be read: {error}.", "Close the quote.") from None
    return Query(text, tuple(map(_term, words)))


def search(entries: Iterable[Entry], query: str) -> list[Entry]:
    """The sound entries that match, in their order. Raises as `parse_query`; FormatError for a metric nobody has."""
    found = parse_query(query)
    sound = [entry for entry in entries if not entry.problem]
    _check_metrics(query, sound)
    return [entry for entry in sound if found.matches(entry)]


def _term(word: str) -> _Test:
    if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
        if word[1] == "-":
            raise FormatError(f"{ascii(word)[:40]} is turned round twice.", "One - before a term is enough.")
        test = _term(word[1:])
        return lambda entry: not test(entry)
    comparison = _COMPARISON.fullmatch(word)
    if comparison:
        key, sign, text = comparison.groups()
        return _compare(key.lower(), sign, text)
    if _LONE.fullmatch(word):
        raise FormatError(
            f"{ascii(word)[:40]} compares nothing.", "Write name, sign and number as one word: accuracy>0.8"
        )
    named = _FIELD.fullmatch(word)
    if named:
        return _field(named[1].lower(), named[2])
    wanted = word.casefold()
    return lambda entry: any(_holds(wanted, told) for read in FIELDS.values() for told in read(entry))


def _holds(wanted: str, told: str) -> bool:
    """Whether a text is part of another; name@1 is no part of name@12."""
    found = told.casefold()
    return found.endswith(wanted) if _VERSION.fullmatch(wanted) else wanted in found


def _field(field: str, text: str) -> _Test:
    if field not in FIELDS:
        raise _no_field(field, text)
    if not text:
        raise FormatError(f"{field}: says nothing to look for.", f"Write for example {field}:{_EXAMPLES[field]}")
    read, wanted = FIELDS[field], text.casefold()
    if field == "data":
        return lambda entry: any(_holds(wanted, told) for told in read(entry)) or _is_data(entry, wanted)
    return lambda entry: any(_holds(wanted, told) for told in read(entry))


def _no_field(field: str, text: str) -> FormatError:
    shown = text if text.isprintable() else "TEXT"
    if field in (*NUMBERS, "version", "created"):
        also = f"; one version of a name is NAME@{shown}" if field == "version" else ""
        return FormatError(f"There is no field {field}:, it is compared.", f"Write {field}={shown}{also}.")
    near = difflib.get_close_matches(field, FIELDS, n=1)
    hint = f"Did you mean {near[0]}:? " if near else ""
    return FormatError(f"There is no field {field}:.", f"{hint}Fields: {', '.join(FIELDS)}.")


def _is_data(entry: Entry, wanted: str) -> bool:
    """Whether data of an entry lie at the end of such a path, or have such a digest."""
    if _DIGEST.fullmatch(wanted) and any(told.startswith(wanted) for told in _texts("data_digests")(entry)):
        return True
    parts = [part for part in wanted.split("/") if part]
    return bool(parts) and any(
        _in_order(parts, told.casefold().replace("\\", "/").split("/")[-_TAIL - len(parts) :])
        for told in _texts("data_paths")(entry)
    )


def _in_order(parts: list[str], path: list[str]) -> bool:
    """Whether each part is in one of the folders, one after the other: recipes/sql is in recipes/data/sql/a.jsonl."""
    folders = iter(path)
    return all(any(part in folder for folder in folders) for part in parts)


def _date(text: str) -> str:
    try:
        if not _DATE.fullmatch(text):
            raise ValueError
        datetime.fromisoformat(text.removesuffix("Z") + _FIRST[len(text.removesuffix("Z")) :])
    except ValueError:
        raise FormatError(f"{ascii(text)[:40]} is not a date.", "Write created>2026-01-31.") from None
    return text


def _compare(key: str, sign: str, text: str) -> _Test:
    holds = _OPERATORS[sign]
    if key == "created":
        _date(text)
        return lambda entry: holds(entry.created[: len(text)], text)
    value = _number(key, sign, text)
    if key == "version":
        return lambda entry: holds(entry.version, value)

    def test(entry: Entry) -> bool:
        found = _value(entry, key)
        return found is not None and holds(found, value)

    return test


def _number(key: str, sign: str, text: str) -> float:
    match = _NUMBER.fullmatch(text)
    if not text and key not in FIELDS:
        raise FormatError(f"{key}{sign} lacks a number.", f"Write for example {key}{sign}0.8")
    if match is None:
        printable = text if text.isprintable() else "TEXT"
        hint = f"Write for example {key}>0.8." if key not in FIELDS else f"Write {key}:{printable}"
        raise FormatError(f"{ascii(text)[:40]} is not a number to compare {key} with.", hint)
    unit = (match[2] or "").lower()
    return float(match[1]) / 100 if unit == "%" else float(match[1]) * _UNITS[unit]


def _value(entry: Entry, key: str) -> float | None:
    """A number of the summary, or a metric: `accuracy` of the test part first, `validation.accuracy` of that one."""
    value: Any
    if key in NUMBERS:
        value = entry.summary.get(NUMBERS[key])
        return float(value) if isinstance(value, int | float) else None
    metrics = entry.summary.get("metrics") or {}
    split, _, name = key.rpartition(".")
    for part in (split,) if split else ("test", "validation", *map(str.lower, metrics)):
        value = _folded(_folded(metrics).get(part) or {}).get(name)
        if isinstance(value, int | float):
            return float(value)
    return None


def _folded(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in sorted(told.items())}  # capitals first: what is small prevails


def _check_metrics(query: str, entries: list[Entry]) -> None:
    """A comparison with what nobody has is a slip of the pen, not an empty result."""
    known = {name for entry in entries for found in (entry.summary.get("metrics") or {}).values() for name in found}
    for word in shlex.split(query):
        comparison = _COMPARISON.fullmatch(word.removeprefix("-"))
        if comparison is None or comparison[1].lower() in {*NUMBERS, "created", "version"} or not entries:
            continue
        name = comparison[1].lower().rpartition(".")[2]
        if name not in map(str.lower, known):
            near = difflib.get_close_matches(name, [*known, *NUMBERS], n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            told = ", ".join(sorted(known)) or "none"
            raise FormatError(f"No adapter has a metric or number {name}.", f"{hint}Metrics: {told}.")
