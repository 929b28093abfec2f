"""What every target shares: what a refusal may be, and how valid inputs are changed into nearly valid ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any, Protocol, TypeVar

from adapterhub_lite.errors import AdapterHubError

LARGEST = 1 << 16  # bytes of an input; larger ones find nothing that these do not
_SAID = 20_000  # characters of a refusal

T = TypeVar("T")
Pairs = list[tuple[str, Any]]
"""A JSON object whose keys may repeat."""


class Target(Protocol):
    """A module of this folder."""

    SEEDS: Sequence[bytes]
    """Valid inputs."""
    WORDS: Sequence[bytes]
    """Pieces that mean something to the parser."""

    def fuzz(self, data: bytes) -> None:
        """Raises AssertionError where the parser breaks a promise; anything but our own errors is a bug as well."""

    def read(self, data: bytes) -> object:
        """The parser itself."""

    def mutate(self, data: bytes, rng: Random) -> bytes:
        """A change of `data` that is likely to get far."""


def accepted(read: Callable[[bytes], T], data: bytes) -> T | None:
    """What a parser makes of `data`; None where it refuses it as it should."""
    if len(data) > LARGEST:
        return None
    try:
        return read(data)
    except AdapterHubError as error:
        check_refusal(error)
        return None


def check_refusal(error: AdapterHubError) -> None:
    """An error says what is wrong, can be shown, and is no flood."""
    said = str(error)
    assert error.message
    assert len(said) < _SAID, len(said)
    said.encode()


# --- bytes -------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: Random, words: Sequence[bytes] = ()) -> bytes:
    """A few insertions, deletions, overwritten or repeated pieces and flipped bits."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 64)), len(data) - at)
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:at] + data[at + length :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(rng.randint(1, 4)) + data[at:]
        elif kind == 2 and words:
            data = data[:at] + rng.choice(words) + data[at:]
        elif kind == 3 and words:
            word = rng.choice(words)
            data = data[:at] + word + data[at + len(word) :]
        elif kind == 4:
            data = data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
        elif kind == 5 and rng.random() < 0.2:
            data = data[:at]
        elif at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return data


# --- JSON --------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 8, 10**9, 2**31, 2**63, 10**400, -(10**400), 0.0, -0.0, 0.5, 1e300, -1e300,
    "", "a", "../../x", "/etc/passwd", "\0", "\u202e", "\x1b[2J", "ä", "\ud800", "a" * 600, "(a+)+$", "LORA", "8",
    [], [[]], [1, 2], ["a", "a"], {}, {"a": 1}, {"": None},
)  # fmt: skip


def pairs(data: bytes) -> Any:
    """JSON with its objects as lists of pairs."""
    return json.loads(data, object_pairs_hook=_Object)


class _Object(list[tuple[str, Any]]):
    """The pairs of an object, told from a list."""


def plain(node: Any) -> bytes:
    """The JSON text of a tree of `pairs`."""
    return _text(node).encode("utf-8", "surrogatepass")


def mutate_tree(node: Any, rng: Random, keys: Sequence[str] = ()) -> Any:
    """The tree with one to three nodes replaced, removed, repeated or renamed."""
    node = _Object([("", node)])
    for _ in range(rng.randint(1, 3)):
        places = list(_places(node))
        if not places:
            break
        parent, index = rng.choice(places)
        _change(parent, index, rng, keys)
    return node[0][1] if node else {}


def _change(parent: list[Any], index: int, rng: Random, keys: Sequence[str]) -> None:
    kind = rng.randrange(8)
    is_object = isinstance(parent, _Object)
    value = parent[index][1] if is_object else parent[index]
    if kind == 0:
        del parent[index]
    elif kind == 1:
        parent.insert(rng.randrange(len(parent) + 1), parent[index])
    elif kind == 2 and is_object:
        parent[index] = (rng.choice([*keys, "", "a", "__metadata__", "\ud800"]), value)
    elif kind == 3 and is_object and keys:
        parent.append((rng.choice(keys), deepcopy(rng.choice(ODD))))
    else:
        if kind == 4:
            new: Any = [value]
        elif kind == 5 and isinstance(value, int | float) and abs(value) < 2**70:
            new = value + rng.choice((-1, 1, 0.5, 100))
        elif kind == 6 and isinstance(value, str):
            new = mutate_bytes(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
        else:
            new = deepcopy(rng.choice(ODD))
        parent[index] = (parent[index][0], new) if is_object else new


def _places(node: Any) -> Any:
    for index, item in enumerate(node):
        yield node, index
        value = item[1] if isinstance(node, _Object) else item
        if isinstance(value, list):
            yield from _places(value)


def _text(node: Any) -> str:
    if isinstance(node, _Object):
        return "{" + ",".join(f"{json.dumps(key)}:{_text(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    return json.dumps(node)
