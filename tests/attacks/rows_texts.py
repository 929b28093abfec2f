"""I9, I10, C1, M4: texts that want to be more than text: names, digests, searches, paths, recipes."""

from __future__ import annotations

import os
from pathlib import Path

from adapterhub_lite.errors import (
    AdapterHubError,
    FormatError,
    InvalidName,
    NotFound,
    RecipeError,
    StoreCorrupt,
    StoreError,
)
from tests.attacks.attack import Attack, rows
from tests.attacks.doors import Place

NAMES = (
    "../../x", ".", "..", "", "-rf", "con", "nul.x", "aux", "com1", "a" * 65, "a\nb", "a\r", "\0", "a\0b", "\u202eabc",
    "\uff41\uff42", "\u0430bc", "SQL", "a/b", "a\\b", "/etc/passwd", "a..b", "a.", ".a", "_a", "a b", " a", "a ", "~",
    "$HOME", "%2e%2e", "a;b", "a|b", "a*", "{a}", "a\u0301", "\ud800", "x" * 100_000,
)  # fmt: skip
GOOD_NAMES = (
    "lora",
    "keys",
    "pop",
    "base_model",
    "default",
    "s000",
    "model",
    "a",
    "1",
    "a.json",
    "a.removed",
    "x" * 64,
)
ALIASES = (
    "../../x",
    "..",
    "",
    "1",
    "007",
    "\u0661",
    "-rf",
    "a\nb",
    "con",
    "a" * 65,
    "PROD",
    "a/b",
    "a@1",
    "\u202e",
    "\0",
)
VERSIONS = (
    "0", "-1", "01", "1e3", "+1", " 1", "1\n", "1.0", "\u0661", "\u00b2", "9" * 10, "9" * 5000, "../1", "latest",
    "0x1", "1_0", "",
)  # fmt: skip
DIGESTS = ("../../x", "sha256:../../x", "A" * 64, "a" * 63, "a" * 65, "\uff11" * 64, "", "\0" * 64)
QUERIES = {
    "an open quote": ('"', "cannot be read"),
    "2001 characters": ("a" * 2001, "the limit is 2000"),
    "1900 dashes": ("-" * 1900 + "x", "turned round twice"),
    "two dashes": ("--x", "turned round twice"),
    "an unknown field": ("exec:rm", "There is no field"),
    "a number that is none": ("rank>0x10", "is not a number"),
    "NaN": ("accuracy>nan", "is not a number"),
    "1900 digits and a letter": ("rank>" + "1" * 1900 + "z", "is not a number"),
    "half a surrogate": ("name>\ud800", "is not a number"),
    "no metric": ("a" * 1900 + ">1", "No adapter has a metric"),
    "a date that is none": ("created>2026-1", "is not a date"),
}


def _in(name: str) -> object:
    return lambda place: place.outbox / name


def _link(place: Place) -> Path:
    link = place.outbox / "link"
    if not link.is_symlink():
        link.symlink_to(place.outside)
    return link


def _full(place: Place) -> Path:
    (place.outbox / "full").mkdir(exist_ok=True)
    (place.outbox / "full" / "mine").touch()
    os.utime(place.outbox / "full" / "mine", (0, 0))
    return place.outbox / "full"


def _file(place: Place) -> Path:
    (place.outbox / "file.tar").write_bytes(b"mine")
    return place.outbox / "file.tar"


def _below_file(place: Place) -> Path:
    return _file(place) / "x"


TARGETS = {
    "a link": (_link, "symbolic link"),
    "a folder with something in it": (_full, "not an empty folder"),
    "a file": (_file, "exists"),
    "below a file": (_below_file, "where a folder should be"),
    "inside the store": (lambda place: place.store_path / "out", "inside the store"),
    "inside the store by two dots": (lambda place: place.outbox / ".." / "store" / "out", "inside the store"),
    "the store itself": (lambda place: place.store_path, "inside the store"),
    "the root folder": (lambda place: "/", "not an empty folder"),
    "a device": (lambda place: "/dev/null", "exists"),
    "a name of 300 characters": (_in("a" * 300), "File name too long"),
    "NUL": (_in("a\0b"), "is not a path"),
    "half a surrogate": (_in("a\ud800b"), "is not a path"),
}


def _fifo(place: Place) -> Path:
    os.mkfifo(place.inbox / "fifo")
    return place.inbox / "fifo"


def _tar_link(place: Place) -> Path:
    (place.inbox / "link.tar").symlink_to(place.outside / "precious.txt")
    return place.inbox / "link.tar"


PATHS = {
    "a fifo": (_fifo, "neither a folder nor an archive"),
    "a device": (lambda place: "/dev/zero", "neither a folder nor an archive"),
    "a link to a file": (_tar_link, "neither a folder nor an archive"),
}
ABSENT = {
    "nothing": (lambda place: place.inbox / "nothing", "does not exist"),
    "NUL": (lambda place: "a\0b", "does not exist"),
}
LONG = {"a name of 300 characters": (lambda place: place.inbox / ("a" * 300), "File name too long")}

_RECIPE = (
    b"name: x\nbase: b\ntask: {type: instruct}\ndata: {train: {hub: org/set, split: train}}\nadapter: {type: lora}\n"
)
RECIPES = {
    "a Python tag": (_RECIPE + b"training: !!python/object/apply:os.system ['touch pwned']\n", "tags .* are not read"),
    "a Python tag as key": (b"!!python/name:os.system : x\n" + _RECIPE, "tags .* are not read"),
    "a local tag": (_RECIPE.replace(b"base: b", b"base: !env HOME"), "tags .* are not read"),
    "a key twice": (_RECIPE + b"base: c\n", "is given twice"),
    "a bomb of aliases": (b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n" + _RECIPE, "aliases|anchors"),
    "a merge key": (_RECIPE + b"<<: {base: c}\n", "<<"),
    "an unknown key": (_RECIPE + b"exec: rm\n", "exec"),
    "an import": (_RECIPE + b"import: os.system\n", "import"),
    "two documents": (_RECIPE + b"---\n" + _RECIPE, "more than one document"),
    "100 000 levels": (b"a: " + b"[" * 100_000, "nested deeper"),
    "1 MiB": (_RECIPE + b"#" * (1 << 20), "larger than 256 KiB"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8"),
    "NUL": (b"name: a\0b\n", "not valid YAML"),
    "a data file that is a folder": (_RECIPE.replace(b"{hub: org/set, split: train}", b"/etc/"), "data.train"),
    "a name that is a path": (_RECIPE.replace(b"name: x", b"name: ../../x"), "not a valid"),
    "200 problems": (_RECIPE + b"".join(b"x%d: 1\n" % number for number in range(200)), "100 problems"),
}  # fmt: skip


def _short(text: str) -> str:
    return ascii(text) if len(text) < 40 else f"{text[:10]!a}... ({len(text)})"


def _texts(
    row: str, door: str, texts: tuple[str, ...], error: type[AdapterHubError] | None, words: str
) -> list[Attack]:
    return [Attack(f"{row} {_short(text)}", door, text, error, words) for text in texts]


ATTACKS = [
    *_texts("I10 name", "name", NAMES, InvalidName, "Use 1 to 64|Versions are|name@"),
    *_texts("I10 good name", "good name", GOOD_NAMES, None, ""),
    *_texts("I10 alias", "alias", ALIASES, InvalidName, "Use 1 to 64|is a version|Versions"),
    *_texts("I10 version", "version", VERSIONS, InvalidName, "Versions are"),
    *_texts("I9 digest", "digest", DIGESTS, StoreCorrupt, "stands for"),
    Attack("I10 version 999999999", "version", "999999999", NotFound, "There is no sql@999999999"),
    *rows("I10 query", "query", FormatError, QUERIES),
    *rows("M4 target", "target", StoreError, TARGETS),
    *rows("I15 path", "path", FormatError, PATHS),
    *rows("I15 path", "path", NotFound, ABSENT),
    *rows("I15 path", "path", StoreError, LONG),
    *rows("C1 recipe", "recipe", RecipeError, RECIPES),
]  # fmt: skip
