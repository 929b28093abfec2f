"""Which row and which token each line of a flattened tensor [lines, width] is, while a model's own forward runs.

A model sees tensors of [rows, tokens, width], of [1, all tokens, width] where rows are packed, and of [rows, width]
once it has pooled. The number of lines tells which of them a layer is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..packs import Piece


class Strange(Exception):
    """A layer was given lines that belong to no known row, as the experts of a mixture are."""


class Segment(NamedTuple):
    """Lines `begin` to `end` are one learner's."""

    begin: int
    end: int
    learner: int


@dataclass(frozen=True)
class Lines:
    """keys, tokens: [lines] int64, the row's key and the token's index within the row."""

    keys: torch.Tensor
    tokens: torch.Tensor
    segments: tuple[Segment, ...]


def lines_of(rows: Sequence[Piece], lengths: Sequence[int], device: torch.device) -> Lines:
    """The lines of rows one after another, `lengths` lines each; rows of one learner lie side by side."""
    counts = torch.tensor(lengths)
    keys = torch.tensor([row.key for row in rows], dtype=torch.int64).repeat_interleave(counts)
    firsts = torch.tensor([row.first for row in rows]) - (counts.cumsum(0) - counts)
    tokens = torch.arange(int(counts.sum())) + firsts.repeat_interleave(counts)
    segments: list[Segment] = []
    at = 0
    for row, length in zip(rows, lengths, strict=True):
        if segments and segments[-1].learner == row.learner:
            segments[-1] = segments[-1]._replace(end=at + length)
        else:
            segments.append(Segment(at, at + length, row.learner))
        at += length
    return Lines(keys.to(device), tokens.to(device), tuple(segments))


@dataclass
class Run:
    """What a forward computes just now; the layers that adapters change read it.

    Attributes:
        known: lines by their number.
        dropping: whether dropout is on.
        strange: whether some layer was given lines of no known row.
        noise: a probe: what is added to the first row's lines, as a wave of this height.
        norms: DoRA's norms by site and learner, which stand still within a step.
    """

    rows: tuple[Piece, ...] = ()
    known: dict[int, Lines] = field(default_factory=dict)
    dropping: bool = False
    strange: bool = False
    noise: float = 0.0
    norms: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def lines(self, count: int, device: torch.device) -> Lines:
        """The lines of a tensor that has `count` of them.

        Raises:
            Strange: nobody knows whose they are, and there are several learners.
        """
        if count in self.known:
            return self.known[count]
        self.strange = True
        if len({row.learner for row in self.rows}) != 1:
            raise Strange
        learner, key = self.rows[0].learner, self.rows[0].key
        tokens = torch.arange(count, device=device)
        return Lines(torch.full_like(tokens, key), tokens, (Segment(0, count, learner),) if count else ())

    @contextmanager
    def only(self, lines: Lines) -> Iterator[None]:
        """Within the block tensors have these lines and no others."""
        before, self.known = self.known, {len(lines.keys): lines}
        try:
            yield
        finally:
            self.known = before
