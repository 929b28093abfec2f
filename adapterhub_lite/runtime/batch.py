"""Compose the adapters of a batch, one a row, into one plan: changes of layers, prefixes, heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..adapters.fit import Fitted
from ..adapters.injected import Injected
from ..adapters.pack import Group, Pack
from ..bases.inputs import PrefixRows, PromptRows
from ..errors import Unsupported
from .lanes import deal
from .sites import GroupChange, Part

Row = Fitted | None
Ups = tuple[tuple[int, int, torch.Tensor] | None, ...]
_RANK_CLASSES = (16, 64, 256)


@dataclass(frozen=True)
class Stack:
    """The matrices of some adapters of one rank class, lane by lane.

    Attributes:
        groups: group of layers -> (down [lanes, in, R], up of each layer), as `Part` has them.
    """

    adapters: tuple[Fitted, ...]
    groups: dict[Group, tuple[torch.Tensor, Ups]]


@dataclass(frozen=True)
class BatchPlan:
    """What every row of a batch uses.

    Attributes:
        classes: the adapters that add to outputs, those of like rank together; `stack` lays a class out in lanes, which
            is done when `groups` is first asked for: native products read the adapters where they are.
    """

    rows: tuple[Row, ...]
    classes: tuple[tuple[Fitted, ...], ...]
    prefix: PrefixRows | None
    device: torch.device
    stack: Callable[[tuple[Fitted, ...]], Stack] | None = None

    @cached_property
    def groups(self) -> dict[Group, GroupChange]:
        """The change of every group of layers that some row changes."""
        parts: dict[Group, list[Part]] = {}
        for adapters in self.classes:
            assert self.stack is not None
            stack = self.stack(adapters)
            lanes = {adapter.digest: i for i, adapter in enumerate(stack.adapters)}
            dealt = deal([lanes.get(r.digest, -1) if r else -1 for r in self.rows], len(lanes), self.device)
            for group, (down, ups) in stack.groups.items():
                parts.setdefault(group, []).append(Part(dealt, down, ups))
        for row in self.rows:
            for group in row.packs if row else ():
                parts.setdefault(group, [])
        return {group: self._change(group, found) for group, found in parts.items()}

    @cached_property
    def sites(self) -> dict[nn.Module, GroupChange]:
        """The change of every layer by itself; one adapter may have it in a group, and another alone."""
        found: dict[nn.Module, GroupChange] = {}
        for group, change in self.groups.items():
            for i, module in enumerate(group):
                own = change if len(group) == 1 else change.member(i)
                found[module] = found[module].joined(own) if module in found else own
        return found

    @property
    def injected(self) -> Injected | None:
        """PEFT's layers, which all rows go through; None where they go through the base's own."""
        return self.rows[0].injected if self.rows and self.rows[0] is not None else None

    def model(self, live: nn.Module) -> nn.Module:
        """What computes as `live`, a model over the base's modules, for the rows of this batch."""
        return live if self.injected is None else self.injected.model(live)

    @property
    def heads(self) -> list[nn.Module | None]:
        """The classification head of each row."""
        return [row.head if row else None for row in self.rows]

    def select(self, keep: Sequence[int]) -> BatchPlan:
        """The plan for a part of the rows; prefixes are in the cache by then and are not carried."""
        rows = tuple(self.rows[i] for i in keep)
        used = {r.digest for r in rows if r is not None}
        classes = tuple(some for some in self.classes if any(a.digest in used for a in some))
        return BatchPlan(rows, classes, None, self.device, self.stack)

    def _change(self, group: Group, parts: list[Part]) -> GroupChange:
        packs = [row.packs.get(group) if row else None for row in self.rows]
        members = range(len(group))
        gains = tuple(_per_row([None if p is None else p.gains[i] for p in packs]) for i in members)
        biases = tuple(_per_row([None if p is None else p.biases[i] for p in packs]) for i in members)
        return GroupChange(tuple(parts), gains, biases, _per_row([None if p is None else p.scale for p in packs], 1.0))


class Composer:
    """Builds plans, and remembers the stacks of the compositions used last (keyed by digest)."""

    def __init__(self, remembered: int = 4) -> None:
        self._stacks: OrderedDict[tuple[str, ...], Stack] = OrderedDict()
        self._remembered = remembered

    def compose(self, rows: Sequence[Row], device: torch.device) -> BatchPlan:
        """One adapter or None a row -> the plan of the batch.

        Raises:
            Unsupported: layers of PEFT, which rows of another adapter cannot go through.
        """
        if (
            any(row is not None and row.injected is not None for row in rows)
            and len({_digest(row) for row in rows}) > 1
        ):
            raise Unsupported("An adapter that PEFT runs has no row beside others.", "Give it a batch of its own.")
        held = {row.digest: row for row in rows if row is not None}
        active = {digest: adapter for digest, adapter in held.items() if _rank(adapter)}
        classes: dict[int, list[Fitted]] = {}
        for adapter in active.values():
            classes.setdefault(_rank_class(adapter), []).append(adapter)
        prefix = _prefix_rows(rows, device)
        return BatchPlan(tuple(rows), tuple(map(tuple, classes.values())), prefix, device, self._stack)

    def forget(self, digest: str) -> None:
        """Drop every stack that holds this adapter."""
        for key in [k for k in self._stacks if digest in k]:
            del self._stacks[key]

    def _stack(self, adapters: tuple[Fitted, ...]) -> Stack:
        key = tuple(a.digest for a in adapters)
        if key not in self._stacks:
            groups = dict.fromkeys(group for a in adapters for group in a.packs)
            made = Stack(adapters, {g: _stack_packs([a.packs.get(g) for a in adapters], g) for g in groups})
            if len(adapters) > 1:  # one adapter alone is not copied
                self._stacks[key] = made
                while len(self._stacks) > self._remembered:
                    self._stacks.popitem(last=False)
            return made
        self._stacks.move_to_end(key)
        return self._stacks[key]


def _digest(row: Row) -> str | None:
    return row.digest if row is not None else None


def _rank(adapter: Fitted) -> int:
    """The largest rank at any layer; 0 where nothing is added to an output."""
    return max((rank for pack in adapter.packs.values() for rank in pack.ranks), default=0)


def _rank_class(adapter: Fitted) -> int:
    """Adapters of one class share lanes, whose width is that of the largest rank among them."""
    rank = _rank(adapter)
    return next((most for most in _RANK_CLASSES if rank <= most), rank)


def _stack_packs(packs: Sequence[Pack | None], group: Group) -> tuple[torch.Tensor, Ups]:
    """Lane by lane, with zeros where an adapter has a lower rank than others, or leaves a layer alone."""
    held = [p for p in packs if p is not None]
    ranks = tuple(max(column) for column in zip(*(p.ranks for p in held), strict=True))
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    if all(p is not None and p.ranks == ranks for p in packs):
        down = held[0].down.unsqueeze(0) if len(held) == 1 else torch.stack([p.down for p in held])
    else:
        down = held[0].down.new_zeros((len(packs), held[0].down.shape[0], sum(ranks)))
        for lane, one in enumerate(packs):
            column = 0
            for start, rank in zip(starts, one.ranks if one else (), strict=False):
                assert one is not None
                down[lane, :, start : start + rank] = one.down[:, column : column + rank]
                column += rank
    ups = [_stack_ups([p.ups[i] if p else None for p in packs], rank) if rank else None for i, rank in enumerate(ranks)]
    return down, tuple(
        None if up is None else (start, start + rank, up) for up, start, rank in zip(ups, starts, ranks, strict=True)
    )


def _stack_ups(ups: Sequence[torch.Tensor | None], rank: int) -> torch.Tensor:
    held = [up for up in ups if up is not None]
    if len(held) == len(ups) == 1:
        return held[0].unsqueeze(0)
    if all(up is not None and up.shape[0] == rank for up in ups):
        return torch.stack(held)
    stacked = held[0].new_zeros((len(ups), rank, held[0].shape[1]))
    for lane, up in enumerate(ups):
        if up is not None:
            stacked[lane, : up.shape[0]] = up
    return stacked


def _per_row(values: Sequence[torch.Tensor | None], fill: float = 0.0) -> torch.Tensor | None:
    """One vector a row, `fill` where there is none -> [rows, n]; [1, n] where all rows have the same."""
    some = next((v for v in values if v is not None), None)
    if some is None:
        return None
    if all(v is some for v in values):
        return some[None, :]
    neutral = torch.full_like(some, fill)
    return torch.stack([neutral if v is None else v for v in values])


def _prefix_rows(rows: Sequence[Row], device: torch.device) -> PrefixRows | None:
    """Left-pad the prefixes of all rows to the longest."""
    prefixes = [row.prefix if row else None for row in rows]
    prompts = _prompt_rows(rows)
    first = next((p for p in prefixes if p is not None), None)
    if first is None and prompts is None:
        return None
    longest = max((p.tokens for p in prefixes if p is not None), default=0)
    some = first.keys if first is not None else torch.empty((0, 0, 0, 0), device=device)
    layers, heads, _, head_dim = some.shape
    keys = some.new_zeros((layers, len(rows), heads, longest, head_dim))
    values = torch.zeros_like(keys)
    mask = torch.zeros((len(rows), longest), dtype=torch.long, device=keys.device)
    for i, prefix in enumerate(prefixes):
        if prefix is not None:
            keys[:, i, :, longest - prefix.tokens :] = prefix.keys
            values[:, i, :, longest - prefix.tokens :] = prefix.values
            mask[i, longest - prefix.tokens :] = 1
    return PrefixRows(keys, values, mask, prompts)


def _prompt_rows(rows: Sequence[Row]) -> PromptRows | None:
    prompts = [row.prompt if row else None for row in rows]
    first = next((p for p in prompts if p is not None), None)
    return PromptRows(tuple(p.embeddings if p else None for p in prompts), first.embed) if first is not None else None
