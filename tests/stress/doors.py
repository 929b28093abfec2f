"""Every way out of a store, and whether what comes out is right."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from adapterhub_lite.cli.showing import show_adapter
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store


@dataclass(frozen=True)
class Refused:
    """An error of the package's own; `bug` for any other."""

    what: str
    bug: bool = False


@contextmanager
def _looking() -> Iterator[None]:
    """What the look at an answer meets is not the answer."""
    try:
        yield
    except OSError as error:
        raise AdapterHubError(f"It could not be looked at: {error}") from None


def _files(folder: Path) -> dict[str, bytes]:
    with _looking():
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _show(store: Store, ref: str) -> str:
    with redirect_stdout(StringIO()) as said:
        show_adapter(ref, store.path)
        show_adapter(ref, store.path, as_json=True)
    # How long ago a version was made changes while a long run goes on; when it was made stands beside it.
    return re.sub(r"just now|\d+ min ago|\d+ h ago", "AGE", said.getvalue().replace(str(store.path), "STORE"))


def _exported(store: Store, ref: str, target: Path) -> dict[str, bytes]:
    folder = store.export(ref, target)
    try:
        return _files(folder)
    finally:
        with _looking():
            shutil.rmtree(folder)


def _archived(store: Store, ref: str, target: Path) -> bytes:
    file = store.export(ref, target.with_suffix(".tar"))
    with _looking():
        found = file.read_bytes()
        file.unlink()
    return found


def _versions(store: Store, ref: str) -> list[Any]:
    """Without those that a listing marks as damaged."""
    return [entry for entry in store.list() if not entry.problem]


def _events(store: Store, ref: str) -> list[Any]:
    return [event for event in store.log(Ref.parse(ref).name) if not event.problem]


def _histories(store: Store, ref: str) -> list[Any]:
    name = Ref.parse(ref).name
    return [store.alias_history(name, alias) for alias in sorted(store.aliases(name))]


_Door = Callable[[Store, str], Any]
DOORS: Mapping[str, _Door] = {
    "resolve": lambda store, ref: store.resolve(ref),
    "newest": lambda store, ref: store.resolve(Ref.parse(ref).name),
    "card": lambda store, ref: store.card(ref),
    "spec": lambda store, ref: store.spec(ref),
    "manifest": lambda store, ref: store.manifest(ref),
    "received": lambda store, ref: store.received(ref),
    "read": lambda store, ref: store.read(ref),
    "verified_folder": lambda store, ref: _files(store.verified_folder(ref)),
    "aliases": lambda store, ref: store.aliases(Ref.parse(ref).name),
    "history": _histories,
    "versions": lambda store, ref: store.versions(Ref.parse(ref).name),
    "list": _versions,
    "search": lambda store, ref: [entry for entry in store.search("rank=2") if not entry.problem],
    "log": _events,
    "show": _show,
}
LISTS = ("list", "search", "log")


def answers(store: Store, target: Path, refs: Sequence[str]) -> dict[str, Any]:
    """What each door says to each reference; `target` is a path where something may be exported."""
    doors: dict[str, _Door] = {
        **DOORS,
        "export": lambda store, ref: _exported(store, ref, target),
        "archive": lambda store, ref: _archived(store, ref, target),
    }
    return {f"{door} {ref}": _answer(call, store, ref) for door, call in doors.items() for ref in refs}


def _answer(door: _Door, store: Store, ref: str) -> Any:
    try:
        return door(store, ref)
    except AdapterHubError as error:
        return Refused(f"{type(error).__name__}: {error}")
    except Exception as error:
        return Refused(f"{type(error).__name__}: {error}", bug=True)


def wrong(seen: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Answers that are neither right nor refused; of a list, what is left out counts as refused."""
    found = []
    for door, answer in seen.items():
        if isinstance(answer, Refused):
            if answer.bug:
                found.append(f"{door} fails: {answer.what}")
        elif isinstance(right[door], Refused):
            if answer != right[door]:
                found.append(f"{door} answers {_short(answer)} instead of {right[door].what}")
        elif door.split()[0] in LISTS:
            found += [f"{door} has {_short(one)}" for one in answer if one not in right[door]]
        elif answer != right[door]:
            found.append(f"{door} answers {_short(answer)} instead of {_short(right[door])}")
    return found


def refused(seen: Mapping[str, Any], right: Mapping[str, Any]) -> int:
    """How many doors stay shut, or leave something out."""
    return sum(isinstance(answer, Refused) or answer != right[door] for door, answer in seen.items())


def _short(answer: Any) -> str:
    return str(vars(answer) if isinstance(answer, Ref) else answer)[:300]
