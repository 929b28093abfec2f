"""AdamW on one flat buffer: a learner's parameters, gradients and moments each lie in one tensor (arXiv 1711.05101)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

_ALIGNMENT = 64
"""Bytes; products read a matrix fastest where a cache line begins, and always at the same place of one."""


class FlatAdamW:
    """The optimiser of one learner.

    The parameters become views of `values` and their `.grad` views of `gradients`, so that clipping, the update and a
    checkpoint are a few operations whatever the number of tensors. The update is torch's fused AdamW on the whole
    buffer; what fills a view up to a multiple of 64 bytes stays 0.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float) -> None:
        first = parameters[0]
        self._parameters = list(parameters)
        self._spans: list[tuple[int, int]] = []
        step, end = _ALIGNMENT // first.element_size(), 0
        for parameter in parameters:
            self._spans.append((end, end + parameter.numel()))
            end += math.ceil(parameter.numel() / step) * step
        self.values = nn.Parameter(torch.zeros(end, dtype=first.dtype, device=first.device))
        self.gradients = torch.zeros_like(self.values)
        with torch.no_grad():
            for parameter, view in zip(self._parameters, self._views(self.values.data), strict=True):
                parameter.data = view.copy_(parameter)
        self._gradient_views = self._views(self.gradients)
        self._optimizer = torch.optim.AdamW([self.values], lr=0.0, weight_decay=weight_decay, fused=True)
        self.clear()

    def clear(self) -> None:
        """Set all gradients to 0, as views of one buffer."""
        self.gradients.zero_()
        for parameter, view in zip(self._parameters, self._gradient_views, strict=True):
            parameter.grad = view

    def mean(self, count: int) -> float:
        """Make the summed gradients the mean over `count` items; returns their norm."""
        for parameter, view in zip(self._parameters, self._gradient_views, strict=True):
            if (
                parameter.grad is not None
                and parameter.grad is not view
                and parameter.grad.data_ptr() != view.data_ptr()
            ):
                view.copy_(parameter.grad)  # somebody gave it a gradient of its own
        self.gradients.div_(count)
        return float(torch.linalg.vector_norm(self.gradients))

    def step(self, rate: float, norm: float, max_norm: float) -> None:
        """Clip gradients of this norm as `torch.nn.utils.clip_grad_norm_` does, and make one update."""
        share = max_norm / (norm + 1e-6)
        if share < 1:
            self.gradients.mul_(share)
        self.values.grad = self.gradients
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and both moments, flat; not copies."""
        state = self._optimizer.state[self.values]
        moments = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
        found = {name: state[key] if state else torch.zeros_like(self.values.detach()) for name, key in moments.items()}
        return {"parameters": self.values.detach(), **found}

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Go on from `tensors()` after so many updates.

        Raises:
            ValueError: they are not of this learner's size and dtype.
        """
        for name in ("parameters", "first_moment", "second_moment"):
            found = tensors[name]
            if found.shape != self.values.shape or found.dtype != self.values.dtype:
                raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {list(self.values.shape)}")
        self.set_values(tensors["parameters"])
        device = self.values.device
        self._optimizer.state[self.values] = {
            "step": torch.tensor(float(steps), dtype=torch.float32, device=device),
            "exp_avg": tensors["first_moment"].to(device, copy=True),
            "exp_avg_sq": tensors["second_moment"].to(device, copy=True),
        }

    def set_values(self, values: torch.Tensor) -> None:
        """Give all parameters other values."""
        with torch.no_grad():
            self.values.copy_(values)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self._parameters, self._spans, strict=True)
        return [flat[begin:end].view(parameter.shape) for parameter, (begin, end) in pairs]
