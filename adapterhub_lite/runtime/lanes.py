"""Lanes: the low-rank changes of several adapters side by side, and which rows of a batch go through which lane.

The matrices of S adapters at a site are stacked as down [S, in, R] and up [S, R, out]. A batch's rows are dealt to the
lanes, and two batched products make the change of all rows, however many adapters are mixed: every lane's matrices are
read once, and no row is multiplied with a matrix that is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Deal:
    """How the rows of a batch are dealt to `lanes` lanes of `group` places each.

    Attributes:
        rows: rows of the whole batch; not all of them need a lane.
        order: [lanes * group], the row in each place; None: rows 0, 1, 2, ... in order.
        places, owners: the places whose row is their own, and those rows; None: all are. A lane with fewer rows than
            `group` repeats one of the batch, and what comes of the repetition is thrown away.
    """

    rows: int
    lanes: int
    group: int
    order: torch.Tensor | None = None
    places: torch.Tensor | None = None
    owners: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, ..., n] -> what each lane sees, [lanes, group * ..., n]."""
        if self.order is not None:
            x = x.index_select(0, self.order)
        elif self.lanes * self.group != self.rows:
            x = x[: self.lanes * self.group]
        return x.reshape(self.lanes, -1, x.shape[-1])

    def add(self, out: torch.Tensor, hidden: torch.Tensor, up: torch.Tensor) -> None:
        """Add hidden [lanes, group * ..., R] times up [lanes, R, n] to the rows of out [rows, ..., n], in place."""
        if self.order is None:
            part = out if self.lanes * self.group == self.rows else out[: self.lanes * self.group]
            if self.lanes == 1:
                part.view(-1, part.shape[-1]).addmm_(hidden[0], up[0])
            else:
                part.view(self.lanes, -1, part.shape[-1]).baddbmm_(hidden, up)
            return
        change = torch.bmm(hidden, up).view(self.lanes * self.group, *out.shape[1:])
        if self.places is None or self.owners is None:
            out.index_add_(0, self.order, change)
        else:
            out.index_add_(0, self.owners, change.index_select(0, self.places))


def shrink(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [lanes, n, in] times down [lanes, in, R]; one lane is one plain product."""
    return (x[0] @ down[0]).unsqueeze(0) if down.shape[0] == 1 else torch.bmm(x, down)


def deal(lane_of_row: Sequence[int], lanes: int, device: torch.device) -> Deal:
    """Deal rows to lanes; `lane_of_row` holds -1 for a row without one.

    Rows that come sorted by lane, as many in each, need no gathering: callers sort where they can.
    """
    members: list[list[int]] = [[] for _ in range(lanes)]
    for row, lane in enumerate(lane_of_row):
        if lane >= 0:
            members[lane].append(row)
    group = max(1, *map(len, members))
    some = next((rows[0] for rows in members if rows), 0)
    order = [row for rows in members for row in (*rows, *[some] * (group - len(rows)))]
    if all(len(rows) == group for rows in members):
        if order == list(range(lanes * group)):
            return Deal(len(lane_of_row), lanes, group)
        return Deal(len(lane_of_row), lanes, group, torch.tensor(order, device=device))
    own = [lane * group + i for lane, rows in enumerate(members) for i in range(len(rows))]
    places, owners = torch.tensor(own, device=device), torch.tensor([order[p] for p in own], device=device)
    return Deal(len(lane_of_row), lanes, group, torch.tensor(order, device=device), places, owners)
