"""Apply the low-rank changes of a batch at the linear layers of a base.

A forward hook adds the change to a layer's output; the module tree, its names and its weights stay as they are. All
adapters of a batch are one stacked LoRA: down [R, in] and up [R, out] hold every active adapter's ranks, and a mask
keeps for each row the ranks of its own adapter. Three operations a site, however many adapters are mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import Unsupported


@dataclass(frozen=True)
class SiteBatch:
    """What one site does to the rows of a batch.

    Attributes:
        down: [R, in], the stacked A matrices.
        up: [R, out], the stacked B matrices transposed, scales folded in.
        drop: [rows, R], True where a rank is not the row's own; None when all rows share every rank.
        gain: [rows, out] or [1, out], DoRA's factor minus one on the frozen output; None without DoRA.
        bias: [rows, out] or [1, out], or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    drop: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> SiteBatch:
        """The same for a part of the rows."""
        drop = None if self.drop is None else self.drop[rows]
        gain = self.gain if self.gain is None or self.gain.shape[0] == 1 else self.gain[rows]
        bias = self.bias if self.bias is None or self.bias.shape[0] == 1 else self.bias[rows]
        return SiteBatch(self.down, self.up, drop, gain, bias)

    def apply(self, module: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out = W x [rows, ..., out] -> the adapted output; changes `out` in place."""
        per_row = [t for t in (self.drop, self.gain, self.bias) if t is not None and t.shape[0] > 1]
        if any(t.shape[0] != x.shape[0] for t in per_row):
            raise Unsupported(
                f"{type(module).__name__} does not see the batch row by row.", "Use one adapter per batch."
            )
        hidden = F.linear(x, self.down)
        if self.drop is not None:
            hidden.masked_fill_(_over_tokens(self.drop, x), 0.0)
        if self.gain is not None:
            bias = getattr(module, "bias", None)
            frozen = out if bias is None else out - bias
            out = out + _over_tokens(self.gain, x) * frozen
        if self.bias is not None:
            out = out + _over_tokens(self.bias, x)
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(hidden.view(-1, hidden.shape[-1]), self.up)
        return out


def _over_tokens(per_row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[rows, n] -> [rows, 1, ..., n], to broadcast over the dimensions between."""
    return per_row if x.dim() == 2 else per_row.view(per_row.shape[0], *([1] * (x.dim() - 2)), per_row.shape[1])


class SiteHooks:
    """The hooks of one runtime. `plan` says what the sites do now; an empty plan leaves the base bare."""

    def __init__(self) -> None:
        self.plan: Mapping[nn.Module, SiteBatch] = {}
        self._handles: dict[nn.Module, Any] = {}

    def cover(self, modules: Iterable[nn.Module]) -> None:
        """Hook these modules, once; layers that no adapter ever changed keep their full speed."""
        for module in modules:
            if module not in self._handles:
                self._handles[module] = module.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        site = self.plan.get(module)
        return None if site is None else site.apply(module, args[0], out)
