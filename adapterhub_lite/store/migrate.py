"""The format of a store: reading it, making a new store, and taking an older one step by step to the present.

A step first writes everything that the next format needs beside what the older one has, durably; then `store.json` is
replaced, which is the decision; then what only the older format needs is taken away. Killed anywhere, the store is of
one format or of the other, and the step can be taken again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import FormatError, StoreCorrupt, StoreNewer
from ..formats.files import read_regular
from ..formats.strict_json import dump, parse_object
from . import aliases
from .fs import FileSystem, discard, ensure_folder, replace_file
from .layout import FORMAT, Layout
from .links import refuse_strange

_LIMIT = 1 << 16


@dataclass(frozen=True)
class Migration:
    """One step from format `number - 1` to `number`."""

    number: int
    what: str
    write: Callable[[FileSystem, Layout], None]
    tidy: Callable[[FileSystem, Layout], None]


def read_format(layout: Layout) -> int | None:
    """The format of the store, or None where there is no store.

    Raises:
        StoreNewer: a newer version of this package wrote it.
        StoreCorrupt: store.json is missing beside adapters, or is damaged; a folder of the store is none.
    """
    refuse_strange(layout)
    if not layout.store_file.is_file():
        if not (layout.adapters.is_dir() and any(layout.adapters.iterdir())):
            return None
        # Another process may have made the store since the first look: it writes store.json before any adapter.
        if not layout.store_file.is_file():
            raise StoreCorrupt(f"{layout.store_file} is missing.", f'Write {{"format": {FORMAT}}} there to go on.')
    try:
        data = read_regular(layout.store_file, _LIMIT)
        found = parse_object(data, "store.json", limit=_LIMIT).get("format")
    except FormatError as error:
        raise StoreCorrupt(f"{layout.store_file} is damaged: {error}") from None
    if type(found) is not int or found < 1:
        raise StoreCorrupt(f"{layout.store_file} does not say its format.")
    if found > FORMAT:
        message = f"{layout.root} has store format {found}; this version of adapterhub-lite reads up to {FORMAT}."
        raise StoreNewer(message, "Upgrade with: pip install --upgrade adapterhub-lite")
    return found


def ensure_store(fs: FileSystem, layout: Layout) -> None:
    """Make the store if it is not there yet, and bring an older one to the present format.

    Processes may do so at once: all write the same.
    """
    found = read_format(layout)
    root = layout.root.absolute()
    if found is None or not layout.tmp.is_dir():
        existing = next(parent for parent in (root, *root.parents) if parent.is_dir())
        ensure_folder(fs, root, existing)
        ensure_folder(fs, layout.tmp.absolute(), root)
    if found is None:
        _set_format(fs, layout, FORMAT)
    else:
        migrate(fs, layout, found)


def migrate(fs: FileSystem, layout: Layout, found: int) -> list[Migration]:
    """Take every step from format `found` to the present; returns the steps taken."""
    steps = [step for step in MIGRATIONS if step.number > found]
    for step in steps:
        step.write(fs, layout)
        _set_format(fs, layout, step.number)
        step.tidy(fs, layout)
    return steps


def _set_format(fs: FileSystem, layout: Layout, number: int) -> None:
    replace_file(fs, layout.tmp, layout.store_file, dump({"format": number}))


def _write_moves(fs: FileSystem, layout: Layout) -> None:
    """Each alias that can be read becomes its moves; a damaged one stays what it is, and is reported by `verify`."""
    for name, alias in _first_aliases(layout):
        try:
            history = aliases.read_first(layout, name, alias)
        except StoreCorrupt:
            continue
        ensure_folder(fs, layout.aliases(name), layout.root)
        for move in history:
            if not layout.move(name, alias, move.number).exists():
                aliases.write_move(fs, layout, name, alias, move)


def _drop_first_aliases(fs: FileSystem, layout: Layout) -> None:
    for name, alias in _first_aliases(layout):
        if layout.move(name, alias, 1).exists():
            discard(fs, layout.first_alias(name, alias))


def _first_aliases(layout: Layout) -> list[tuple[str, str]]:
    names = aliases.names_with_aliases(layout)
    return [(name, alias) for name in names for alias in sorted(aliases.listed(layout, name, 1).first)]


MIGRATIONS: tuple[Migration, ...] = (
    Migration(2, "each move of an alias is a file of its own", _write_moves, _drop_first_aliases),
)
