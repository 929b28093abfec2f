"""How the changes of a plan reach the products of a forward of our own: by native products, or by torch's lanes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, MutableMapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..adapters.fit import Fitted
from ..adapters.layout import Laid, Layout
from ..adapters.pack import Group, Pack
from ..adapters.sites import features
from ..bases.load import Base
from ..kernels.changes import Change, Matrices, RowChanges, address_fields, change_of
from ..kernels.forward import Batch
from ..kernels.library import library
from .batch import BatchPlan, Row


class Changes(Protocol):
    """Applies what a plan changes at a group of layers."""

    def scale_input(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        """What the frozen product of the group is given for x [rows, ..., in]."""
        ...

    def apply(self, group: Group, x: torch.Tensor, out: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> None:
        """Change out = W x [rows, ..., outputs of all layers of the group], in place; x is [rows, ..., in]."""
        ...


def changes_of(base: Base, plan: BatchPlan) -> Changes:
    """The fastest way that is right for this plan on this machine."""
    native = base.device.type == "cpu" and base.dtype == torch.float32 and library().functions is not None
    return NativeChanges(plan) if native else LaneChanges(plan)


class LaneChanges:
    """By torch: a batched product over the adapters of the batch (`GroupChange`)."""

    def __init__(self, plan: BatchPlan) -> None:
        self._groups = plan.groups

    def scale_input(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        """See `Changes`."""
        change = self._groups.get(group)
        return x if change is None else change.scale_input(x)

    def apply(self, group: Group, x: torch.Tensor, out: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> None:
        """See `Changes`."""
        change = self._groups.get(group)
        if change is not None:
            parts = (out,) if len(group) == 1 else torch.split(out, _widths(group), -1)
            change.apply(x, parts, biases)


class NativeChanges:
    """By native products: every row's own matrices, where they are; nothing is stacked or padded."""

    def __init__(self, plan: BatchPlan) -> None:
        self.rows = plan.rows
        self._groups: dict[Group, tuple[RowChanges | None, torch.Tensor | None]] = {}
        self._batches: dict[int, Batch] = {}

    def scale_input(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        """See `Changes`."""
        scale = self._group(group)[1]
        return x if scale is None else x * (scale if x.dim() == 2 else scale[:, None])

    def apply(self, group: Group, x: torch.Tensor, out: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> None:
        """See `Changes`."""
        change = self._group(group)[0]
        if change is not None:
            change.apply(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]))

    def batch(self, sites: Sequence[Group]) -> Batch:
        """The changes of all sites, for native code that runs them all; always asked for the same sites."""
        if len(sites) not in self._batches:
            self._batches[len(sites)] = _batch(self.rows, sites)
        return self._batches[len(sites)]

    def _group(self, group: Group) -> tuple[RowChanges | None, torch.Tensor | None]:
        if group not in self._groups:
            packs = [row.packs.get(group) if row else None for row in self.rows]
            made = {id(pack): _matrices(pack) for pack in packs if pack is not None}
            rows = [None if pack is None else made[id(pack)] for pack in packs]
            change = RowChanges(rows, _widths(group), _frozen_bias(group)) if made else None
            self._groups[group] = (change, _scale([None if pack is None else pack.scale for pack in packs]))
        return self._groups[group]


class Table(NamedTuple):
    """What native code reads of an adapter, at every site.

    Attributes:
        numbers: the memory of one `Change` after another, as int64.
        kept: what holds the matrices that were copied for it.
        width: the most columns at a site.
        scales: whether an input is scaled.
    """

    numbers: torch.Tensor
    kept: object
    width: int
    scales: bool


# Kept as long as the adapter, or the layout, is: to make one takes longer than a token.
_TABLES: MutableMapping[Fitted, Table] = WeakIdKeyDictionary()  # type: ignore[assignment]
_LAID: MutableMapping[Layout, tuple[torch.Tensor, torch.Tensor, int]] = WeakIdKeyDictionary()  # type: ignore[assignment]


def _batch(rows: Sequence[Row], sites: Sequence[Group]) -> Batch:
    adapters = {id(row): row for row in rows if row is not None and row.packs}
    if not adapters:
        return Batch()
    tables = [_table(adapter, sites) for adapter in adapters.values()]
    changes = (Change * (len(sites) * len(tables)))()
    size = ctypes.sizeof(Change) * len(sites)
    for i, table in enumerate(tables):
        ctypes.memmove(ctypes.addressof(changes) + i * size, table.numbers.data_ptr(), size)
    numbers = {key: number for number, key in enumerate(adapters)}
    owners = tuple(numbers.get(id(row), -1) for row in rows)
    return Batch(owners, changes, max(table.width for table in tables), any(table.scales for table in tables))


def _table(adapter: Fitted, sites: Sequence[Group]) -> Table:
    found = _TABLES.get(adapter)
    if found is None:
        laid = adapter.laid
        found = _TABLES[adapter] = _made(adapter, sites) if laid is None else _moved(adapter, laid, sites)
    return found


def _made(adapter: Fitted, sites: Sequence[Group]) -> Table:
    made = [_matrices(adapter.packs[group]) if group in adapter.packs else None for group in sites]
    some = [one for one in made if one is not None]
    numbers = torch.frombuffer((Change * len(sites))(*map(change_of, made)), dtype=torch.int64)
    width = max((int(one.down.shape[1]) for one in some), default=0)
    return Table(numbers, made, width, any(one.scale is not None for one in some))


def _moved(adapter: Fitted, laid: Laid, sites: Sequence[Group]) -> Table:
    """The table of an adapter that lies as another does: every address is as far from the begin of its memory."""
    if laid.layout not in _LAID:
        first = _made(adapter, sites)
        addresses = (address_fields(len(sites)) & (first.numbers != 0)).long()
        _LAID[laid.layout] = first.numbers - addresses * laid.room.data_ptr(), addresses, first.width
    places, addresses, width = _LAID[laid.layout]
    return Table(places + addresses * laid.room.data_ptr(), None, width, scales=False)


def _matrices(pack: Pack) -> Matrices:
    def straight(tensors: Iterable[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)

    (scale,) = straight([pack.scale])
    return Matrices(pack.down, pack.ups, straight(pack.gains), straight(pack.biases), scale)


def _scale(scales: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[rows, in], ones for a row whose adapter leaves the input alone; None where all do."""
    some = next((scale for scale in scales if scale is not None), None)
    return None if some is None else torch.stack([torch.ones_like(some) if one is None else one for one in scales])


def _frozen_bias(group: Group) -> torch.Tensor | None:
    """[all outputs], zeros for a layer without; None where no layer has one."""
    biases = [getattr(module, "bias", None) for module in group]
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, _widths(group), strict=True)
    return torch.cat([torch.zeros(width) if bias is None else bias.detach().float() for bias, width in pairs])


def _widths(group: Sequence[nn.Module]) -> list[int]:
    return [features(module)[1] for module in group]
