"""Low-rank changes of many learners in few products: their matrices side by side, and a mask of whose each token is.

Every token is multiplied with the matrices of all learners and keeps what its own gave. That is more arithmetic than
learner by learner, and a number of launches that does not depend on how many there are: on a GPU launches are what
short segments cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .lora import GroupLora, Tokens, Tools

_MASKS = 16  # kept at once: those of one pack are asked for by every layer


class Masks:
    """1 where a column is of a token's learner, else 0; for all layers of a pass."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], torch.Tensor] = {}

    def __call__(self, tokens: Tokens, owners: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """[tokens, columns]."""
        key = (tokens.segments, owners, like.dtype)
        found = self._made.get(key)
        if found is None:
            if len(self._made) >= _MASKS:
                self._made.clear()
            of_tokens = [learner for first, end, learner in tokens.segments for _ in range(end - first)]
            mine, theirs = (torch.tensor(ids, device=like.device) for ids in (of_tokens, owners))
            found = self._made[key] = (mine[:, None] == theirs).to(like.dtype)
        return found


class Stack:
    """All learners' plain LoRA at the layers of one input.

    Attributes:
        rank: of all sites of all learners together.
    """

    def __init__(self, learners: Mapping[int, GroupLora]) -> None:
        groups = list(learners.values())
        self._frozen = groups[0].frozen
        self._places: list[tuple[int, slice]] = []  # of each layer that some learner changes: its index and columns
        self._order: list[tuple[GroupLora, int, slice]] = []  # whose columns stand where
        owners: list[int] = []
        for index in range(len(self._frozen.columns)):
            first = len(owners)
            for learner, group in learners.items():
                for i, member in enumerate(group.members):
                    if member.index == index:
                        count = member.ranks.stop - member.ranks.start
                        self._order.append((group, i, slice(len(owners), len(owners) + count)))
                        owners += [learner] * count
            if len(owners) > first:
                self._places.append((index, slice(first, len(owners))))
        self._owners, self.rank = tuple(owners), len(owners)
        wide = torch.promote_types(self._frozen.dtype, torch.float32)
        device = groups[0].members[0].up.device
        self._grad_down = torch.zeros((self.rank, self._frozen.n_in), dtype=wide, device=device)
        widths = [self._frozen.columns[i].stop - self._frozen.columns[i].start for i, _ in self._places]
        self._grad_ups = [
            torch.zeros((columns.stop - columns.start, width), dtype=wide, device=device)
            for (_, columns), width in zip(self._places, widths, strict=True)
        ]
        self._down = torch.empty((0, 0))
        self._ups: list[torch.Tensor] = []

    def read(self) -> None:
        """Take over what the learners have read, and begin new gradients."""
        self._down = torch.cat([group.down_part(i) for group, i, _ in self._order])
        self._ups = [
            torch.cat(
                [group.members[i].up for group, i, own in self._order if columns.start <= own.start < columns.stop], 1
            )
            for _, columns in self._places
        ]
        for grad in (self._grad_down, *self._grad_ups):
            grad.zero_()

    def give(self) -> None:
        """Add the gradients to the learners'."""
        into, found = [], []
        for group, i, own in self._order:
            place = next(n for n, (_, columns) in enumerate(self._places) if columns.start <= own.start < columns.stop)
            first = own.start - self._places[place][1].start
            into += [group.grad_down_part(i), group.members[i].grad_up]
            found += [self._grad_down[own], self._grad_ups[place][first : first + own.stop - own.start]]
        torch._foreach_add_(into, found)

    def lower(self, x: torch.Tensor, hidden: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """hidden [tokens, rank] = A x of each token's learner, 0 in the columns of others."""
        torch.mm(x, self._down.t(), out=hidden)
        hidden.mul_(tools.masks(tokens, self._owners, hidden))

    def forward(self, x: torch.Tensor, out: torch.Tensor, hidden: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """Change out = W x; `hidden` is to be kept."""
        self.lower(x, hidden, tokens, tools)
        for (index, columns), up in zip(self._places, self._ups, strict=True):
            out[:, self._frozen.columns[index]].addmm_(hidden[:, columns], up.t())

    def back(
        self,
        grad: torch.Tensor,
        hidden: torch.Tensor,
        slope: torch.Tensor,
        grad_x: torch.Tensor | None,
        tokens: Tokens,
        tools: Tools,
    ) -> None:
        """Collect B's gradients, make `slope` that of `hidden`, and add to grad_x what comes through it."""
        for (index, columns), up, into in zip(self._places, self._ups, self._grad_ups, strict=True):
            own = grad[:, self._frozen.columns[index]]
            torch.mm(own, up, out=slope[:, columns])
            into.add_(torch.mm(hidden[:, columns].t(), own))
        slope.mul_(tools.masks(tokens, self._owners, slope))
        if grad_x is not None:
            grad_x.addmm_(slope, self._down)

    def back_down(self, slope: torch.Tensor, x: torch.Tensor) -> None:
        """Collect A's gradients."""
        self._grad_down.add_(torch.mm(slope.t(), x))


def stack_of(learners: Mapping[int, GroupLora]) -> Stack | None:
    """A stack of learners that neither drop nor scale; None for others, and for one alone."""
    plain = all(not group.dropout and not group.scales_output for group in learners.values())
    return Stack(learners) if len(learners) > 1 and plain else None
