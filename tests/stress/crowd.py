"""A process among many on one store: `python -m tests.stress.crowd ROLE STORE COUNT SYNC`.

Prints one JSON object: what it did, and what it saw that must not be. Readers go on until the file `done` lies beside
the store.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import NotFound
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced

KINDS = 5  # different adapters that are stored again and again
FILES = [lora_files(kind) for kind in range(KINDS)]
WEIGHTS = "adapter_model.safetensors"


def card(number: int) -> Card:
    return Card(seed=number % KINDS, created="2026-01-31T12:00:00Z")


def write(store: Store, count: int) -> dict[str, Any]:
    """Store versions of one name."""
    refs = [store.put("sql", FILES[number % KINDS], card(number)) for number in range(count)]
    return {"numbers": [ref.version for ref in refs], "digests": [ref.digest for ref in refs]}


def move(store: Store, count: int) -> dict[str, Any]:
    """Move an alias to the newest version, again and again, never back."""
    moved = 0
    while not _done(store):
        if (versions := store.versions("sql")) and moved < count:
            store.alias("sql", "prod", versions[-1])
            moved += 1
    return {"moved": moved}


def churn(store: Store, count: int) -> dict[str, Any]:
    """Store versions of another name and remove them."""
    for number in range(count):
        ref = store.put("churn", FILES[number % KINDS], card(number))
        store.alias("churn", "now", ref.version or 0)
        store.remove(ref, force=True)
    return {"removed": count}


def read(store: Store, count: int) -> dict[str, Any]:
    """Look at everything: bytes are those of one version, numbers and the alias never go back."""
    wrong: list[str] = []
    looks, known, pointed = 0, set[int](), 0
    while not _done(store) and len(wrong) < 10:
        here = store if looks % 2 else Store(store.path)
        versions = here.versions("sql")
        if not known <= set(versions):
            wrong.append(f"{sorted(known - set(versions))} vanished")
        known = set(versions)
        for ref in ("sql", "sql:prod", *(f"sql@{number}" for number in versions[-1:]), "churn", "churn:now"):
            wrong += _look(here, ref)
        if (now := here.aliases("sql").get("prod", 0)) < pointed:
            wrong.append(f"sql:prod went from {pointed} back to {now}")
        pointed = max(now, pointed)
        looks += 1
    return {"looks": looks, "wrong": wrong}


def enumerate_(store: Store, count: int) -> dict[str, Any]:
    """List everything and verify everything; neither ever finds damage."""
    wrong: list[str] = []
    looks = 0
    while not _done(store) and len(wrong) < 10:
        try:
            wrong += [f"list: {entry.name}@{entry.version}: {entry.problem}" for entry in store.list() if entry.problem]
            wrong += [f"log: {event.problem}" for event in store.log("churn") if event.problem]
            wrong += [f"verify: {finding}" for finding in (store.verify() if looks % 4 == 0 else ())]
        except NotFound as error:
            wrong += [] if error.message.startswith("There is no adapter churn") else [f"NotFound: {error}"]
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        looks += 1
    return {"looks": looks, "wrong": wrong}


def _look(store: Store, ref: str) -> list[str]:
    published = bool(store.versions("sql"))  # before looking: the first version may come at any moment
    try:
        found = store.resolve(ref)
        stored = store.read(found)
        store.verified_folder(found)
        store.manifest(found)
    except NotFound:
        return [] if ref.startswith("churn") or not published or ":" in ref else [f"{ref} is not found"]
    except Exception as error:
        return [f"{ref}: {type(error).__name__}: {error}"]
    mixed = stored.weights != FILES[stored.card.seed or 0][WEIGHTS]
    return [f"{ref} has the card of another version"] if mixed else []


def _done(store: Store) -> bool:
    return (store.path.parent / "done").exists()


ROLES: Mapping[str, Callable[[Store, int], dict[str, Any]]] = {
    "write": write,
    "move": move,
    "churn": churn,
    "read": read,
    "list": enumerate_,
}


def main(role: str, path: str, count: str, sync: str) -> None:
    store = Store(Path(path), fs=FileSystem() if sync == "sync" else Unsynced())
    print(json.dumps(ROLES[role](store, int(count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
