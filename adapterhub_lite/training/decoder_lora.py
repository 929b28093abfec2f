"""LoRA and DoRA of several learners at the frozen products of a decoder, forward and backward.

With W frozen, s the scaling and D dropout of the adapter's input x:
    LoRA:  y = W x + s B A D(x)
    DoRA:  y = W x + (g - 1) W D(x) + g s B A D(x),  g = magnitude / ||W + s B A||, its norm constant in the backward
(arXiv 2106.09685; arXiv 2402.09353, section 4.3; as PEFT computes them). A D(x) is kept for the backward; what dropout
kept is not, since it is a function of where a number stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..adapters.lora import merged_norm
from .buffers import Buffers
from .decoder_ops import Ops
from .decoder_parts import Frozen
from .trainable import LoraParameters, TrainableLora


@dataclass(frozen=True)
class Tokens:
    """Tokens of a pack that stand one after another, by learner.

    Attributes:
        segments: (first, end, learner).
        keys, indices: [count] int64, the key of each token's row and its index there: what dropout asks for.
    """

    count: int
    segments: tuple[tuple[int, int, int], ...]
    keys: torch.Tensor
    indices: torch.Tensor


@dataclass
class _Member:
    """One site of one learner, in the dtype that is computed in; gradients in float32 at least.

    Attributes:
        ranks: its rows of the group's A, and columns of A x.
        up: s B [out, rank].
        gain, norm: DoRA's g and ||W + s B A|| [out].
    """

    index: int
    site: LoraParameters
    ranks: slice
    salt: int
    up: torch.Tensor
    grad_up: torch.Tensor  # [rank, out]: products write lines faster than columns
    gain: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    grad_gain: torch.Tensor | None = None


class GroupLora:
    """One learner's changes of the layers of one input.

    Attributes:
        rank: of all its sites together; so many columns A x has.
    """

    def __init__(self, frozen: Frozen, sites: Sequence[LoraParameters | None], salt: int, dropout: float) -> None:
        self.frozen, self.dropout = frozen, dropout
        self.members: list[_Member] = []
        first = 0
        for i, site in enumerate(sites):
            if site is not None:
                end = first + int(site.a.shape[0])
                up = torch.empty_like(site.b, dtype=frozen.dtype, requires_grad=False)
                wide = torch.zeros_like(up.t().contiguous(), dtype=torch.promote_types(frozen.dtype, torch.float32))
                self.members.append(_Member(i, site, slice(first, end), salt + i, up, wide))
                first = end
        self.rank = first
        device = self.members[0].up.device
        self._down = torch.empty((first, frozen.n_in), device=device, dtype=frozen.dtype)
        self._grad_down = torch.zeros_like(self._down, dtype=torch.promote_types(frozen.dtype, torch.float32))
        self.scales_output = any(member.site.magnitude is not None for member in self.members)

    def read(self) -> None:
        """Take over the parameters as they are now, and begin new gradients."""
        with torch.no_grad():
            self._grad_down.zero_()
            for member in self.members:
                site = member.site
                self._down[member.ranks] = site.a
                member.up.copy_(site.b * site.scaling)
                member.grad_up.zero_()
                if site.magnitude is not None:
                    dense = self.frozen.weight(member.index).to(site.a.dtype)
                    norm = merged_norm(dense, site.a, site.b * site.scaling)
                    member.norm = norm.to(member.grad_up.dtype)
                    member.gain = (site.magnitude / norm).to(member.up.dtype)
                    member.grad_gain = torch.zeros_like(member.norm)

    def give(self) -> None:
        """Add the gradients to those of the parameters."""
        for member in self.members:
            site = member.site
            _add_grad(site.a, self._grad_down[member.ranks])
            _add_grad(site.b, member.grad_up.t(), site.scaling)
            if site.magnitude is not None:
                assert member.grad_gain is not None
                assert member.norm is not None
                _add_grad(site.magnitude, member.grad_gain / member.norm)

    def lower(self, x: torch.Tensor, hidden: torch.Tensor, part: Part) -> None:
        """hidden [tokens, rank] = A D(x)."""
        if not part.drops(self.dropout):
            torch.mm(x, self._down.t(), out=hidden)
            return
        for member in self.members:
            dropped = part.dropped(x, member.salt, self.dropout)
            torch.mm(dropped, self._down[member.ranks].t(), out=hidden[:, member.ranks])

    def forward(self, x: torch.Tensor, out: torch.Tensor, hidden: torch.Tensor, part: Part) -> None:
        """Change `out` [tokens, outputs of the group] = W x + bias; hidden [tokens, rank] = A D(x) is to be kept."""
        self.lower(x, hidden, part)
        for member in self.members:
            own, low = out[:, self.frozen.columns[member.index]], hidden[:, member.ranks]
            if member.gain is not None and part.drops(self.dropout):
                raw = part.frozen_product(self.frozen, member.index, part.dropped(x, member.salt, self.dropout))
                own.add_(raw.mul_(member.gain - 1))
                torch.mm(low, member.up.t(), out=raw)
                own.add_(raw.mul_(member.gain))
                continue
            own.addmm_(low, member.up.t())
            if member.gain is not None:
                bias = self._bias(member)
                if bias is not None:
                    own.sub_(bias)
                own.mul_(member.gain)
                if bias is not None:
                    own.add_(bias)

    def scale_back(self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, part: Part) -> None:
        """DoRA without dropout scales outputs: grad becomes the gradient of W x + s B A x, in place."""
        if part.drops(self.dropout):
            return
        for member in self.members:
            if member.gain is not None and member.grad_gain is not None:
                own = grad[:, self.frozen.columns[member.index]]
                raw = part.frozen_product(self.frozen, member.index, x)
                raw.addmm_(hidden[:, member.ranks], member.up.t())
                member.grad_gain += (own * raw).sum(0, dtype=member.grad_gain.dtype)
                own.mul_(member.gain)

    def needs_input(self, training: bool) -> bool:
        """Whether `back` reads x, so that `back_down` is not to be called."""
        return self.scales_output or (training and self.dropout > 0)

    def back(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        hidden: torch.Tensor,
        slope: torch.Tensor,
        grad_x: torch.Tensor | None,
        part: Part,
    ) -> None:
        """Collect the gradients of A and B, and add to grad_x [tokens, in] what comes through them.

        Args:
            x: None: A's gradient is left to `back_down`.
            slope: [tokens, rank], becomes the gradient of `hidden`.
        """
        if part.drops(self.dropout):
            assert x is not None
            self._back_dropped(grad, x, hidden, slope, grad_x, part)
            return
        for member in self.members:
            own = grad[:, self.frozen.columns[member.index]]
            torch.mm(own, member.up, out=slope[:, member.ranks])
            _accumulate(member.grad_up, hidden[:, member.ranks].t(), own)
        if x is not None:
            self.back_down(slope, x)
        if grad_x is not None:
            grad_x.addmm_(slope, self._down)

    def back_down(self, slope: torch.Tensor, x: torch.Tensor) -> None:
        """Collect A's gradient."""
        _accumulate(self._grad_down, slope.t(), x)

    def _back_dropped(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        hidden: torch.Tensor,
        slopes: torch.Tensor,
        grad_x: torch.Tensor | None,
        part: Part,
    ) -> None:
        for member in self.members:
            own, low = grad[:, self.frozen.columns[member.index]], hidden[:, member.ranks]
            dropped = part.dropped(x, member.salt, self.dropout)
            given, direct = own, None
            if member.gain is not None and member.grad_gain is not None:
                raw = part.frozen_product(self.frozen, member.index, dropped)
                raw.addmm_(low, member.up.t())
                member.grad_gain += (own * raw).sum(0, dtype=member.grad_gain.dtype)
                given, direct = own * member.gain, own * (member.gain - 1)
            slope = slopes[:, member.ranks]
            torch.mm(given, member.up, out=slope)
            _accumulate(member.grad_up, low.t(), given)
            _accumulate(self._grad_down[member.ranks], slope.t(), dropped)
            if grad_x is not None:
                through = torch.mm(slope, self._down[member.ranks], out=dropped)
                if direct is not None:
                    through.addmm_(direct, self.frozen.weight(member.index))
                part.drop(through, member.salt, self.dropout, through)
                grad_x += through

    def _bias(self, member: _Member) -> torch.Tensor | None:
        return None if self.frozen.bias is None else self.frozen.bias[self.frozen.columns[member.index]]


class Part:
    """One learner's tokens of a pack, with what their dropout and products need."""

    def __init__(self, tokens: Tokens, first: int, end: int, tools: Tools) -> None:
        self._keys, self._indices = tokens.keys[first:end], tokens.indices[first:end]
        self.buffers, self._ops, self._training = tools.buffers, tools.ops, tools.training

    def drops(self, dropout: float) -> bool:
        """Whether inputs of adapters are dropped now."""
        return self._training and dropout > 0

    def drop(self, x: torch.Tensor, salt: int, p: float, out: torch.Tensor) -> None:
        """out = D(x)."""
        self._ops.drop(x, self._keys, self._indices, salt, p, out)

    def dropped(self, x: torch.Tensor, salt: int, p: float) -> torch.Tensor:
        """D(x) in a buffer."""
        out = self.buffers("dropped", *x.shape)
        self.drop(x, salt, p, out)
        return out

    def frozen_product(self, frozen: Frozen, member: int, x: torch.Tensor) -> torch.Tensor:
        """W x of one layer, without its bias, in a buffer."""
        columns = frozen.columns[member]
        out = self.buffers("frozen product", len(x), columns.stop - columns.start)
        return torch.mm(x, frozen.weight(member).t(), out=out)


@dataclass(frozen=True)
class Tools:
    """What all layers compute with; `training` switches dropout."""

    ops: Ops
    buffers: Buffers
    training: bool


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
                    self.learners[i] = GroupLora(frozen, sites, salt, trainable.dropout)
        self.rank = max((group.rank for group in self.learners.values()), default=0)

    def forward(self, x: torch.Tensor, out: torch.Tensor, hidden: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """out = W x + bias with all changes; hidden [tokens, rank] is to be kept for the backward."""
        self.frozen.forward(x, out, tools.buffers)
        for first, end, learner in tokens.segments:
            group = self.learners.get(learner)
            if group is not None:
                low = hidden[first:end, : group.rank]
                group.forward(x[first:end], out[first:end], low, Part(tokens, first, end, tools))

    def lower(self, x: torch.Tensor, hidden: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """Make only `hidden`."""
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
        owned = [(s, self.learners[s[2]]) for s in tokens.segments if s[2] in self.learners]
        if any(group.scales_output for _, group in owned):
            assert x is not None
            copy = tools.buffers("scaled gradient", *grad.shape)
            copy.copy_(grad)
            grad = copy
            for (first, end, _), group in owned:
                low = hidden[first:end, : group.rank]
                group.scale_back(grad[first:end], x[first:end], low, Part(tokens, first, end, tools))
        if grad_x is not None:
            self.frozen.back(grad, grad_x, tools.buffers)
        for (first, end, _), group in owned:
            through = None if grad_x is None else grad_x[first:end]
            low, slope = hidden[first:end, : group.rank], self._slope(first, end, tokens, tools)[:, : group.rank]
            some = None if x is None else x[first:end]
            group.back(grad[first:end], some, low, slope, through, Part(tokens, first, end, tools))

    def back_down(self, x: torch.Tensor, tokens: Tokens, tools: Tools) -> None:
        """Collect the gradients of A that `back` left, right after it."""
        for first, end, learner in tokens.segments:
            group = self.learners.get(learner)
            if group is not None:
                group.back_down(self._slope(first, end, tokens, tools)[:, : group.rank], x[first:end])

    def needs_input(self, training: bool) -> bool:
        """Whether `back` must be given x."""
        return any(group.needs_input(training) for group in self.learners.values())

    def _slope(self, first: int, end: int, tokens: Tokens, tools: Tools) -> torch.Tensor:
        return tools.buffers("lora slope", tokens.count, self.rank)[first:end]


def _accumulate(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """into += left @ right; sums over packs are formed in the dtype of `into`."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into += torch.mm(left, right)


def _add_grad(parameter: torch.nn.Parameter, grad: torch.Tensor, factor: float = 1.0) -> None:
    """Add to a parameter's gradient, which is a tensor of its own: buffers are reused."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(grad.to(parameter.dtype), alpha=factor)
