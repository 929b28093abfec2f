"""Sizes of a decode step whose shapes stand still: rows, columns, lanes and what the adapters in them may change.

A step is captured or compiled once a size, so sizes are few: every measure comes from a ladder, and a size stays in use
until it is too small, or some measure of it was for a while `_SLACK` times what the rows needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..adapters.fit import Fitted
from ..adapters.pack import Group, Pack

_SLACK = 4
_LEAST_RANK = 8
_COLUMNS = 128
# Hidden values of one row that are never too many: a step of bare rows may keep one lane of a small adapter.
_LEAST_WIDTH = 64


@dataclass(frozen=True)
class Need:
    """What the lanes of one kind of site have room for.

    Attributes:
        rank: of every lane; 0: nothing is added.
        members: the layers of the site that have a low-rank change.
        gain, bias, scale: whether lanes have them; see `Pack`.
    """

    rank: int = 0
    members: frozenset[int] = frozenset()
    gain: bool = False
    bias: bool = False
    scale: bool = False

    def __or__(self, other: Need) -> Need:
        """Room for both."""
        return Need(
            max(self.rank, other.rank),
            self.members | other.members,
            self.gain or other.gain,
            self.bias or other.bias,
            self.scale or other.scale,
        )

    @property
    def nothing(self) -> bool:
        """Whether the site is left as it is."""
        return self == Need()

    @property
    def width(self) -> int:
        """Hidden values of one lane."""
        return self.rank * len(self.members)


Needs = tuple[Need, ...]
"""One for each kind of site, in the order of `StaticStep.kinds`."""


@dataclass(frozen=True)
class Size:
    """The shapes of one step.

    Attributes:
        rows, columns: places of the batch, and tokens that each has room for.
        lanes: adapters that may be in use at once.
    """

    rows: int
    columns: int
    lanes: int
    needs: Needs

    @property
    def width(self) -> int:
        """Hidden values of one row at one layer: what the lanes cost."""
        return self.lanes * sum(need.width for need in self.needs)

    def holds(self, needed: Size) -> bool:
        """Whether there is room for `needed`."""
        return self.joined(needed) == self

    def joined(self, other: Size) -> Size:
        """Room for both."""
        needs = tuple(a | b for a, b in zip(self.needs, other.needs, strict=True))
        rows, columns = max(self.rows, other.rows), max(self.columns, other.columns)
        return Size(rows, columns, max(self.lanes, other.lanes), needs)

    def suits(self, needed: Size) -> bool:
        """Whether there is room for `needed`, and not a multiple of it."""
        return (
            self.holds(needed)
            and self.rows < _SLACK * needed.rows
            and self.columns < _SLACK * needed.columns
            and self.width < _SLACK * max(_LEAST_WIDTH, needed.width)
        )


def size_for(needed: Size, current: Size | None, known: Iterable[Size]) -> Size:
    """The size to move to: one that was used before, or a new one.

    Args:
        current: one whose room is kept where that is no waste, so that sizes do not go up and down measure by measure.
    """
    found = [size for size in known if size.suits(needed)]
    if found:
        return min(found, key=lambda size: (size.width, size.rows * size.columns))
    joined = needed if current is None else needed.joined(current)
    return joined if joined.suits(needed) else needed


def size_needed(rows: Sequence[Needs], adapters: int, longest: int, kinds: int) -> Size:
    """The smallest size on the ladders.

    Args:
        rows: what each row's adapter needs; empty for a row without one.
        adapters: different ones among them.
        longest: tokens of the longest row, the next one included.
    """
    needs = [Need()] * kinds
    for some in rows:
        needs = [a | b for a, b in zip(needs, some, strict=True)] if some else needs
    rounded = tuple(replace(need, rank=_power(need.rank, _LEAST_RANK) if need.rank else 0) for need in needs)
    return Size(_power(len(rows)), _columns(longest), _power(adapters) if adapters else 0, rounded)


def needs_of(fitted: Fitted, kinds: Sequence[Sequence[Group]]) -> Needs:
    """What an adapter needs at each kind of site; `kinds` holds the groups of each kind, over all layers."""
    return tuple(_need([fitted.packs[group] for group in groups if group in fitted.packs]) for groups in kinds)


def _need(packs: Sequence[Pack]) -> Need:
    found = Need()
    for pack in packs:
        found |= Need(
            max(pack.ranks),
            frozenset(i for i, rank in enumerate(pack.ranks) if rank),
            any(gain is not None for gain in pack.gains),
            any(bias is not None for bias in pack.biases),
            pack.scale is not None,
        )
    return found


def _power(count: int, least: int = 1) -> int:
    """The power of two that holds so many."""
    return max(least, 1 << (count - 1).bit_length())


def _columns(count: int) -> int:
    """128 times 1, 2, 3, 4, 6, 8, 12, 16, ...: beyond the first two at most a third is empty."""
    blocks = -(-count // _COLUMNS)
    power = _power(blocks)
    return _COLUMNS * (power * 3 // 4 if power >= 4 and blocks <= power * 3 // 4 else power)
