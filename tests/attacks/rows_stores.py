"""S12, S13, S15, I9 and links: stores that were damaged, or made to harm whoever opens them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import AdapterHubError, NotFound, StoreCorrupt, StoreError, StoreNewer
from adapterhub_lite.formats.strict_json import dump
from adapterhub_lite.store.manifest import sha256
from tests.attacks.build import CARD, CONFIG, MANIFEST, WEIGHTS, move, overwrite, sparse
from tests.attacks.doors import NEXT, Place

Refusals = Mapping[str, tuple[type[AdapterHubError], str]]


@dataclass(frozen=True)
class Damage:
    """A store that is not as it should be.

    Attributes:
        make: does it to the store of a place, which has sql@1, sql@2 and sql:prod -> 1.
        fails: uses (keys of `doors.uses`, without "API ") that must be refused, by which error and words. All others
            must do their work or be refused by an error of ours.
        found: whether `verify` must find it.
        swapped: sql@1 is another version in good order, which only its digest tells.
        leads: it may lead out of the store, so everything that can be done with it is tried.
    """

    id: str
    make: Callable[[Place], object]
    fails: Refusals = field(default_factory=dict)
    found: bool = True
    swapped: bool = False
    leads: bool = False


def _all(uses: str, error: type[AdapterHubError], words: str) -> dict[str, tuple[type[AdapterHubError], str]]:
    return dict.fromkeys(uses.split(), (error, words))


_CONTENT = "read folder export"  # uses that look at contents
_VERSION = f"resolve follow card {_CONTENT}"
_EVERYTHING = f"{_VERSION} list search log put alias rollback unalias remove gc repair migrate"


def _content(words: str) -> Refusals:
    return _all(_CONTENT, StoreCorrupt, words)


def _follow(error: type[AdapterHubError], words: str) -> Refusals:
    return _all("follow", error, words)


def _version(place: Place, number: int = 1) -> Path:
    return place.store_path / "adapters" / "sql" / str(number)


# --- S12, S13: contents ------------------------------------------------------------------------------------------


def _change(file: str, change: Callable[[bytes], bytes], place: Place) -> None:
    path = _version(place) / file
    overwrite(path, change(path.read_bytes()))


def _flip(data: bytes) -> bytes:
    return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]


def _of_other(file: str, place: Place) -> None:
    overwrite(_version(place) / file, (_version(place, 2) / file).read_bytes())


def _swapped(place: Place) -> None:
    shutil.rmtree(_version(place))
    shutil.copytree(_version(place, 2), _version(place))


def _replaced(file: str, make: Callable[[Path, Place], object], place: Place) -> None:
    path = _version(place) / file
    path.unlink()
    make(path, place)


def _told(change: Callable[[dict[str, Any]], object], place: Place) -> None:
    path = _version(place) / MANIFEST
    told = json.loads(path.read_bytes())
    told.pop("digest", None)
    change(told)
    overwrite(path, dump(told, indent=2))


def _huge(file: str, place: Place) -> None:
    """A file larger than any may be, and a manifest that agrees with it in everything."""
    data = b"{" + b" " * (5 << 20)
    overwrite(_version(place) / file, data)
    _told(lambda told: told["files"].update({file: {"sha256": sha256(data), "size": len(data)}}), place)


_SPECIAL: dict[str, Callable[[Path, Place], object]] = {
    "a link outside": lambda path, place: path.symlink_to(place.outside / "precious.txt"),
    "a link to the same file of another version": lambda path, place: path.symlink_to(_version(place, 2) / path.name),
    "a fifo": lambda path, place: os.mkfifo(path),
    "a folder": lambda path, place: path.mkdir(),
    "missing": lambda path, place: None,
    "9 GiB": lambda path, place: sparse(path, b"", 9 << 30),
}
CONTENTS = [
    Damage(f"S12 one bit of {file}", partial(_change, file, _flip), _all(uses, StoreCorrupt, "damaged"))
    for file, uses in ((CONFIG, _CONTENT), (WEIGHTS, _CONTENT), (CARD, f"card {_CONTENT}"), (MANIFEST, _VERSION))
] + [
    Damage("S13 weights cut", partial(_change, WEIGHTS, lambda data: data[:-1]), _content("bytes")),
    Damage("S13 weights with more", partial(_change, WEIGHTS, lambda data: data + b"x"), _content("bytes|limit")),
    Damage("S13 nothing left", partial(_change, WEIGHTS, lambda data: b""), _content("0 bytes")),
    Damage("S13 weights of another", partial(_of_other, WEIGHTS), _content("does not match its digest")),
    Damage("S13 manifest of another", partial(_of_other, MANIFEST), _follow(StoreCorrupt, "stands for")),
    Damage("S13 a whole other version", _swapped, _follow(StoreCorrupt, "stands for"), swapped=True),
    Damage("S13 configuration of 5 MiB, sealed", partial(_huge, CONFIG), _all("read export", StoreCorrupt, "limit is")),
    Damage("S13 a card of 5 MiB, sealed", partial(_huge, CARD), _all("card read export", StoreCorrupt, "limit is")),
    *(
        Damage(f"S13 {file} is {name}", partial(_replaced, file, make), _all(uses, StoreCorrupt, "damaged"))
        for name, make in _SPECIAL.items()
        for file, uses in ((WEIGHTS, _CONTENT), (CARD, f"card {_CONTENT}"), (MANIFEST, _VERSION))
    ),
]  # fmt: skip

# --- S15: store.json ---------------------------------------------------------------------------------------------


def _store_file(data: bytes, place: Place) -> None:
    overwrite(place.store_path / "store.json", data)


def _no_store_file(make: Callable[[Path, Place], object], place: Place) -> None:
    path = place.store_path / "store.json"
    path.unlink()
    make(path, place)


FORMATS = [
    Damage(
        f"S15 format {number}",
        partial(_store_file, b'{"format": %d}' % number),
        _all(_EVERYTHING, StoreNewer, f"has store format {number}; this version of adapterhub-lite reads up to 2"),
    )
    for number in (3, 99, 2**63)
] + [
    Damage(f"S15 store.json {name}", partial(_store_file, data), _all(_EVERYTHING, StoreCorrupt, "store.json"))
    for name, data in {
        "empty": b"", "cut": b'{"form', "text": b'{"format": "2"}', "0": b'{"format": 0}', "true": b'{"format": true}',
        "a float": b'{"format": 2.0}', "a list": b"[2]", "twice": b'{"format": 2, "format": 99}', "deep": b"[" * 9_000,
        "of 70 kB": b" " * 70_000,
    }.items()
] + [
    Damage(f"S15 store.json is {name}", partial(_no_store_file, make), _all(_EVERYTHING, StoreCorrupt, "store.json"))
    for name, make in _SPECIAL.items()
]  # fmt: skip

# --- I9: digests and numbers in a store --------------------------------------------------------------------------


def _received(received: object, place: Place) -> None:
    def change(told: dict[str, Any]) -> None:
        told.update(format=2, received=received)
        told["seal"] = sha256(dump({key: value for key, value in told.items() if key != "seal"}))

    _told(change, place)


def _digest_of(text: str) -> Callable[[dict[str, Any]], object]:
    return lambda told: told["files"][WEIGHTS].update(sha256=text)


def _another_file(told: dict[str, Any]) -> None:
    told["files"]["../../x"] = told["files"][CARD]


MANIFESTS = [
    Damage(f"I9 stored digest {name}", partial(_told, _digest_of(text)), _all(_VERSION, StoreCorrupt, "damaged"))
    for name, text in {
        "a path": "sha256:../../x", "upper case": "A" * 64, "63 digits": "a" * 63, "another one": "../" * 21 + "x",
    }.items()
] + [
    Damage("I9 stored file that is none", partial(_told, _another_file), _all(_VERSION, StoreCorrupt, "damaged")),
    *(
        Damage(f"I9 received from {name}", partial(_received, received), _all(_VERSION, StoreCorrupt, "came from"))
        for name, received in {
            "a list": [], "a base that is a list": {"base": [1]}, "a base that is text": {"base": "x"},
            "a fingerprint that is text": {"base": {"fingerprint": "x"}}, "a time that is a number": {"time": 5},
            "a list of files that is none": {"ignored": "x"}, "files that are numbers": {"ignored": [1]},
        }.items()
    ),
]  # fmt: skip


def _moved(data: bytes, number: int, place: Place) -> None:
    folder = place.store_path / "aliases" / "sql" / f"prod@{number}"
    folder.mkdir(exist_ok=True)
    overwrite(folder / "move.json", data)


def _other_name(place: Place) -> None:
    folder = place.store_path / "aliases" / "sql" / "prod@1"
    folder.rename(folder.with_name("test@1"))


_GOOD, _MOST = "a" * 64, 999_999_999
MOVES = [
    Damage(f"I9 move to {name}", partial(_moved, data, 1), _follow(StoreCorrupt, "sql:prod is damaged"))
    for name, data in {
        "a path as digest": move(1, "../../x"), "upper case": move(1, "A" * 64), "a path": move("../1", _GOOD),
        "version 0": move(0, _GOOD), "version -1": move(-1, _GOOD), "version true": move(True, _GOOD),
        "a digest alone": move(None, _GOOD), "another event": move(1, _GOOD, event="exec"),
        "another alias": move(1, _GOOD, alias="test"), "another name": move(1, _GOOD, name="x"),
        "number 2 as 1": move(1, _GOOD, 2), "a figure of 400 digits": move(1, _GOOD, reason={"metric": 10**400}),
        "a reason that is text": move(1, _GOOD, reason="x"), "more than a move": move(1, _GOOD, exec="rm"),
        "nothing": b"", "a broken seal": move(1, _GOOD).replace(b"prod", b"beta"),
    }.items()
] + [
    Damage("I9 move to another digest", partial(_moved, move(1, _GOOD), 1), _follow(StoreCorrupt, "stands for aaaa")),
    Damage("I9 move to no version", partial(_moved, move(7, _GOOD, 2), 2), _follow(NotFound, "no sql@7")),
    Damage("I9 move 999999999", partial(_moved, move(1, _GOOD, _MOST), _MOST), _follow(StoreCorrupt, "stands for")),
    Damage("I9 move of another alias", _other_name, _follow(StoreCorrupt, "sql:test is damaged")),
]  # fmt: skip

# --- links -------------------------------------------------------------------------------------------------------


def _led_out(name: str, place: Place) -> None:
    """A folder of the store is outside, and a link to it is in its place."""
    path = place.store_path / name
    shutil.move(path, place.outside / "moved")
    path.symlink_to(place.outside / "moved")


def _led_to(name: str, place: Place) -> None:
    """A link to the user's own files is in the place of a folder."""
    path = place.store_path / name
    shutil.rmtree(path)
    path.symlink_to(place.outside)


def _led_to_other(place: Place) -> None:
    shutil.rmtree(_version(place))
    _version(place).symlink_to("2")


def _objects_led_out(place: Place) -> None:
    for folder in (place.store_path / "objects").iterdir():
        shutil.rmtree(folder)
        folder.symlink_to(place.outside)


def _objects_copied_out(place: Place) -> None:
    """The same contents outside, which somebody may change later."""
    for folder in (place.store_path / "objects").iterdir():
        shutil.copytree(folder, place.outside / folder.name)
        shutil.rmtree(folder)
        folder.symlink_to(place.outside / folder.name)


def _next_object_led_out(place: Place) -> None:
    """What will be put next has an object folder that leads outside."""
    (place.store_path / "objects" / sha256(NEXT[WEIGHTS])[:2]).symlink_to(place.outside)


def _in_tmp(place: Place) -> None:
    """What is swept has links in it."""
    folder = place.store_path / "tmp" / "old"
    folder.mkdir()
    (folder / "link").symlink_to(place.outside)
    (place.store_path / "tmp" / "link").symlink_to(place.outside)
    for path in (folder, place.store_path / "tmp" / "link", folder / "link"):
        os.utime(path, (0, 0), follow_symlinks=False)


def _empty_but_for_links(place: Place) -> None:
    """No store yet, but where it would be made there are links."""
    shutil.rmtree(place.store_path)
    place.store_path.mkdir()
    for name in ("tmp", "adapters", "aliases", "objects"):
        (place.store_path / name).symlink_to(place.outside)


def _dangling(place: Place) -> None:
    shutil.rmtree(place.store_path / "tmp")
    (place.store_path / "tmp").symlink_to(place.outside / "new")


_LINK = "is a symbolic link"
LINKS = [
    *(
        Damage(f"S11 {name} is led {how}", partial(make, name), _all(_EVERYTHING, StoreCorrupt, _LINK))
        for name in ("adapters", "aliases", "objects", "tmp")
        for how, make in {"out": _led_out, "to other files": _led_to}.items()
    ),
    Damage("S11 adapters/sql is led out", partial(_led_out, "adapters/sql"),
           _all("put", StoreError, _LINK) | _all(_VERSION, NotFound, "There is no adapter sql")),
    Damage("S11 adapters/sql is led to other files", partial(_led_to, "adapters/sql"), _all("put", StoreError, _LINK)),
    Damage("S11 aliases/sql is led out", partial(_led_out, "aliases/sql"),
           _all("alias", StoreError, _LINK) | _follow(NotFound, "no alias prod")),
    Damage("S11 aliases/sql is led to other files", partial(_led_to, "aliases/sql"), _all("alias", StoreError, _LINK)),
    Damage("S11 a version is led out", partial(_led_out, "adapters/sql/1"), _all(_VERSION, StoreCorrupt, _LINK)),
    Damage("S11 a version is led to another", _led_to_other, _all(_VERSION, StoreCorrupt, _LINK)),
    Damage("S11 a move is led out", partial(_led_out, "aliases/sql/prod@1"), _follow(StoreCorrupt, _LINK)),
    Damage("S11 objects are led to other files", _objects_led_out),
    Damage("S11 objects are led to equal contents", _objects_copied_out),
    Damage("S11 the next object is led to other files", _next_object_led_out),
    Damage("S11 a store of links alone", _empty_but_for_links, _all("put migrate gc list", StoreCorrupt, _LINK)),
    Damage("S11 tmp is led to nothing", _dangling, _all("put alias", StoreCorrupt, _LINK)),
    Damage("S20 links in tmp", _in_tmp, found=False),
]  # fmt: skip

# --- what does not belong there ----------------------------------------------------------------------------------


def _made(name: str, place: Place) -> None:
    (place.store_path / name).mkdir(parents=True)


def _file(name: str, place: Place) -> None:
    path = place.store_path / name
    shutil.rmtree(path)
    path.write_bytes(b"x")


def _tombstone(place: Place) -> None:
    sparse(_version(place, 3).with_name("3.removed"), b"{", 9 << 30)


ODD = [
    Damage("S13 version 999999999 of nothing", partial(_made, "adapters/sql/999999999")),
    Damage("S13 versions of another spelling", partial(_made, "adapters/sql/01"), found=False),
    Damage("S13 a name that is none", partial(_made, "adapters/Bad Name/1")),
    Damage("S13 a name of a device", partial(_made, "aliases/con/x@1")),
    Damage("S13 an object that is none", partial(_made, "objects/zz/x")),
    Damage("S13 a tombstone of 9 GiB", _tombstone, found=False),
    Damage("S13 adapters/sql is a file", partial(_file, "adapters/sql"), _all("put", StoreError, _LINK)),
    Damage("S13 aliases/sql is a file", partial(_file, "aliases/sql"), _all("alias", StoreError, _LINK)),
    *(Damage(f"S13 {name} is a file", partial(_file, name), _all(_EVERYTHING, StoreCorrupt, _LINK))
      for name in ("aliases", "tmp", "objects")),
]  # fmt: skip

DAMAGES: list[Damage] = [
    *CONTENTS, *FORMATS, *MANIFESTS, *MOVES, *(replace(damage, leads=True) for damage in (*LINKS, *ODD)),
]  # fmt: skip
