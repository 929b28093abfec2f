"""The tensors of an adapter as its products read them, packed by groups of layers that share their input.

A base computes q, k and v (gate and up) of one input, so their down matrices lie side by side and one product makes the
hidden values of all. Down is kept as [in, R] and up as [R, out]: with few rows both products then read memory straight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..kernels.matrices import Copy, copy_transposed
from .lora import LoraSite

Group = tuple[nn.Module, ...]
"""Linear layers of one input, in the order of a fused weight's rows."""


@dataclass(frozen=True)
class Pack:
    """One adapter at one group of layers.

    Attributes:
        down: [in, R], the members' down matrices side by side.
        ups: for each member [rank, out]; None where the adapter leaves a layer alone.
        gains, biases: for each member [out], or None.
        scale: [in], the factor on the input of all members, or None.
    """

    down: torch.Tensor
    ups: tuple[torch.Tensor | None, ...]
    gains: tuple[torch.Tensor | None, ...]
    biases: tuple[torch.Tensor | None, ...]
    scale: torch.Tensor | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank at each member; 0 where there is none."""
        return tuple(0 if up is None else int(up.shape[0]) for up in self.ups)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors there are."""
        return (self.down, *(up for up in self.ups if up is not None), *self.vectors)

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """All tensors but the matrices."""
        return tuple(t for t in (*self.gains, *self.biases, self.scale) if t is not None)


@dataclass(frozen=True)
class Packing:
    """An adapter packed, and how.

    Attributes:
        finite: whether that is known of all matrices.
        copies: how each matrix came to its place.
        room: memory of all matrices, if they share a device and dtype.
    """

    packs: dict[Group, Pack]
    finite: bool
    copies: list[Copy]
    room: torch.Tensor | None


def pack(sites: Mapping[nn.Module, LoraSite], groups: Iterable[Group]) -> Packing:
    """Pack the sites of an adapter, in the device and dtype they are in; a site of no group is a group of its own.

    So is a site that scales its input: the others of its group read that input as it is.
    """
    packs: dict[Group, Pack] = {}
    copies: list[Copy] = []
    room = _Room(sites.values())
    left = dict(sites)
    together = {module: site for module, site in sites.items() if site.scale is None}
    for group in groups:
        members = [left.pop(module) if module in together else None for module in group]
        if any(member is not None for member in members):
            packs[group] = _pack(members, room, copies)
    packs |= {(module,): _pack([site], room, copies) for module, site in left.items()}
    return Packing(packs, copy_transposed(copies, room.whole), copies, room.whole)


def unpack(group: Group, packed: Pack) -> Iterator[tuple[nn.Module, LoraSite]]:
    """The sites of a group, as views of its pack."""
    column = 0
    for module, up, gain, bias in zip(group, packed.ups, packed.gains, packed.biases, strict=True):
        if up is not None:
            yield module, LoraSite(packed.down[:, column : column + up.shape[0]].t(), up.t(), gain, bias, packed.scale)
            column += up.shape[0]


def unpacked(packs: Mapping[Group, Pack]) -> dict[nn.Module, LoraSite]:
    """The sites of all groups, as views of their packs."""
    return {module: site for group, packed in packs.items() for module, site in unpack(group, packed)}


class _Room:
    """Memory for the matrices of an adapter, in one piece."""

    def __init__(self, sites: Collection[LoraSite]) -> None:
        tensors = [tensor for site in sites for tensor in (site.down, site.unscaled)]
        alike = len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1
        self.whole = tensors[0].new_empty(sum(_rounded(tensor.numel()) for tensor in tensors)) if alike else None
        self._left = self.whole

    def take(self, like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """A new matrix [rows, columns] on the device and in the dtype of `like`."""
        if self._left is None:
            return like.new_empty((rows, columns))
        taken, self._left = self._left[: rows * columns], self._left[_rounded(rows * columns) :]
        return taken.view(rows, columns)


def _rounded(numbers: int) -> int:
    """So many that what comes after them begins a line of the processor's cache."""
    return -(-numbers // 16) * 16


def _pack(members: Sequence[LoraSite | None], room: _Room, copies: list[Copy]) -> Pack:
    """A pack whose matrices are still to be filled; `copies` tells from what."""
    some = [site for site in members if site is not None]
    ranks = [0 if site is None else int(site.down.shape[0]) for site in members]
    down = room.take(some[0].down, some[0].down.shape[1], sum(ranks))
    ups = tuple(None if site is None else room.take(site.unscaled, *reversed(site.unscaled.shape)) for site in members)
    columns = torch.split(down, ranks, 1)
    for site, part, up in zip(members, columns, ups, strict=True):
        if site is not None and up is not None:
            copies += [Copy(site.down, part), Copy(site.unscaled, up, site.factor)]
    return Pack(
        down,
        ups,
        tuple(None if site is None else site.gain for site in members),
        tuple(None if site is None else site.bias for site in members),
        members[0].scale if len(members) == 1 and members[0] is not None else None,
    )
