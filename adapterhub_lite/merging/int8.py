"""A weight as bitsandbytes stores it in int8 (LLM.int8(), arXiv 2208.07339): whole 127ths of a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .inputs import Inputs

FACTORS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9)
"""Scales that are tried, as shares of a row's largest magnitude; the first is what bitsandbytes takes."""
_LEVELS = 127
_PER_LEVEL = 7.874015718698502e-3  # 1 / 127 as bitsandbytes has it
_ROW = 0  # weight_format: row after row, the only one that is still read


@dataclass(frozen=True)
class Int8:
    """How to quantise; tensors are named below the module, as in a checkpoint.

    Attributes:
        search: try scales; else each row's largest magnitude.
    """

    search: bool = True

    def takes(self, n_in: int) -> bool:
        """Whether layers of so many inputs are quantised: all are."""
        return True

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of the tensors that a weight [out, in] becomes."""
        return {"weight": (torch.int8, shape), "SCB": (torch.float32, shape[:1]), "weight_format": (torch.uint8, ())}

    def quantise(
        self, weight: torch.Tensor, dtype: torch.dtype, inputs: Inputs | None = None
    ) -> tuple[dict[str, torch.Tensor], float]:
        """The tensors of weight [out, in] (float32), and the squared error of rounding by the largest magnitude.

        bitsandbytes rounds to float16 first; here that is left out, so that rounding is one step.

        Args:
            inputs: what the layer reads: errors are weighed by the size of each input.
        """
        weights = torch.ones(weight.shape[1]) if inputs is None else inputs.scales().square()
        most = weight.abs().amax(1)
        best, least = most, _error(weight, most, weights)
        plain = float(_error(weight, most, torch.ones(weight.shape[1])).double().sum())
        for factor in FACTORS[1:] if self.search else ():
            error = _error(weight, most * factor, weights)
            best, least = torch.where(error < least, most * factor, best), torch.minimum(error, least)
        codes = _codes(weight, best).to(torch.int8)
        return {"weight": codes, "SCB": best, "weight_format": torch.tensor(_ROW, dtype=torch.uint8)}, plain

    def dense(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """What bitsandbytes makes of the tensors: [out, in] float32."""
        import bitsandbytes.functional as bnb

        dense: torch.Tensor = bnb.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
        return dense


def _codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    by = torch.where(scales > 0, _LEVELS / scales, 0.0)
    return (weight * by[:, None]).round_().clamp_(-_LEVELS, _LEVELS)


def _error(weight: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of each row [out]."""
    gap = _codes(weight, scales).mul_(scales[:, None] * _PER_LEVEL).sub_(weight)
    return gap.square_() @ weights
