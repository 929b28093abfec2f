"""How the files of one shape are fitted to a base: worked out for the first of them, then only the values are moved.

Names, shapes and scales of an adapter are in its configuration and in the header of its tensor file. Of two adapters
that have both alike, byte for byte, every matrix goes to the same place with the same factor. What depends on values,
that they are numbers and have an effect, is looked at anew in each.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from typing import NamedTuple

import torch

from ..errors import AdapterHubError
from ..formats.safetensors_header import Header, parse_header
from ..kernels.matrices import CopyTable
from ..store.reading import Stored
from .adapter import WEIGHTS_FILE
from .fit import LEAST_STRENGTH, Fitted, strength
from .pack import Pack, Packing, unpacked

_REMEMBERED = 8


class Place(NamedTuple):
    """Where a matrix lies in the memory of an adapter: shape, strides and offset in values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Layout:
    """Where everything of an adapter goes, whose tensors are all matrices that are copied from its file as they are.

    Args:
        like: the adapter that it is taken from; it was made by `packing` of the tensors in `weights`.
    """

    def __init__(self, like: Fitted, packing: Packing, room: torch.Tensor, weights: torch.Tensor) -> None:
        self.nbytes = like.nbytes
        self._task_type, self._tensors = like.task_type, like.tensors
        self._size = room.numel()
        self._copies = CopyTable(packing.copies, weights, room)
        self._packs = {
            group: (_place(pack.down, room), tuple(None if up is None else _place(up, room) for up in pack.ups))
            for group, pack in like.packs.items()
        }

    def filled(self, name: str, digest: str, weights: torch.Tensor) -> Fitted | None:
        """The adapter that a file of this layout holds; None where a value is no number, or all are without effect."""
        room = torch.empty(self._size)
        if not self._copies.copy(weights, room):
            return None
        packs = {group: _pack(room, down, ups) for group, (down, ups) in self._packs.items()}
        made = Fitted(
            name, digest, self._task_type, unpacked(packs), None, None, self._tensors, packs, matrices_finite=True
        )
        if strength(made.sites.values()) < LEAST_STRENGTH:
            return None
        made.__dict__["nbytes"] = self.nbytes  # a cached property, which would look at every tensor
        object.__setattr__(made, "laid", Laid(self, room))
        return made


class Laid(NamedTuple):
    """The layout of an adapter, and its memory."""

    layout: Layout
    room: torch.Tensor


class Layouts:
    """The layouts of the files that were fitted to one base last, a few of them. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, int], tuple[Header, Layout]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def fitted(self, stored: Stored, name: str) -> Fitted | None:
        """A version fitted by the layout of one before it; None where that must be done from the beginning."""
        try:
            header = parse_header(stored.weights, WEIGHTS_FILE)
        except AdapterHubError:
            return None
        key = (stored.config, id(header))
        with self._lock:
            _, layout = self._kept.get(key, (None, None))
            if layout is None:
                return None
            self._kept.move_to_end(key)
        return layout.filled(name, str(stored.ref.digest), _values(stored.weights))

    def note(self, stored: Stored, fitted: Fitted, packing: Packing) -> None:
        """Remember how a version was fitted, if others can be so too."""
        header, weights, room = parse_header(stored.weights, WEIGHTS_FILE), _values(stored.weights), packing.room
        if room is None or parse_header(stored.weights, WEIGHTS_FILE) is not header:  # too large to be remembered
            return
        others = (fitted.prefix, fitted.prompt, fitted.head, fitted.injected)
        plain = all(part is None for part in others) and not any(pack.vectors for pack in fitted.packs.values())
        whole = len(packing.copies) == len(header.tensors)  # every tensor of the file is copied, so looked through
        if not (plain and whole and packing.finite):
            return
        if CopyTable.possible(packing.copies, weights, room):
            layout = Layout(fitted, packing, room, weights)
            with self._lock:
                self._kept[stored.config, id(header)] = header, layout
                while len(self._kept) > _REMEMBERED:
                    self._kept.popitem(last=False)


def _values(weights: bytes) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the bytes are not writable
        return torch.frombuffer(weights, dtype=torch.uint8)


def _place(matrix: torch.Tensor, room: torch.Tensor) -> Place:
    return Place(tuple(matrix.shape), matrix.stride(), (matrix.data_ptr() - room.data_ptr()) // room.itemsize)


def _pack(room: torch.Tensor, down: Place, ups: tuple[Place | None, ...]) -> Pack:
    none = (None,) * len(ups)
    made = tuple(None if up is None else room.as_strided(*up) for up in ups)
    return Pack(room.as_strided(*down), made, none, none)
