"""Batches of like lengths, in an order that a seed fixes: what a step takes is a pure function of its number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from ..recipe.training import TrainingConfig
from ..tasks.task import Example
from .schedule import step_counts

# Rows are sorted by length within groups of this many batches: little padding, and the order stays random.
_GROUP = 16
_MASK = (1 << 64) - 1


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


class Order:
    """Which examples each optimiser step takes: `gradient_accumulation` batches, never over the end of an epoch."""

    def __init__(self, config: TrainingConfig, examples: Sequence[Example]) -> None:
        self._config = config
        self._lengths = [example_length(e) for e in examples]
        self.steps_per_epoch, self.total = step_counts(
            len(examples), config.batch_size, config.gradient_accumulation, config.epochs, config.max_steps
        )
        self._epoch = lru_cache(maxsize=1)(self._steps_of_epoch)

    def rows(self, step: int) -> list[int]:
        """Indices of the examples of step 0..total-1."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def _steps_of_epoch(self, epoch: int) -> list[list[int]]:
        batches = epoch_batches(self._lengths, self._config.batch_size, self._config.seed, epoch)
        steps = []
        while group := list(itertools.islice(batches, self._config.gradient_accumulation)):
            steps.append([i for batch in group for i in batch])
        return steps


def row_key(seed: int, step: int, index: int) -> int:
    """63 bits that name the `index`-th row of a step, whoever is trained beside it (SplitMix64's finaliser)."""
    return _mixed(_mixed(_mixed(seed) ^ step) ^ index) >> 1


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
