"""`ahl log NAME`: what happened to a name, the latest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .listing import base_label, primary_metric
from .render import age, emit, printable, say

if TYPE_CHECKING:
    from ..store import Event

_DONE = {"set": "set to", "promote": "promoted to", "rollback": "rolled back to", "refuse": "NOT promoted to"}


def show_log(name: str, store: Path | None = None, as_json: bool = False, limit: int | None = None) -> None:
    """Print the versions of a name and the moves of its aliases."""
    from ..names import Ref
    from ..store import Store

    opened = Store(store)
    name = Ref.parse(name).name
    events = opened.log(name)[:limit]
    aliases = opened.aliases(name) if not any(event.problem and event.alias for event in events) else {}
    if as_json:
        emit({"name": name, "aliases": aliases, "events": [asdict(event) for event in events]})
        return
    for event in events:
        say(*(printable(line) for line in _lines(name, event, aliases)))


def _lines(name: str, event: Event, aliases: Mapping[str, int]) -> list[str]:
    when = f"{event.time or 'unknown time':<20}"
    if event.problem:
        return [f"{when}  damaged: {event.problem}"]
    if event.alias:
        return [f"{when}    {_move(name, event)}"]
    if event.kind == "removed":
        return [f"{when}  {name}@{event.version} removed"]
    pointing = [alias for alias, version in aliases.items() if version == event.version]
    mark = f" ({', '.join(pointing)})" if pointing else ""
    return [f"{when}  {name}@{event.version}{mark}  {', '.join(_facts(event))}  {age(event.time)}"]


def _move(name: str, event: Event) -> str:
    if event.version is None:
        return f"{name}:{event.alias} taken away"
    told = event.facts
    why = ""
    if told.get("metric"):
        why = f": {told['metric']} {_figure(told.get('candidate_value'))}"
        if told.get("current") and told.get("current_value") is not None:
            why += f", {name}@{told['current']} has {_figure(told['current_value'])}, margin {told.get('margin', 0)}"
    elif told.get("why"):
        why = f": {told['why']}"
    elif event.kind == "rollback" and told.get("from"):
        why = f" from {name}@{told['from']}"
    return f"{name}:{event.alias} {_DONE.get(event.kind, event.kind)} {name}@{event.version}{why}"


def _facts(event: Event) -> list[str]:
    told = event.facts
    metric = primary_metric(told.get("metrics") or {}, told.get("measured_by") or ())
    base = " ".join(str(part) for part in (base_label(told.get("base")), told.get("quantization")) if part)
    parts = [
        str(told.get("origin") or event.kind),
        str(told.get("type") or ""),
        f"on {base} ({str(told.get('fingerprint') or 'unknown')[:12]})" if base else "",
        f"{metric['name']} {metric['value']:.3f} ({metric['split']})" if metric else "",
        f"from {', '.join(told['parents'])}" if told.get("parents") else "",
        event.digest[:12],
    ]
    return [part for part in parts if part]


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else str(value)
