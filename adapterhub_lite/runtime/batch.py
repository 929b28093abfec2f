"""Compose the adapters of a batch, one a row, into one plan: site changes, prefixes, heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters.fit import Fitted
from ..adapters.lora import LoraSite
from ..bases.inputs import PrefixRows
from .sites import SiteBatch

Row = Fitted | None


@dataclass(frozen=True)
class BatchPlan:
    """What every row of a batch uses."""

    rows: tuple[Row, ...]
    sites: dict[nn.Module, SiteBatch]
    prefix: PrefixRows | None

    @property
    def heads(self) -> list[nn.Module | None]:
        """The classification head of each row."""
        return [row.head if row else None for row in self.rows]

    def select(self, keep: torch.Tensor) -> BatchPlan:
        """The plan for a part of the rows; prefixes are in the cache by then and are not carried."""
        rows = tuple(self.rows[i] for i in keep.tolist())
        return BatchPlan(rows, {m: s.select(keep) for m, s in self.sites.items()}, None)


class Composer:
    """Builds plans, and remembers the stacked matrices of the compositions used last (keyed by digest)."""

    def __init__(self, remembered: int = 8) -> None:
        self._stacks: OrderedDict[tuple[str, ...], dict[nn.Module, _Stack]] = OrderedDict()
        self._remembered = remembered

    def compose(self, rows: Sequence[Row], device: torch.device) -> BatchPlan:
        """One adapter or None a row -> the plan of the batch."""
        active = list({r.digest: r for r in rows if r is not None and r.sites}.values())
        index = {r.digest: i for i, r in enumerate(active)}
        owner = torch.tensor([index.get(r.digest, -1) if r else -1 for r in rows], device=device)
        shared = len(active) == 1 and bool((owner == 0).all())
        masks: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
        sites = {}
        for module, stack in self._stacked(active).items():
            if stack.ranks not in masks:
                ranks = torch.cat([torch.full((n,), i, device=device) for i, n in stack.ranks])
                masks[stack.ranks] = ranks[None, :] != owner[:, None]
            sites[module] = stack.for_rows(None if shared else masks[stack.ranks], owner)
        return BatchPlan(tuple(rows), sites, _prefix_rows(rows))

    def forget(self, digest: str) -> None:
        """Drop every stack that holds this adapter."""
        for key in [k for k in self._stacks if digest in k]:
            del self._stacks[key]

    def _stacked(self, active: list[Fitted]) -> dict[nn.Module, _Stack]:
        key = tuple(a.digest for a in active)
        if key not in self._stacks:
            modules = dict.fromkeys(m for a in active for m in a.sites)
            self._stacks[key] = {
                m: _stack([(i, a.sites[m]) for i, a in enumerate(active) if m in a.sites]) for m in modules
            }
            while len(self._stacks) > self._remembered:
                self._stacks.popitem(last=False)
        self._stacks.move_to_end(key)
        return self._stacks[key]


@dataclass(frozen=True)
class _Stack:
    """The matrices of a site for a set of adapters; `ranks` lists (adapter's index, its rank)."""

    down: torch.Tensor
    up: torch.Tensor
    ranks: tuple[tuple[int, int], ...]
    gains: dict[int, torch.Tensor]
    biases: dict[int, torch.Tensor]

    def for_rows(self, drop: torch.Tensor | None, owner: torch.Tensor) -> SiteBatch:
        gain = _per_row(self.gains, owner, shared=drop is None)
        bias = _per_row(self.biases, owner, shared=drop is None)
        return SiteBatch(self.down, self.up, drop, gain, bias)


def _stack(members: list[tuple[int, LoraSite]]) -> _Stack:
    sites = [site for _, site in members]
    down = sites[0].down if len(sites) == 1 else torch.cat([s.down for s in sites])
    up = (sites[0].up if len(sites) == 1 else torch.cat([s.up for s in sites], dim=1)).t().contiguous()
    return _Stack(
        down,
        up,
        tuple((i, s.down.shape[0]) for i, s in members),
        {i: s.gain for i, s in members if s.gain is not None},
        {i: s.bias for i, s in members if s.bias is not None},
    )


def _per_row(values: dict[int, torch.Tensor], owner: torch.Tensor, *, shared: bool) -> torch.Tensor | None:
    if not values:
        return None
    if shared:
        return next(iter(values.values()))[None, :]
    some = next(iter(values.values()))
    out = some.new_zeros((owner.shape[0], some.shape[0]))
    for i, value in values.items():
        out[owner == i] = value
    return out


def _prefix_rows(rows: Sequence[Row]) -> PrefixRows | None:
    """Left-pad the prefixes of all rows to the longest."""
    prefixes = [row.prefix if row else None for row in rows]
    first = next((p for p in prefixes if p is not None), None)
    if first is None:
        return None
    longest = max(p.tokens for p in prefixes if p is not None)
    layers, heads, _, head_dim = first.keys.shape
    keys = first.keys.new_zeros((layers, len(rows), heads, longest, head_dim))
    values = torch.zeros_like(keys)
    mask = torch.zeros((len(rows), longest), dtype=torch.long, device=keys.device)
    for i, prefix in enumerate(prefixes):
        if prefix is not None:
            keys[:, i, :, longest - prefix.tokens :] = prefix.keys
            values[:, i, :, longest - prefix.tokens :] = prefix.values
            mask[i, longest - prefix.tokens :] = 1
    return PrefixRows(keys, values, mask)
