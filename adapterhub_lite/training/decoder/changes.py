"""All learners' changes at a group of frozen products: rows go to their learner's, or all through stacked matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.products import Change
from ..trainable import TrainableLora
from .lora import GroupLora, Part, Tokens, Tools
from .parts import Frozen
from .stack import Stack, stack_of


class Changes:
    """What all learners change at one group of layers; nothing where none does."""

    def __init__(self, frozen: Frozen, trainables: Sequence[object], salt: int) -> None:
        self.frozen = frozen
        self.learners: dict[int, GroupLora] = {}
        for i, trainable in enumerate(trainables):
            if isinstance(trainable, TrainableLora):
                by_module = {site.module: site for site in trainable.sites.values()}
                sites = [by_module.get(module) for module in frozen.modules]
                if any(site is not None for site in sites):
                    self.learners[i] = GroupLora(frozen, sites, salt, trainable.dropout, len(trainables) == 1)
        self.rank = max((group.rank for group in self.learners.values()), default=0)
        self.stack: Stack | None = None

    def stacked(self) -> None:
        """Compute several learners by products of all, where that can be."""
        self.stack = stack_of(self.learners)
        if self.stack is not None:
            self.rank = self.stack.rank

    def forward(self, x: torch.Tensor, out: torch.Tensor, hidden: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """out = W x + bias with all changes; hidden [tokens, rank] is to be kept for the backward."""
        if self.stack is not None:
            self.frozen.forward(x, out, tools.buffers)
            self.stack.forward(x, out, hidden, tokens, tools)
            return
        adds = self.frozen.adds(x) and bool(self.learners)
        changes: list[list[Change]] = [[] for _ in self.frozen.columns] if adds else []
        later: list[tuple[int, int, GroupLora]] = []
        for first, end, learner in tokens.segments:
            group = self.learners.get(learner)
            part = Part(tokens, first, end, tools)
            joins = adds and group is not None and not group.scales_output and not part.drops(group.dropout)
            if group is not None and joins:
                group.lower(x[first:end], hidden[first:end, : group.rank], part)
            elif group is not None:
                later.append((first, end, group))
            for i, some in enumerate(changes):
                some.append(group.up_of(i, end, hidden[first:end]) if group is not None and joins else Change(end))
        self.frozen.forward(x, out, tools.buffers, changes)
        for first, end, group in later:
            low = hidden[first:end, : group.rank]
            group.forward(x[first:end], out[first:end], low, Part(tokens, first, end, tools))

    def lower(self, x: torch.Tensor, hidden: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """Make only `hidden`."""
        if self.stack is not None:
            self.stack.lower(x, hidden, tokens, tools)
            return
        for first, end, learner in tokens.segments:
            group = self.learners.get(learner)
            if group is not None:
                group.lower(x[first:end], hidden[first:end, : group.rank], Part(tokens, first, end, tools))

    def back(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        hidden: torch.Tensor,
        grad_x: torch.Tensor | None,
        tokens: Tokens,
        tools: Tools,
    ) -> None:
        """Collect gradients; grad_x becomes the gradient of x. grad itself stays as it is.

        Args:
            x: None where no learner `needs_input` here: `back_down` is to be called with it then.
        """
        if self.stack is not None:
            if grad_x is not None:
                self.frozen.back(grad, grad_x, tools.buffers)
            slope = self._slope(0, tokens.count, tokens, tools)
            self.stack.back(grad, hidden, slope, grad_x, tokens, tools)
            if x is not None:
                self.stack.back_down(slope, x)
            return
        owned = [(s, self.learners[s[2]]) for s in tokens.segments if s[2] in self.learners]
        if any(group.scales_output for _, group in owned):
            assert x is not None
            copy = tools.buffers("scaled gradient", *grad.shape)
            copy.copy_(grad)
            grad = copy
            for (first, end, _), group in owned:
                low = hidden[first:end, : group.rank]
                group.scale_back(grad[first:end], x[first:end], low, Part(tokens, first, end, tools))
        changes: list[Change] = []
        joins = grad_x is not None and self.frozen.adds(grad)
        # What adds to the product after it: all, unless products add; then only what dropout asks about.
        later = [(s, g) for s, g in owned if not joins or (tools.training and g.dropout > 0)]
        for segment, group in owned if joins else ():
            if (segment, group) not in later:
                self._back(segment, group, grad, x, hidden, None, tokens, tools)
        if grad_x is not None:
            if joins:
                changes = [self._down_of(segment, later, tokens, tools) for segment in tokens.segments]
            self.frozen.back(grad, grad_x, tools.buffers, changes)
        for segment, group in later:
            self._back(segment, group, grad, x, hidden, grad_x, tokens, tools)

    def _back(
        self,
        segment: tuple[int, int, int],
        group: GroupLora,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        hidden: torch.Tensor,
        grad_x: torch.Tensor | None,
        tokens: Tokens,
        tools: Tools,
    ) -> None:
        first, end, _ = segment
        through = None if grad_x is None else grad_x[first:end]
        low, slope = hidden[first:end, : group.rank], self._slope(first, end, tokens, tools)[:, : group.rank]
        some = None if x is None else x[first:end]
        group.back(grad[first:end], some, low, slope, through, Part(tokens, first, end, tools))

    def _down_of(
        self,
        segment: tuple[int, int, int],
        later: Sequence[tuple[tuple[int, int, int], GroupLora]],
        tokens: Tokens,
        tools: Tools,
    ) -> Change:
        first, end, learner = segment
        group = self.learners.get(learner)
        if group is None or any(segment == s for s, _ in later):
            return Change(end)
        return group.down_of(end, self._slope(first, end, tokens, tools)[:, : group.rank])

    def back_down(self, x: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """Collect the gradients of A that `back` left, right after it."""
        if self.stack is not None:
            self.stack.back_down(self._slope(0, tokens.count, tokens, tools), x)
            return
        for first, end, learner in tokens.segments:
            group = self.learners.get(learner)
            if group is not None:
                group.back_down(self._slope(first, end, tokens, tools)[:, : group.rank], x[first:end])

    def needs_input(self, training: bool) -> bool:
        """Whether `back` must be given x."""
        return any(group.needs_input(training) for group in self.learners.values())

    def _slope(self, first: int, end: int, tokens: Tokens, tools: Tools) -> torch.Tensor:
        return tools.buffers("lora slope", tokens.count, self.rank)[first:end]
