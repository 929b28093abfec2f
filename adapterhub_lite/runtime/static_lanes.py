"""Lanes that stand still: adapters are copied into matrices whose shapes and addresses never change.

The down matrices of all lanes lie side by side and so do their ups, so the changes of all rows are two dense products:
H = x A, with zeros where a lane is not the row's own, and out += H B. Every lane is computed for every row, R S r (in +
out) multiplications more than a gathering of each row's own matrices needs; but it reads the S lanes once, where a
gathering reads, writes and reads again those of R >= S rows. One read pays for tens of multiplications on a CPU and
hundreds on a GPU, so up to some 32 lanes the dense products are faster, and shapes do not depend on who is in them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ..adapters.fit import Fitted
from ..adapters.pack import Group, Pack
from ..adapters.sites import features
from .static_size import Need


class Arena:
    """Memory that keeps its address. Steps of different sizes are never in use at once, so they share it by slots.

    Args:
        check_room: called with the bytes of every slot that is about to be made or to grow; may raise.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, check_room: Callable[[int], None] = lambda size: None
    ) -> None:
        self._device, self._dtype, self._check_room = device, dtype, check_room
        self._slots: dict[Hashable, list[torch.Tensor]] = {}
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._nbytes

    def take(self, slot: Hashable, *shape: int) -> torch.Tensor:
        """A slot's memory in this shape; what it holds is zeros or finite values of an earlier user.

        What a slot had before it grew is kept: a captured step reads it where it was.
        """
        found = self._slots.setdefault(slot, [])
        elements = torch.Size(shape).numel()
        if not found or found[-1].numel() < elements:
            self._check_room(elements * self._dtype.itemsize)
            with torch.inference_mode(False):
                found.append(torch.zeros(elements, device=self._device, dtype=self._dtype))
            self._nbytes += found[-1].nbytes
        flat = next(flat for flat in found if flat.numel() >= elements)
        return flat[:elements].view(shape)


@dataclass(frozen=True)
class Deal:
    """Which lane each row goes through.

    Attributes:
        lane: [rows], the number of the row's lane; the number of lanes for a row without one.
        others: [rows, 1, lanes, 1], True for the lanes that are not the row's own.
    """

    lane: torch.Tensor
    others: torch.Tensor


@dataclass(frozen=True)
class SiteLanes:
    """The lanes at one site, whose layers share an input.

    Attributes:
        members: the layers with a low-rank change, and where in the outputs of all layers theirs lie.
        down: [in, members * lanes * rank], by member, lane and rank.
        ups: for each member [lanes * rank, out].
        gain, bias: [lanes + 1, outputs of all layers]; the last one is for rows without a lane. None without.
        scale: [lanes + 1, in], or None.
        frozen: [outputs of all layers], the layers' own biases, where there are gains.
    """

    group: Group
    need: Need
    lanes: int
    members: tuple[tuple[int, int, int], ...]
    down: torch.Tensor | None
    ups: tuple[torch.Tensor, ...]
    gain: torch.Tensor | None
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    frozen: torch.Tensor | None

    def scale_input(self, x: torch.Tensor, deal: Deal) -> torch.Tensor:
        """What the site multiplies in place of its input x [rows, in]."""
        return x if self.scale is None else x * self.scale.index_select(0, deal.lane)

    def apply(self, x: torch.Tensor, out: torch.Tensor, deal: Deal) -> None:
        """Change out = W x [rows, outputs of all layers] in place; x is [rows, in]."""
        if self.gain is not None:
            own = out if self.frozen is None else out - self.frozen
            out.addcmul_(self.gain.index_select(0, deal.lane), own)
        if self.bias is not None:
            out.add_(self.bias.index_select(0, deal.lane))
        if self.down is None:
            return
        hidden = x @ self.down
        # Filled, not multiplied: a value of another row's lane may be infinite here, and infinity times zero is NaN.
        hidden.view(-1, len(self.members), self.lanes, self.need.rank).masked_fill_(deal.others, 0)
        width = self.lanes * self.need.rank
        for i, ((_, begin, end), up) in enumerate(zip(self.members, self.ups, strict=True)):
            out[:, begin:end].addmm_(hidden[:, i * width : (i + 1) * width], up)

    def neutral(self) -> None:
        """Let rows without a lane be as they are."""
        for values, fill in ((self.gain, 0), (self.bias, 0), (self.scale, 1)):
            if values is not None:
                values[self.lanes].fill_(fill)

    def own(self, lane: int) -> list[torch.Tensor]:
        """All that belongs to a lane and is zero without an adapter."""
        rank = self.need.rank
        found = [up.view(self.lanes, rank, -1)[lane] for up in self.ups]
        if self.down is not None:
            found.append(self._down(lane))
        return found + [values[lane] for values in (self.gain, self.bias) if values is not None]

    def copies(self, lane: int, pack: Pack | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(where to, what) for an adapter that comes into a lane of zeros."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.scale is not None:
            kept = pack.scale if pack is not None else None
            found.append((self.scale[lane], self.scale[self.lanes] if kept is None else kept))
        if pack is None:
            return found
        places = {member: i for i, (member, *_) in enumerate(self.members)}
        column = output = 0
        for j, (module, up, gain, bias) in enumerate(zip(self.group, pack.ups, pack.gains, pack.biases, strict=True)):
            width = features(module)[1]
            if up is not None and len(up):
                rank = len(up)
                found.append((self._down(lane)[:, places[j], :rank], pack.down[:, column : column + rank]))
                found.append((self.ups[places[j]].view(self.lanes, self.need.rank, -1)[lane, :rank], up))
                column += rank
            for held, values in ((self.gain, gain), (self.bias, bias)):
                if held is not None and values is not None:
                    found.append((held[lane, output : output + width], values))
            output += width
        return found

    def _down(self, lane: int) -> torch.Tensor:
        assert self.down is not None
        return self.down.view(len(self.down), len(self.members), self.lanes, self.need.rank)[:, :, lane]


def site_lanes(group: Group, need: Need, lanes: int, arena: Arena, slot: int) -> SiteLanes | None:
    """The lanes at one site; None where nothing changes it."""
    if need.nothing or not lanes:
        return None
    widths = [features(module)[1] for module in group]
    n_in, n_out = features(group[0])[0], sum(widths)
    members = tuple((i, sum(widths[:i]), sum(widths[: i + 1])) for i in sorted(need.members))

    def rows(name: str, present: bool, n: int) -> torch.Tensor | None:
        return arena.take((slot, name), lanes + 1, n) if present else None

    made = SiteLanes(
        group,
        need,
        lanes,
        members,
        arena.take((slot, "down"), n_in, lanes * need.width) if members else None,
        tuple(arena.take((slot, i), lanes * need.rank, end - begin) for i, begin, end in members),
        rows("gain", need.gain, n_out),
        rows("bias", need.bias, n_out),
        rows("scale", need.scale, n_in),
        _frozen(group, widths) if need.gain else None,
    )
    return made


class StaticLanes:
    """Which adapter is in which lane of every site. An adapter stays in its lane until another one needs it."""

    def __init__(self, sites: Sequence[SiteLanes | None], lanes: int) -> None:
        self.sites = list(sites)
        self.lanes = lanes
        self._held: OrderedDict[str, int] = OrderedDict()

    def reset(self) -> None:
        """Begin with empty lanes: lanes of another size may have used the memory."""
        self._held.clear()
        for site in self._changed:
            site.neutral()

    def deal(self, rows: Sequence[Fitted | None]) -> list[int]:
        """The lane of each row, its adapter copied into one if it is in none; `lanes` for a row without an adapter."""
        wanted = {row.digest: row for row in rows if row is not None and row.packs}
        free = [lane for lane in range(self.lanes) if lane not in self._held.values()]
        free += [lane for digest, lane in self._held.items() if digest not in wanted]
        for digest, fitted in wanted.items():
            if digest not in self._held:
                lane = free.pop(0)
                self._held = OrderedDict((d, at) for d, at in self._held.items() if at != lane)
                self._load(lane, fitted)
                self._held[digest] = lane
            self._held.move_to_end(digest)
        return [self._held[row.digest] if row is not None and row.packs else self.lanes for row in rows]

    @property
    def _changed(self) -> list[SiteLanes]:
        return [site for site in self.sites if site is not None]

    def _load(self, lane: int, fitted: Fitted) -> None:
        zeros = [tensor for site in self._changed for tensor in site.own(lane)]
        copies = [pair for site in self._changed for pair in site.copies(lane, fitted.packs.get(site.group))]
        if zeros:
            torch._foreach_zero_(zeros)
        if copies:
            torch._foreach_copy_([to for to, _ in copies], [what for _, what in copies])


def _frozen(group: Group, widths: Sequence[int]) -> torch.Tensor | None:
    biases = [getattr(module, "bias", None) for module in group]
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(w) if b is None else b.detach() for b, w in zip(biases, widths, strict=True)])
