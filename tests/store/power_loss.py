"""Every disk that a power cut may leave behind, from a recorded list of operations.

The model is harsher than any real file system: bytes that were not synced are gone, half there, there as zeros or all
there; names that were not synced are each there or not, in any combination. What was synced is there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, Any]  # a name, and bytes or a Tree
_Edits = tuple[tuple[str, Any], ...]
SHARES = (0.0, 0.5, 1.0, None)  # of unsynced bytes that are there; None: all of them, as zeros


@dataclass(eq=False)
class File:
    live: bytes = b""
    durable: bytes = b""


@dataclass(eq=False)
class Folder:
    live: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str, File | Folder | None]] = field(default_factory=list)

    def set(self, name: str, node: File | Folder | None) -> None:
        self.pending.append((name, node))
        if node is None:
            del self.live[name]
        else:
            self.live[name] = node

    def sync(self) -> None:
        self.durable, self.pending = dict(self.live), []


class Disk:
    """The folder `root` as it is now, all of it durable, and what operations make of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        inodes: dict[int, File] = {}
        self.top = _load(root, inodes)

    def apply(self, operation: tuple[Any, ...]) -> None:
        getattr(self, "_" + operation[0])(*operation[1:])

    def states(self, most: int = 4096) -> Iterator[Tree]:
        """The trees that may be found after losing power now, for at most so many choices of names, evenly taken."""
        folders = [folder for folder in _folders(self.top) if folder.pending]
        choices = [_subsets(folder.pending) for folder in folders]
        total = math.prod(map(len, choices))
        count = min(total, most)
        for number in sorted({index * (total - 1) // max(1, count - 1) for index in range(count)}):
            kept = _chosen(choices, number)
            chosen = {id(folder): edits for folder, edits in zip(folders, kept, strict=True)}
            for share in SHARES:
                yield _surviving(self.top, chosen, share)

    def _at(self, path: Path) -> Any:
        node: Any = self.top
        for part in path.relative_to(self.root).parts:
            node = node.live[part]
        return node

    def _create(self, path: Path) -> None:
        self._at(path.parent).set(path.name, File())

    def _write(self, path: Path, data: bytes) -> None:
        self._at(path).live += data

    def _fsync(self, path: Path) -> None:
        file = self._at(path)
        file.durable = file.live

    def _fsync_dir(self, path: Path) -> None:
        if path.is_relative_to(self.root):
            self._at(path).sync()

    def _mkdir(self, path: Path) -> None:
        self._at(path.parent).set(path.name, Folder())

    def _link(self, source: Path, target: Path) -> None:
        self._at(target.parent).set(target.name, self._at(source))

    def _rename(self, source: Path, target: Path) -> None:
        node = self._at(source)
        self._at(target.parent).set(target.name, node)
        self._at(source.parent).set(source.name, None)

    def _unlink(self, path: Path) -> None:
        self._at(path.parent).set(path.name, None)


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a tree on the real disk."""
    folder.mkdir(parents=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def _load(path: Path, inodes: dict[int, File]) -> Folder:
    folder = Folder()
    for child in path.iterdir():
        if child.is_dir():
            folder.live[child.name] = _load(child, inodes)
        else:
            data = child.read_bytes()
            folder.live[child.name] = inodes.setdefault(child.stat().st_ino, File(data, data))
    folder.sync()
    return folder


def _folders(folder: Folder) -> Iterator[Folder]:
    """Every folder that may be seen, live or still durable; what is in tmp/ is never looked at by readers."""
    yield folder
    seen = {id(node): (name, node) for nodes in (folder.live, folder.durable) for name, node in nodes.items()}
    for name, node in seen.values():
        if isinstance(node, Folder) and name != "tmp":
            yield from _folders(node)


def _subsets(edits: list[tuple[str, Any]]) -> list[_Edits]:
    sizes = range(len(edits) + 1) if len(edits) <= 5 else (0, 1, len(edits) - 1, len(edits))
    return [subset for size in sizes for subset in itertools.combinations(edits, size)]


def _chosen(choices: list[list[_Edits]], number: int) -> list[_Edits]:
    """The `number`-th combination, the first choice changing slowest."""
    found: list[_Edits] = []
    for choice in reversed(choices):
        number, index = divmod(number, len(choice))
        found.insert(0, choice[index])
    return found


def _surviving(folder: Folder, chosen: dict[int, Any], share: float | None) -> Tree:
    nodes = dict(folder.durable)
    for name, node in chosen.get(id(folder), ()):
        if node is None:
            nodes.pop(name, None)
        else:
            nodes[name] = node
    tree = {
        name: _surviving(node, chosen, share) if isinstance(node, Folder) else _bytes(node, share)
        for name, node in nodes.items()
        if name != "tmp"
    }
    unfinished = nodes.get("tmp")  # what nobody may rely on: gone with its folder, cleared out, or all there
    if isinstance(unfinished, Folder) and share in (0.5, 1.0):
        tree["tmp"] = _everything(unfinished) if share == 1.0 else {}
    return tree


def _everything(folder: Folder) -> Tree:
    return {n: _everything(node) if isinstance(node, Folder) else node.live for n, node in folder.live.items()}


def _bytes(file: File, share: float | None) -> bytes:
    lost = len(file.live) - len(file.durable)
    if share is None:
        return file.durable + bytes(lost)
    return file.live[: len(file.durable) + int(lost * share)]
