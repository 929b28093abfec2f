"""What the adapters of a batch do at the linear layers of a base, and the hooks that do it.

A forward hook adds the change to a layer's output, a hook before it scales the input; the module tree, its names and
its weights stay as they are. A forward of our own asks `GroupChange` directly, for all layers of one input at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import Unsupported
from .lanes import Deal, shrink


@dataclass(frozen=True)
class Part:
    """The lanes of one rank class at a group of layers.

    Attributes:
        down: [lanes, in, R].
        ups: for each layer of the group (first column of its hidden values, last column + 1, up [lanes, rank, out]), or
            None where no lane changes it.
    """

    deal: Deal
    down: torch.Tensor
    ups: tuple[tuple[int, int, torch.Tensor] | None, ...]


@dataclass(frozen=True)
class GroupChange:
    """What a group of layers with one input does to the rows of a batch.

    Attributes:
        gains: for each layer [rows, out] or [1, out], the factor minus one on the frozen output (DoRA); None without.
        biases: for each layer [rows, out] or [1, out], or None.
        scale: [rows, in] or [1, in], the factor on the input of the layers (IA3); None without. A row whose adapter
            leaves the input alone has ones, so that its own low-rank change reads the input as it is.
    """

    parts: tuple[Part, ...]
    gains: tuple[torch.Tensor | None, ...]
    biases: tuple[torch.Tensor | None, ...]
    scale: torch.Tensor | None = None

    def scale_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the layers multiply, and `apply` is given, in place of their input x [rows, ..., in]."""
        return x if self.scale is None else x * _over_tokens(self.scale, x)

    def apply(self, x: torch.Tensor, outs: Sequence[torch.Tensor], frozen: Sequence[torch.Tensor | None]) -> None:
        """Change the outputs W x of the layers, each [rows, ..., out], in place; x is [rows, ..., in].

        Args:
            frozen: the layers' own biases.
        """
        for out, gain, bias, own in zip(outs, self.gains, self.biases, frozen, strict=True):
            if gain is not None:
                out.addcmul_(_over_tokens(gain, x), out if own is None else out - own)
            if bias is not None:
                out.add_(_over_tokens(bias, x))
        for part in self.parts:
            hidden = shrink(part.deal.take(x), part.down)
            for out, up in zip(outs, part.ups, strict=True):
                if up is not None:
                    start, stop, matrix = up
                    part.deal.add(
                        out, hidden if matrix.shape[1] == hidden.shape[2] else hidden[..., start:stop], matrix
                    )

    def member(self, i: int) -> GroupChange:
        """The change of one layer of the group alone."""
        parts = []
        for part in self.parts:
            up = part.ups[i]
            if up is not None:
                start, stop, matrix = up
                parts.append(Part(part.deal, part.down[..., start:stop], ((0, stop - start, matrix),)))
        return GroupChange(tuple(parts), (self.gains[i],), (self.biases[i],), self.scale)

    def joined(self, other: GroupChange) -> GroupChange:
        """The change of the same layers by the adapters of other rows, too."""
        both = zip((*self.gains, *self.biases), (*other.gains, *other.biases), strict=True)
        sums = [b if a is None else a if b is None else a + b for a, b in both]
        scales = [scale for scale in (self.scale, other.scale) if scale is not None]
        scale = scales[0] * scales[1] if len(scales) == 2 else next(iter(scales), None)
        n = len(self.gains)
        return GroupChange(self.parts + other.parts, tuple(sums[:n]), tuple(sums[n:]), scale)

    def check_rows(self, module: nn.Module, x: torch.Tensor) -> None:
        """Raise Unsupported where a layer's input does not hold the batch row by row, but rows must be told apart."""
        rows = [p.deal.rows for p in self.parts if not (p.deal.lanes == 1 and p.deal.group == p.deal.rows)]
        rows += [t.shape[0] for t in (*self.gains, *self.biases, self.scale) if t is not None and t.shape[0] > 1]
        if any(n != x.shape[0] for n in rows):
            raise Unsupported(
                f"{type(module).__name__} does not see the batch row by row.", "Use one adapter per batch."
            )


def _over_tokens(per_row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[rows, n] -> [rows, 1, ..., n], to broadcast over the dimensions between."""
    return per_row if x.dim() == 2 else per_row.view(per_row.shape[0], *([1] * (x.dim() - 2)), per_row.shape[1])


class SiteHooks:
    """The hooks of one runtime. `plan` says what the sites do now; an empty plan leaves the base bare."""

    def __init__(self) -> None:
        self.plan: Mapping[nn.Module, GroupChange] = {}
        self._handles: dict[nn.Module, Any] = {}
        self._scaling: dict[nn.Module, Any] = {}

    def cover(self, modules: Iterable[nn.Module]) -> None:
        """Hook these modules, once; layers that no adapter ever changed keep their full speed."""
        for module in modules:
            if module not in self._handles:
                self._handles[module] = module.register_forward_hook(self._hook)

    @contextmanager
    def using(self, plan: Mapping[nn.Module, GroupChange]) -> Iterator[None]:
        """Within the block the layers change as `plan` says; after it the base is bare."""
        for module in [m for m, change in plan.items() if change.scale is not None and m not in self._scaling]:
            self._scaling[module] = module.register_forward_pre_hook(self._scale)
        self.plan = plan
        try:
            yield
        finally:
            self.plan = {}

    def remove(self) -> None:
        """Take all hooks away."""
        for handles in (self._handles, self._scaling):
            for handle in handles.values():
                handle.remove()
            handles.clear()

    def _scale(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        change = self.plan.get(module)
        if change is None or change.scale is None:
            return None
        change.check_rows(module, args[0])
        return (change.scale_input(args[0]), *args[1:])

    def _hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        change = self.plan.get(module)
        if change is None:
            return None
        change.check_rows(module, args[0])
        change.apply(args[0], (out,), (getattr(module, "bias", None),))
        return out
