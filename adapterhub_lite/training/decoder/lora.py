"""LoRA and DoRA of several learners at the frozen products of a decoder, forward and backward.

With W frozen, s the scaling and D dropout of the adapter's input x:
    LoRA:  y = W x + s B A D(x)
    DoRA:  y = W x + (g - 1) W D(x) + g s B A D(x),  g = magnitude / ||W + s B A||, its norm constant in the backward
(arXiv 2106.09685; arXiv 2402.09353, section 4.3; as PEFT computes them). A D(x) is kept for the backward; what dropout
kept is not, since it is a function of where a number stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...adapters.lora import merged_norm
from ...kernels.products import Change
from ..memory.buffers import Buffers
from ..trainable import LoraParameters
from .ops import Ops
from .parts import Frozen
from .stack import Masks


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
        up: s B [out, rank]; its transpose is what lies in lines.
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

    def __init__(
        self, frozen: Frozen, sites: Sequence[LoraParameters | None], salt: int, dropout: float, direct: bool = False
    ) -> None:
        self.frozen, self.dropout = frozen, dropout
        # Where a product is made for itself before it is added to wider sums, these may be the parameters' own.
        self.direct = direct and frozen.dtype != torch.promote_types(frozen.dtype, torch.float32)
        self.members: list[_Member] = []
        first = 0
        for i, site in enumerate(sites):
            if site is not None:
                end = first + int(site.a.shape[0])
                up = torch.empty(site.b.shape[::-1], dtype=frozen.dtype, device=site.b.device).t()
                size = (0, 0) if self.direct else (up.shape[1], up.shape[0])
                wide = torch.zeros(size, device=up.device, dtype=torch.promote_types(frozen.dtype, torch.float32))
                self.members.append(_Member(i, site, slice(first, end), salt + i, up, wide))
                first = end
        self.rank = first
        device = self.members[0].up.device
        self._down = torch.empty((first, frozen.n_in), device=device, dtype=frozen.dtype)
        held = (0, 0) if self.direct else self._down.shape
        self._grad_down = torch.zeros(held, device=device, dtype=torch.promote_types(frozen.dtype, torch.float32))
        self.scales_output = any(member.site.magnitude is not None for member in self.members)

    def read(self) -> None:
        """Take over the parameters as they are now, and begin new gradients."""
        with torch.no_grad():
            self._grad_down.zero_()
            self.fetch()
            self._take()
            for member in self.members:
                site = member.site
                member.grad_up.zero_()
                if site.magnitude is not None:
                    dense = self.frozen.weight(member.index).to(site.a.dtype)
                    norm = merged_norm(dense, site.a, site.b * site.scaling)
                    member.norm = norm.to(member.grad_up.dtype)
                    member.gain = (site.magnitude / norm).to(member.up.dtype)
                    member.grad_gain = torch.zeros_like(member.norm)

    def down_part(self, member: int) -> torch.Tensor:
        """A of one site."""
        return self._down[self.members[member].ranks]

    def grad_down_part(self, member: int) -> torch.Tensor:
        """Where the gradient of one site's A is summed."""
        return self._grad_down[self.members[member].ranks]

    def _take(self) -> None:
        for member in self.members:
            self._down[member.ranks] = member.site.a
            member.up.copy_(member.site.b * member.site.scaling)

    def fetch(self) -> None:
        """Take over the parameters again after `release`."""
        if not self._down.numel():
            self._down = torch.empty((self.rank, self.frozen.n_in), device=self._down.device, dtype=self._down.dtype)
            for member in self.members:
                member.up = torch.empty_like(member.site.b, dtype=self._down.dtype, requires_grad=False)
            self._take()

    def release(self) -> None:
        """Give up what `read` took over, where it is quickly had again."""
        if self.direct and not self.scales_output:
            self._down = self._down.new_empty((0, self.frozen.n_in))
            for member in self.members:
                member.up = member.up.new_empty((0, 0))

    def give(self) -> None:
        """Add the gradients to those of the parameters."""
        for member in self.members:
            site = member.site
            if not self.direct:
                _add_grad(site.a, self._grad_down[member.ranks])
                _add_grad(site.b, member.grad_up.t(), site.scaling)
            if site.magnitude is not None:
                assert member.grad_gain is not None
                assert member.norm is not None
                _add_grad(site.magnitude, member.grad_gain / member.norm)

    def up_of(self, index: int, end: int, hidden: torch.Tensor) -> Change:
        """What the product with one layer may add by itself to the tokens before `end`."""
        member = next((member for member in self.members if member.index == index), None)
        return Change(end) if member is None else Change(end, hidden[:, member.ranks], member.up.t())

    def down_of(self, end: int, slope: torch.Tensor) -> Change:
        """What a product may add to the gradient of the tokens before `end`."""
        return Change(end, slope, self._down)

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
            self._add_up(member, hidden[:, member.ranks], own)
        if x is not None:
            self.back_down(slope, x)
        if grad_x is not None:
            grad_x.addmm_(slope, self._down)

    def back_down(self, slope: torch.Tensor, x: torch.Tensor) -> None:
        """Collect A's gradient."""
        self._add_down(self.members, slice(0, self.rank), slope, x)

    def _add_up(self, member: _Member, low: torch.Tensor, given: torch.Tensor) -> None:
        if self.direct:
            _add_grad(member.site.b, torch.mm(low.t(), given).t(), member.site.scaling)
        else:
            _accumulate(member.grad_up, low.t(), given)

    def _add_down(self, members: Sequence[_Member], ranks: slice, slope: torch.Tensor, x: torch.Tensor) -> None:
        """slope: of these members' columns, which are `ranks`."""
        if not self.direct:
            _accumulate(self._grad_down[ranks], slope.t(), x)
            return
        product = torch.mm(slope.t(), x)
        for member in members:
            _add_grad(member.site.a, product[member.ranks.start - ranks.start : member.ranks.stop - ranks.start])

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
            self._add_up(member, low, given)
            self._add_down((member,), member.ranks, slope, dropped)
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
    masks: Masks = field(default_factory=Masks)


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
    parameter.grad.add_(grad, alpha=factor)
