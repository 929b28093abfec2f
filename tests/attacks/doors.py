"""The ways in: how each kind of input reaches the store, through the API and through the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from adapterhub_lite.cli.app import app
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from tests.attacks.build import CONFIG, WEIGHTS, files, stored_zip, tar
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced

NEXT = lora_files(7)
"""The adapter that is put into a store that was damaged."""


@dataclass(frozen=True)
class Place:
    """Everything that a test may touch: a store with sql@1, sql@2 and sql:prod -> 1, what comes in, what is precious.

    `outside` stands for the user's own files: nothing in it is ever opened, and nothing there changes.
    """

    root: Path

    @property
    def store_path(self) -> Path:
        """The folder of the store."""
        return self.root / "store"

    @property
    def inbox(self) -> Path:
        """Where hostile input lies."""
        return self.root / "inbox"

    @property
    def outbox(self) -> Path:
        """Where exports may go."""
        return self.root / "outbox"

    @property
    def outside(self) -> Path:
        """The user's own files."""
        return self.root / "outside"

    @property
    def store(self) -> Store:
        """The store, opened anew."""
        return Store(self.store_path, fs=Unsynced())


@dataclass(frozen=True)
class Call:
    """One try: a function, or arguments of the application. `at` is the place of that try."""

    label: str
    run: Callable[[], object] | None = None
    cli: tuple[str, ...] = ()
    code: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of a try: a value or an error of ours, and what the application said."""

    value: object = None
    error: AdapterHubError | None = None
    said: Result | None = field(default=None, compare=False)


def ahl(*arguments: str) -> Result:
    """The application, called in this process."""
    return CliRunner().invoke(app, list(arguments))


def perform(call: Call) -> Outcome:
    """Try it. Anything but an error of ours goes through."""
    if call.run is None:
        return Outcome(said=ahl(*call.cli))
    try:
        return Outcome(value=call.run())
    except AdapterHubError as error:
        return Outcome(error=error)


def make_place(root: Path) -> Place:
    """A place with a store in it."""
    place = Place(root)
    for folder in (place.inbox, place.outbox, place.outside):
        folder.mkdir(parents=True)
    (place.outside / "precious.txt").write_text("mine")
    (place.outside / ("a" * 64)).write_text("a blob of another cache")
    old = {"ns": (10**18, 10**18)}  # long enough ago to be swept
    for path in place.outside.iterdir():
        os.utime(path, **old)  # type: ignore[arg-type]
    store = place.store
    for seed in (0, 1):
        store.put("sql", lora_files(seed), Card(created="2026-01-31T12:00:00Z", metrics={"test": {"accuracy": 0.5}}))
    store.alias("sql", "prod", 1)
    return place


def copied(place: Place, root: Path) -> Place:
    """The same again elsewhere, in which two names of one file are two names of one file."""
    copies: dict[tuple[int, int], str] = {}

    def copy(source: str, target: str) -> None:
        told = os.lstat(source)
        known = copies.setdefault((told.st_dev, told.st_ino), target)
        if known != target:
            os.link(known, target)
        else:
            shutil.copy2(source, target)

    shutil.copytree(place.root, root, symlinks=True, copy_function=copy)
    return Place(root)


# --- ways in -----------------------------------------------------------------------------------------------------


def _cli(place: Place, *arguments: str) -> tuple[str, ...]:
    """Words that a hostile one cannot be taken for an option among."""
    command, *words = arguments
    return (command, "--json", "--store", str(place.store_path), "--", *words)


def _importing(place: Place, source: Path | str, mark: str) -> Iterator[Call]:
    name = f"victim-{mark}"
    yield Call(f"API import {mark}", lambda: place.store.import_(source, name))
    options = ("import", "--json", "--store", str(place.store_path), "--name", f"{name}-cli")
    yield Call(f"CLI import {mark}", cli=(*options, "--", str(source)))


def of_files(place: Place, made: dict[str, bytes]) -> Iterator[Call]:
    """Files with these contents: as a folder, in archives, and handed over as bytes."""
    folder = place.inbox / "foreign"
    folder.mkdir()
    for name, data in made.items():
        (folder / name).write_bytes(data)
    (place.inbox / "foreign.tar").write_bytes(tar(made))
    (place.inbox / "foreign.zip").write_bytes(stored_zip(made))
    yield from _importing(place, folder, "folder")
    for kind in ("tar", "zip"):
        path = place.inbox / f"foreign.{kind}"
        yield Call(f"API import {kind}", partial(place.store.import_, path, f"victim-{kind}"))
    if {CONFIG, WEIGHTS} == made.keys():
        yield Call("API put", lambda: place.store.put("victim-put", made, Card()))
        paths = {name: folder / name for name in made}
        yield Call("API put of paths", lambda: place.store.put("victim-paths", paths, Card()))


def of_folder(place: Place, make: Callable[[Path], object]) -> Iterator[Call]:
    """A folder with something special in it."""
    folder = place.inbox / "foreign"
    folder.mkdir()
    for name, data in files().items():
        (folder / name).write_bytes(data)
    make(folder)
    yield from _importing(place, folder, "folder")


def of_archive(place: Place, data: bytes) -> Iterator[Call]:
    """An archive of these bytes."""
    path = place.inbox / "foreign.bin"
    path.write_bytes(data)
    yield from _importing(place, path, "archive")


def of_path(place: Place, make: Callable[[Place], str | Path]) -> Iterator[Call]:
    """Something that is neither a folder nor an archive."""
    yield from _importing(place, make(place), "path")


def of_name(place: Place, name: str) -> Iterator[Call]:
    """A text as the name of an adapter, wherever one is asked for."""
    store, good = place.store, place.inbox / "good"
    good.mkdir()
    for file, data in files().items():
        (good / file).write_bytes(data)
    out = place.outbox / "out"
    tries: dict[str, Callable[[], object]] = {
        "put": lambda: store.put(name, files(), Card()),
        "import": lambda: store.import_(good, name),
        "alias": lambda: store.alias(name, "prod", 1),
        "refuse": lambda: store.refuse(name, "prod", 1, {}),
        "rollback": lambda: store.rollback(name, "prod"),
        "unalias": lambda: store.unalias(name, "prod"),
        "remove": lambda: store.remove(name, force=True),
        "resolve": lambda: store.resolve(name),
        "resolve a Ref": lambda: store.resolve(Ref(name, version=1)),
        "read": lambda: store.read(name),
        "card": lambda: store.card(name),
        "versions": lambda: store.versions(name),
        "aliases": lambda: store.aliases(name),
        "history": lambda: store.alias_history(name, "prod"),
        "log": lambda: store.log(name),
        "export": lambda: store.export(name, out),
    }
    yield from (Call(f"API {label}", run) for label, run in tries.items())
    yield Call("CLI import", cli=("import", "--json", "--store", str(place.store_path), "--name", name, str(good)))
    for words in (
        ("show", name),
        ("log", name),
        ("remove", name),
        ("export", name, str(out)),
        ("alias", f"{name}:prod"),
    ):
        yield Call(f"CLI {words[0]}", cli=_cli(place, *words))


def of_good_name(place: Place, name: str) -> Iterator[Call]:
    """A text that is a name after all."""
    yield Call("API put", lambda: place.store.put(name, files(), Card()))


def of_alias(place: Place, alias: str) -> Iterator[Call]:
    """A text as an alias."""
    store = place.store
    tries: dict[str, Callable[[], object]] = {
        "alias": lambda: store.alias("sql", alias, 1),
        "refuse": lambda: store.refuse("sql", alias, 1, {}),
        "rollback": lambda: store.rollback("sql", alias),
        "unalias": lambda: store.unalias("sql", alias),
        "resolve": lambda: store.resolve(f"sql:{alias}"),
        "read": lambda: store.read(f"sql:{alias}"),
    }
    yield from (Call(f"API {label}", run) for label, run in tries.items())
    for words in (("alias", f"sql:{alias}", "1"), ("show", f"sql:{alias}"), ("rollback", f"sql:{alias}")):
        yield Call(f"CLI {words[0]}", cli=_cli(place, *words))


def of_version(place: Place, version: str) -> Iterator[Call]:
    """A text as a version."""
    yield Call("API resolve", lambda: place.store.resolve(f"sql@{version}"))
    yield Call("API remove", lambda: place.store.remove(f"sql@{version}", force=True))
    yield Call("API alias", lambda: place.store.alias("sql", "prod", version))  # type: ignore[arg-type]
    for words in (("show", f"sql@{version}"), ("alias", "sql:prod", version), ("remove", f"sql@{version}")):
        yield Call(f"CLI {words[0]}", cli=_cli(place, *words))


def of_digest(place: Place, digest: str) -> Iterator[Call]:
    """A text as the digest that a reference was resolved to."""
    ref = Ref("sql", version=1, digest=digest)
    yield Call("API resolve", lambda: place.store.resolve(ref))
    yield Call("API read", lambda: place.store.read(ref))
    yield Call("API export", lambda: place.store.export(ref, place.outbox / "out"))


def of_query(place: Place, query: str) -> Iterator[Call]:
    """A text as a search."""
    yield Call("API search", lambda: place.store.search(query))
    yield Call("CLI search", cli=_cli(place, "search", query))


def of_target(place: Place, make: Callable[[Place], str | Path]) -> Iterator[Call]:
    """A path to export to."""
    target = make(place)
    yield Call("API export", lambda: place.store.export("sql@1", target))
    if "\0" not in str(target) and "\ud800" not in str(target):  # no argument of a process can hold those
        yield Call("CLI export", cli=_cli(place, "export", "sql@1", str(target)))


def of_recipe(place: Place, text: bytes) -> Iterator[Call]:
    """A recipe of these bytes."""
    path = place.inbox / "recipe.yaml"
    path.write_bytes(text)
    yield Call("API load_recipe", lambda: load_recipe(path))
    yield Call("CLI train", cli=_cli(place, "train", str(path)))


DOORS: dict[str, Callable[[Place, Any], Iterator[Call]]] = {
    "files": of_files,
    "folder": of_folder,
    "archive": of_archive,
    "path": of_path,
    "name": of_name,
    "good name": of_good_name,
    "alias": of_alias,
    "version": of_version,
    "digest": of_digest,
    "query": of_query,
    "target": of_target,
    "recipe": of_recipe,
}


# --- what is done with a store -----------------------------------------------------------------------------------


def uses(place: Place) -> dict[str, Call]:
    """Everything that can be done with a store, by name: what only reads, then what writes."""
    out = place.outbox / "out"
    api: dict[str, Callable[[Store], object]] = {
        "resolve": lambda store: store.resolve("sql@1"),
        "follow": lambda store: store.resolve("sql:prod"),
        "read": lambda store: store.read("sql@1"),
        "folder": lambda store: store.verified_folder("sql@1"),
        "card": lambda store: store.card("sql@1"),
        "list": lambda store: store.list(),
        "search": lambda store: store.search("sql accuracy>0.1"),
        "log": lambda store: store.log("sql"),
        "verify": lambda store: store.verify(),
        "export": lambda store: store.export("sql@1", out),
        "put": lambda store: store.put("sql", NEXT, Card()),
        "put again": lambda store: store.put("sql", lora_files(0), Card()),
        "alias": lambda store: store.alias("sql", "prod", 2),
        "rollback": lambda store: store.rollback("sql", "prod"),
        "unalias": lambda store: store.unalias("sql", "prod"),
        "remove": lambda store: store.remove("sql@2"),
        "gc": lambda store: store.gc(older_than=0),
        "repair": lambda store: store.repair(),
        "migrate": lambda store: store.migrate(),
    }
    found = {f"API {name}": Call(f"API {name}", _bound(run, place)) for name, run in api.items()}
    words = (("list",), ("show", "sql@1"), ("log", "sql"), ("verify",), ("alias", "sql:prod", "2"))
    return found | {f"CLI {one[0]}": Call(f"CLI {one[0]}", cli=_cli(place, *one)) for one in words}


def _bound(run: Callable[[Store], object], place: Place) -> Callable[[], object]:
    return lambda: run(place.store)


def told_error(said: Result) -> dict[str, Any]:
    """The error that the application says as JSON."""
    found: dict[str, Any] = json.loads(said.stdout)["error"]
    return found
