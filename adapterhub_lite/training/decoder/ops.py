"""What a decoder's layers do between the products, in torch: any device and dtype, and what native code is tested by.

All write into memory that they are given. Norms, softmax and losses are formed in float32 at least, as transformers
does, and rounded where it rounds.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from ..dropout import keep_mask


class Ops(Protocol):
    """Element-wise work and attention. Rows are tokens; matrices are [rows, columns]."""

    name: str

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, inverse: torch.Tensor
    ) -> None:
        """out = weight * x / rms(x); inverse [rows] = 1 / rms(x)."""

    def add_rms_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        total: torch.Tensor,
        out: torch.Tensor,
        inverse: torch.Tensor,
    ) -> None:
        """total = x + delta, and `rms_norm` of it; total may be x."""

    def rms_norm_back(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        inverse: torch.Tensor,
        out: torch.Tensor,
        add: bool,
    ) -> None:
        """The gradient of x from that of the normed, written to `out` or added to it."""

    def swiglu(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out = silu(gate) * up, for gate and up side by side."""

    def swiglu_back(self, gate_up: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        """gate_up becomes its own gradient; out = silu(gate) * up once more."""

    def rotate(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], back: bool) -> None:
        """Turn the heads of x [rows, heads, dim], a view, in place; turns: cos, sin [rows, dim / 2]."""

    def attend(
        self, parts: Parts, out: torch.Tensor, log_sum: torch.Tensor, spans: torch.Tensor, shape: AttentionShape
    ) -> None:
        """out [rows, heads * dim] and log_sum [rows, heads], the logarithm of each softmax's denominator."""

    def attend_back(
        self,
        parts: Parts,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        grad: torch.Tensor,
        grads: Parts,
        spans: torch.Tensor,
        shape: AttentionShape,
    ) -> None:
        """Gradients of queries, keys and values from that of `out`, overwriting `grads`."""

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """losses [rows]; logits become their gradient."""

    def drop(
        self, x: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, salt: int, p: float, out: torch.Tensor
    ) -> None:
        """out = x where `keep_mask` keeps it, scaled by 1 / (1 - p), else 0; out may be x."""


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [tokens, heads * dim], keys and values [key rows, kv_heads * dim]: views of wider matrices."""


class AttentionShape:
    """What is the same for all spans of a layer."""

    def __init__(self, heads: int, kv_heads: int, dim: int, scaling: float, window: int | None) -> None:
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.scaling, self.window = scaling, window


class TorchOps:
    """`Ops` on any device and dtype."""

    name = "torch"

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, inverse: torch.Tensor
    ) -> None:
        """See `Ops`."""
        wide = x.to(inverse.dtype)
        torch.rsqrt(wide.square().mean(-1) + eps, out=inverse)
        torch.mul((wide * inverse[..., None]).to(x.dtype), weight, out=out)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        total: torch.Tensor,
        out: torch.Tensor,
        inverse: torch.Tensor,
    ) -> None:
        """See `Ops`."""
        torch.add(x, delta, out=total)
        self.rms_norm(total, weight, eps, out, inverse)

    def rms_norm_back(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        inverse: torch.Tensor,
        out: torch.Tensor,
        add: bool,
    ) -> None:
        """See `Ops`."""
        slope = (grad * weight).to(inverse.dtype)
        normed = x.to(inverse.dtype) * inverse[..., None]
        slope -= normed * (slope * normed).mean(-1, keepdim=True)
        slope *= inverse[..., None]
        if add:
            out += slope.to(out.dtype)
        else:
            out.copy_(slope)

    def swiglu(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """See `Ops`."""
        gate, up = gate_up.chunk(2, -1)
        torch.mul(F.silu(gate), up, out=out)

    def swiglu_back(self, gate_up: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        """See `Ops`."""
        gate, up = gate_up.chunk(2, -1)
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        open_ = wide.sigmoid()
        active = (wide * open_).to(gate.dtype)
        torch.mul(active, up, out=out)
        slope = open_ * (1 + wide * (1 - open_))
        gate.copy_((grad * up).to(slope.dtype).mul_(slope))
        torch.mul(grad, active, out=up)

    def rotate(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], back: bool) -> None:
        """See `Ops`."""
        cos, sin = turns[0][:, None], turns[1][:, None]
        first, second = x.chunk(2, -1)
        kept = first.clone()
        sign = 1 if back else -1
        first.mul_(cos).addcmul_(second, sin, value=sign)
        second.mul_(cos).addcmul_(kept, sin, value=-sign)

    def attend(
        self, parts: Parts, out: torch.Tensor, log_sum: torch.Tensor, spans: torch.Tensor, shape: AttentionShape
    ) -> None:
        """See `Ops`."""
        for first, count, seen in _seen(spans):
            queries, keys, values = _heads(parts, first, count, seen, shape)
            scores = _scores(queries, keys, len(seen) - count, shape)
            sums = scores.logsumexp(-1)
            shares = (scores - sums[..., None]).exp().to(out.dtype)
            out[first : first + count] = (shares @ values).permute(2, 0, 1, 3).reshape(count, -1)
            log_sum[first : first + count] = sums.permute(2, 0, 1).reshape(count, -1)

    def attend_back(
        self,
        parts: Parts,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        grad: torch.Tensor,
        grads: Parts,
        spans: torch.Tensor,
        shape: AttentionShape,
    ) -> None:
        """See `Ops`."""
        for whole in grads:
            whole.zero_()
        for first, count, seen in _seen(spans):
            queries, keys, values = _heads(parts, first, count, seen, shape)
            scores = _scores(queries, keys, len(seen) - count, shape)
            own = slice(first, first + count)
            sums = log_sum[own].view(count, shape.kv_heads, -1).permute(1, 2, 0)
            shares = (scores - sums[..., None]).exp()
            given = grad[own].view(count, shape.kv_heads, -1, shape.dim).permute(1, 2, 0, 3)
            slope = (given @ values.transpose(-1, -2)).to(shares.dtype)
            # The sum over keys of share * slope, for each query (FlashAttention, arXiv 2205.14135, appendix B).
            mean = (given * out[own].view(count, shape.kv_heads, -1, shape.dim).permute(1, 2, 0, 3)).to(shares.dtype)
            slope = (shares * (slope - mean.sum(-1, keepdim=True)) * shape.scaling).to(grad.dtype)
            grads[0][own] += (slope @ keys).permute(2, 0, 1, 3).reshape(count, -1)
            of_keys = (slope.transpose(-1, -2) @ queries).sum(1).transpose(0, 1).reshape(len(seen), -1)
            of_values = (shares.to(grad.dtype).transpose(-1, -2) @ given).sum(1).transpose(0, 1).reshape(len(seen), -1)
            grads[1].index_add_(0, seen, of_keys)
            grads[2].index_add_(0, seen, of_values)

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """See `Ops`."""
        wide = logits.to(losses.dtype)
        sums = wide.logsumexp(-1, keepdim=True)
        torch.sub(sums[:, 0], wide.gather(1, targets[:, None])[:, 0], out=losses)
        slope = torch.sub(wide, sums, out=wide).exp_()
        slope.scatter_add_(1, targets[:, None], slope.new_full((len(targets), 1), -1.0))
        if slope.data_ptr() != logits.data_ptr():
            logits.copy_(slope)

    def drop(
        self, x: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, salt: int, p: float, out: torch.Tensor
    ) -> None:
        """See `Ops`."""
        kept = keep_mask(keys, tokens, salt, x.shape[1], p)
        torch.mul(x, kept.to(x.dtype).div_(1 - p), out=out)


def _seen(spans: torch.Tensor) -> list[tuple[int, int, torch.Tensor]]:
    """(first query, queries, rows of the keys in the order of their positions) of each span."""
    found = []
    for query, count, own, context, before in spans.tolist():
        keys = torch.cat([torch.arange(context, context + before), torch.arange(own, own + count)])
        found.append((query, count, keys.to(spans.device)))
    return found


def _heads(
    parts: Parts, first: int, count: int, seen: torch.Tensor, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [kv_heads, group, count, dim]; keys and values [kv_heads, 1, seen, dim]."""
    queries = parts[0][first : first + count].reshape(count, shape.kv_heads, -1, shape.dim).permute(1, 2, 0, 3)
    keys, values = (p[seen].view(len(seen), shape.kv_heads, 1, shape.dim).permute(1, 2, 0, 3) for p in parts[1:])
    return queries, keys, values


def _scores(queries: torch.Tensor, keys: torch.Tensor, before: int, shape: AttentionShape) -> torch.Tensor:
    """Scaled and masked, in float32 at least [kv_heads, group, queries, keys]."""
    scores = (queries @ keys.transpose(-1, -2)).to(torch.promote_types(queries.dtype, torch.float32)) * shape.scaling
    places = torch.arange(keys.shape[2], device=keys.device)
    distance = before + torch.arange(queries.shape[2], device=keys.device)[:, None] - places
    hidden = distance < 0 if shape.window is None else (distance < 0) | (distance >= shape.window)
    return scores.masked_fill_(hidden, float("-inf"))
