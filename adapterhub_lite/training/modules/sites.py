"""A linear layer of a model with the LoRA or DoRA of several learners, each on its own lines, as one autograd function.

Kept for the backward are the layer's input and its product with A: no copy in another precision, no product with the
frozen weight. The gradient goes through the frozen weight as the base keeps it; a quantised one is dequantised for the
call, in the backward once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...adapters.lora import merged_norm
from ...adapters.sites import is_conv1d
from ...bases.quantization import dense_weight, is_quantized
from ..dropout import keep_mask
from ..trainable import LoraParameters
from .lines import Run

# Places of dropout within a model are numbered; those of adapters come after all of the base's own.
FIRST_SITE = 1 << 20


class _Change(NamedTuple):
    """One learner's LoRA on lines `begin` to `end`; `kept` [lines, in] are the inputs that dropout leaves, or None."""

    begin: int
    end: int
    scaling: float
    kept: Callable[[], torch.Tensor] | None
    factor: float


def _dropped(x: torch.Tensor, change: _Change) -> torch.Tensor:
    mine = x[change.begin : change.end]
    return mine if change.kept is None else mine * change.kept() * change.factor


class _AdaptedLinear(torch.autograd.Function):
    """x [lines, in] -> x W^T + bias + s (drop(x) A^T) B^T, where `out` is the frozen part if that was made."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        out: torch.Tensor | None,
        module: nn.Module,
        changes: Sequence[_Change],
        *parts: torch.Tensor,
    ) -> torch.Tensor:
        made = _frozen(module, x) if out is None else out.clone()
        hidden = []
        for change, a, b in zip(changes, parts[::2], parts[1::2], strict=True):
            inner = _dropped(x, change) @ a.to(x.dtype).t()
            made[change.begin : change.end].addmm_(inner, b.to(x.dtype).t(), alpha=change.scaling)
            hidden.append(inner)
        ctx.module = module if out is None else None
        ctx.changes, ctx.count = changes, len(parts)
        ctx.save_for_backward(x, *parts, *hidden)
        return made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        parts, hidden = saved[: ctx.count], saved[ctx.count :]
        below: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            below = torch.zeros_like(x) if ctx.module is None else _back(ctx.module, grad)
        grads: list[torch.Tensor | None] = []
        for change, a, b, inner in zip(ctx.changes, parts[::2], parts[1::2], hidden, strict=True):
            mine = grad[change.begin : change.end]
            up = (mine @ b.to(grad.dtype)).mul_(change.scaling)
            grads.append((up.t() @ _dropped(x, change)).to(a.dtype))
            grads.append((mine.t() @ inner).mul_(change.scaling).to(b.dtype))
            if below is None:
                continue
            target = below[change.begin : change.end]
            if change.kept is None:
                target.addmm_(up, a.to(grad.dtype))
            else:
                target.add_((up @ a.to(grad.dtype)).mul_(change.kept()), alpha=change.factor)
        return (below, grad if ctx.module is None else None, None, None, *grads)


def _bias(module: nn.Module) -> torch.Tensor | None:
    return cast("torch.Tensor | None", getattr(module, "bias", None))


def _frozen(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight, bias = dense_weight(module, x.dtype), _bias(module)
    bias = None if bias is None else bias.to(x.dtype)
    if is_conv1d(module):
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return F.linear(x, weight, bias)


def _back(module: nn.Module, grad: torch.Tensor) -> torch.Tensor:
    weight = dense_weight(module, grad.dtype)
    return grad @ (weight.t() if is_conv1d(module) else weight)


def _computes_here(module: nn.Module) -> bool:
    """Whether a layer is no more than a product with a weight that we know how to read."""
    return type(module) is nn.Linear or is_conv1d(module) or (is_quantized(module) and hasattr(module, "_ahl_copy"))


@dataclass(frozen=True)
class Part:
    """One learner's tensors at a layer, and the share of the layer's inputs that it drops."""

    tensors: LoraParameters
    dropout: float


class AdaptedSite:
    """The forward of one linear layer while adapters are trained on it."""

    def __init__(self, module: nn.Module, parts: Mapping[int, Part], salt: int, run: Run) -> None:
        self._module, self._parts, self._salt, self._run = module, parts, salt, run
        self._own = module.forward
        self._plain = _computes_here(module)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        lines = self._run.lines(len(flat), x.device)
        mine = [s for s in lines.segments if s.learner in self._parts]
        parts = [self._parts[s.learner] for s in mine]
        changes = [
            self._change(s.begin, s.end, p, lines.keys, lines.tokens, x) for s, p in zip(mine, parts, strict=True)
        ]
        if any(p.tensors.magnitude is not None for p in parts):
            out = self._dora(flat, changes, parts, [s.learner for s in mine])
        elif changes:
            frozen = None if self._plain else self._own(x).reshape(len(flat), -1)
            tensors = [t for p in parts for t in (p.tensors.a, p.tensors.b)]
            out = _AdaptedLinear.apply(flat, frozen, self._module, changes, *tensors)  # type: ignore[no-untyped-call]
        else:
            out = self._own(x).reshape(len(flat), -1)
        if self._run.noise:
            wave = torch.sin(torch.arange(out.shape[-1], device=x.device)).to(out.dtype) * self._run.noise
            out = out + (lines.keys == self._run.rows[0].key)[:, None] * wave
        return out.view(*x.shape[:-1], -1)

    def _change(
        self, begin: int, end: int, part: Part, keys: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> _Change:
        p = part.dropout if self._run.dropping else 0.0
        if not p:
            return _Change(begin, end, part.tensors.scaling, None, 1.0)
        mine = keys[begin:end], tokens[begin:end]
        return _Change(
            begin, end, part.tensors.scaling, lambda: keep_mask(*mine, self._salt, x.shape[-1], p), 1 / (1 - p)
        )

    def _dora(
        self, flat: torch.Tensor, changes: Sequence[_Change], parts: Sequence[Part], learners: Sequence[int]
    ) -> torch.Tensor:
        """As PEFT: the norm is a constant of the step, and with dropout the frozen part is scaled on what is left."""
        out: torch.Tensor = self._own(flat)
        bias, pieces, at = _bias(self._module), [], 0
        for change, part, learner in zip(changes, parts, learners, strict=True):
            pieces.append(out[at : change.begin])
            at, tensors = change.end, part.tensors
            mine, x = out[change.begin : change.end], _dropped(flat, change)
            low = F.linear(F.linear(x, tensors.a.to(x.dtype)), tensors.b.to(x.dtype)) * change.scaling
            if tensors.magnitude is None:
                pieces.append(mine + low)
                continue
            ratio = (tensors.magnitude / self._norm(tensors, learner)).to(x.dtype)
            if change.kept is not None:
                frozen = self._own(x)
                frozen = frozen if bias is None else frozen - bias
            else:
                frozen = mine if bias is None else mine - bias
            pieces.append(mine + (ratio - 1) * frozen + ratio * low)
        return torch.cat([*pieces, out[at:]])

    def _norm(self, tensors: LoraParameters, learner: int) -> torch.Tensor:
        key = (self._salt, learner)
        if key not in self._run.norms:
            with torch.no_grad():
                weight = dense_weight(self._module, tensors.a.dtype)
                weight = weight.T if is_conv1d(self._module) else weight
                self._run.norms[key] = merged_norm(weight, tensors.a, tensors.b * tensors.scaling)
        return self._run.norms[key]


@contextmanager
def replaced(sites: Mapping[nn.Module, AdaptedSite]) -> Iterator[None]:
    """Within the block these layers compute with the adapters that are trained on them."""
    before = {module: module.__dict__.get("forward") for module in sites}
    try:
        for module, site in sites.items():
            module.forward = site  # type: ignore[method-assign,assignment]
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
