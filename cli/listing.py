"""`ahl list`: what is in the store, on one screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .render import Column, age, emit, printable, say, size, table

if TYPE_CHECKING:
    from ..store import Entry

_COLUMNS = (
    Column("ADAPTER"),
    Column("TYPE", 3),
    Column("BASE", 2),
    Column("QUANT", 5),
    Column("METRIC", 1),
    Column("ALIASES", 4),
    Column("CREATED", 6),
    Column("SIZE", 7, right=True),
)


def list_adapters(store: Path | None = None, as_json: bool = False) -> None:
    """Print every version of the store."""
    from ..store import Store

    opened = Store(store)
    entries = opened.list()
    if as_json:
        emit({"store": str(opened.path), "adapters": [entry_dict(entry) for entry in entries]})
    elif entries:
        say(*table(_COLUMNS, map(_row, entries)))
        damaged = [entry for entry in entries if entry.problem]
        say(*(printable(f"damaged: {entry.problem}") for entry in damaged))
    else:
        say(printable(f"No adapters yet in {opened.path}."))
        say("Train one with `ahl train sql`; `ahl recipes` lists what there is.")


def search_adapters(query: str, store: Path | None = None, as_json: bool = False) -> None:
    """Print the versions that match a query."""
    from ..store import Store

    opened = Store(store)
    found = opened.search(query)
    if as_json:
        emit({"store": str(opened.path), "query": query, "adapters": [entry_dict(entry) for entry in found]})
    elif found:
        say(*table(_COLUMNS, map(_row, found)))
    else:
        say(f"Nothing matches {printable(query)}.", "`ahl list` shows everything, `ahl search --help` the fields.")


def entry_dict(entry: Entry) -> dict[str, Any]:
    """One version as plain data."""
    facts = entry.summary
    return {
        "ref": f"{entry.name}@{entry.version}",
        "name": entry.name,
        "version": entry.version,
        "digest": entry.digest,
        "aliases": list(entry.aliases),
        "created": entry.created,
        "type": facts.get("type"),
        "base": facts.get("base"),
        "quantization": facts.get("quantization"),
        "task": facts.get("task"),
        "origin": facts.get("origin"),
        "metric": primary_metric(facts.get("metrics") or {}, facts.get("measured_by") or ()),
        "metrics": facts.get("metrics") or {},
        "bytes": facts.get("bytes"),
        "problem": entry.problem or None,
    }


def primary_metric(metrics: dict[str, dict[str, float]], order: tuple[str, ...] | list[str]) -> dict[str, Any] | None:
    """The one figure to show: the task's first metric (accuracy where it names none), on test data if there are any."""
    split = next((name for name in ("test", "validation") if metrics.get(name)), None)
    if split is None:
        return None
    found = metrics[split]
    name = next((name for name in (*order, "accuracy") if name in found), next(iter(found)))
    return {"name": name, "split": split, "value": found[name]}


def _row(entry: Entry) -> list[object]:
    told = entry_dict(entry)
    if entry.problem:
        return [told["ref"], "damaged", *[""] * (len(_COLUMNS) - 2)]
    metric = told["metric"]
    return [
        told["ref"],
        told["type"] or "",
        base_label(told["base"]),
        told["quantization"] or "",
        f"{metric['name']} {metric['value']:.3f}" if metric else "",
        ", ".join(entry.aliases),
        age(entry.created),
        size(told["bytes"]),
    ]


def base_label(name: object) -> str:
    """A base's name; of a folder only its last part."""
    text = str(name or "")
    return text.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] if text.startswith(("/", "~", ".")) else text
