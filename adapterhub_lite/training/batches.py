"""Batches of like lengths, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..tasks.task import Example

# Rows are sorted by length within groups of this many batches: little padding, and the order stays random.
_GROUP = 16


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Indices of each batch of one epoch: shuffled, grouped by length, the batches shuffled again."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    span = batch_size * _GROUP
    for start in range(0, len(order), span):
        group = sorted(order[start : start + span], key=lambda i: lengths[i])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def example_length(example: Example) -> int:
    """Tokens that one example costs."""
    return max(len(example.ids), len(example.labels))
