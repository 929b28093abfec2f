"""Facts about bases, found without loading one and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..bases import fetch, hub
from ..bases.catalog import CATALOG
from ..errors import AdapterHubError
from ..events import Listener
from .opening import silence

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")


def list_bases() -> list[dict[str, Any]]:
    """Every base of the catalogue and where it is, if it is here."""
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "about": entry.about,
            "license": entry.license,
            "hub_id": entry.hub_id,
            "folder": str(fetch.cached(entry.name) or "") or None,
        }
        for entry in CATALOG.values()
    ]


def pull_base(name: str, on_event: Listener) -> dict[str, Any]:
    """Fetch a base and say where it is."""
    silence()
    source = fetch.locate(name, on_event=on_event)
    return {"name": name, "folder": str(source.folder), "origin": source.origin, "revision": source.revision}


def base_facts(name: str) -> dict[str, Any]:
    """What is known of a base: of the catalogue, and of its folder where it is here.

    Raises:
        NotFound: it is neither in the catalogue nor here.
    """
    known = next((base for base in list_bases() if base["name"] == name), {"name": name})
    folder = _folder(name)
    facts: dict[str, Any] = {**known, "folder": str(folder) if folder else None, "bytes": None}
    if folder is None:
        return facts
    config = json.loads((folder / "config.json").read_text("utf-8"))
    shape = {key: config[key] for key in _SHAPE if key in config}
    return {**facts, "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), **shape}


def _folder(name: str) -> Path | None:
    """Where a base is on this disk."""
    found = fetch.cached(name)
    if found:
        return found
    if (name not in CATALOG and "/" not in name) or Path(name).expanduser().is_dir():
        return fetch.locate(name).folder
    silence()
    try:
        return hub.from_cache(CATALOG[name].hub_id if name in CATALOG else name)[0]
    except AdapterHubError:
        return None
