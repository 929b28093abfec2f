"""How the changes of a plan reach the products of a forward of our own: by native products, or by torch's lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ..adapters.pack import Group, Pack
from ..adapters.sites import features
from ..bases.load import Base
from ..kernels.changes import RowChanges, RowMatrices
from ..kernels.library import library
from .batch import BatchPlan


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
    plain = base.device.type == "cpu" and base.dtype == torch.float32 and library().functions is not None
    if plain and not any(_scales(pack) for row in plan.rows if row for pack in row.packs.values()):
        return NativeChanges(plan)
    return LaneChanges(plan)


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
        self._rows = plan.rows
        self._groups: dict[Group, RowChanges | None] = {}

    def scale_input(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        """Adapters that scale an input are not computed here."""
        return x

    def apply(self, group: Group, x: torch.Tensor, out: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> None:
        """See `Changes`."""
        if group not in self._groups:
            self._groups[group] = self._row_changes(group)
        change = self._groups[group]
        if change is not None:
            change.apply(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]))

    def _row_changes(self, group: Group) -> RowChanges | None:
        made: dict[str, RowMatrices] = {}
        rows: list[RowMatrices | None] = []
        for row in self._rows:
            pack = row.packs.get(group) if row else None
            if row is None or pack is None:
                rows.append(None)
            else:
                rows.append(made.setdefault(row.digest, RowMatrices(pack.down, pack.ups)))
        return RowChanges(rows, _widths(group)) if made else None


def _scales(pack: Pack) -> bool:
    """Whether a pack does more than add a low-rank change."""
    return any(value is not None for value in (*pack.gains, *pack.biases, pack.scale))


def _widths(group: Sequence[nn.Module]) -> list[int]:
    return [features(module)[1] for module in group]
