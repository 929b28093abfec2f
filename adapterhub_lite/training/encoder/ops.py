"""What an encoder's layers do between the products, in torch: any device and dtype; native code is tested by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from ..decoder.ops import Parts, TorchOps
from ..dropout import keep_mask


@dataclass(frozen=True)
class Drop:
    """Dropout of tokens in one place.

    Attributes:
        keys, indices: [tokens] int64, the key of each token's row and its index there.
        p: share that is dropped; 0: none.
    """

    keys: torch.Tensor
    indices: torch.Tensor
    salt: int
    p: float


@dataclass(frozen=True)
class Norm:
    """A layer norm; the statistics of its rows go to mean and inverse [tokens, 1]."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Padding:
    """Rows padded to the longest.

    Attributes:
        query_places, key_places: [rows, most] int64, the token at each place; padding names some token.
        query_lines, key_lines: which lines of the padded rows are tokens.
        hidden: [rows, most keys] bool, where padding is, or None.
    """

    query_places: torch.Tensor
    key_places: torch.Tensor
    query_lines: torch.Tensor
    key_lines: torch.Tensor
    hidden: torch.Tensor | None


class Rows:
    """Rows one after another, each with its queries, the last of its tokens or some of them; its keys are all.

    Attributes:
        keys, indices: [queries] int64, as in `Drop`.
        longest: tokens of the longest row.
    """

    def __init__(
        self, queries: Sequence[int], lengths: Sequence[int], keys: torch.Tensor, indices: torch.Tensor
    ) -> None:
        self.keys, self.indices = keys, indices
        self._counts = torch.tensor([queries, lengths])
        self._starts = self._counts.cumsum(1) - self._counts
        self.longest = max(lengths)

    @property
    def begin(self) -> torch.Tensor:
        """int64 [rows + 1], where the queries of each row begin."""
        return F.pad(self._counts[0].cumsum(0), (1, 0))

    @cached_property
    def spans(self) -> torch.Tensor:
        """int64 [rows, 5], see `kernels.training_attention`."""
        before = self._counts[1] - self._counts[0]
        first = self._starts[1]
        columns = [self._starts[0], self._counts[0], first + before, first, before]
        return torch.stack(columns, 1).contiguous().to(self.keys.device)

    @cached_property
    def padding(self) -> Padding:
        """The same rows, padded."""
        places, lines, hidden = [], [], []
        for first, count in zip(self._starts, self._counts, strict=True):
            columns = torch.arange(int(count.max()))
            real = columns < count[:, None]
            places.append((first[:, None] + columns * real).to(self.keys.device))
            lines.append(real.flatten().nonzero()[:, 0].to(self.keys.device))
            hidden.append(~real)
        mask = hidden[1].to(self.keys.device) if bool(hidden[1].any()) else None
        return Padding(places[0], places[1], lines[0], lines[1], mask)


@dataclass(frozen=True)
class Heads:
    """Attention of one layer: `p` of its weights are dropped."""

    count: int
    dim: int
    scaling: float
    salt: int
    p: float


class EncoderOps(TorchOps):
    """Element-wise work and attention of encoders on any device and dtype. Matrices are [tokens, columns]."""

    name = "torch"

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        drop: Drop,
        norm: Norm,
        total: torch.Tensor,
        out: torch.Tensor,
        sums: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """total = x + D(delta), out = its layer norm; `sums` are the mean of each row and 1 / its deviation."""
        if drop.p:
            self.drop(delta, drop.keys, drop.indices, drop.salt, drop.p, delta)
        torch.add(x, delta, out=total)
        wide = sums[0].dtype
        made, mean, inverse = torch.native_layer_norm(
            total.to(wide), norm.weight.shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps
        )
        out.copy_(made)
        sums[0].copy_(mean)
        sums[1].copy_(inverse)

    def norm_back(
        self,
        grad: torch.Tensor,
        total: torch.Tensor,
        norm: Norm,
        sums: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """out = the gradient of `total` from that of its norm; out may be grad."""
        given, x, weight, bias = (t.to(sums[0].dtype) for t in (grad, total, norm.weight, norm.bias))
        made, _, _ = torch.ops.aten.native_layer_norm_backward(
            given, x, weight.shape, *sums, weight, bias, [True, False, False]
        )
        out.copy_(made)

    def gelu(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = x Phi(x)."""
        torch.ops.aten.gelu.out(x, out=out)

    def gelu_back(self, x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        """out = the gradient of x; out may be x or grad."""
        torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out)

    def attend_rows(self, parts: Parts, out: torch.Tensor, log_sum: torch.Tensor, rows: Rows, heads: Heads) -> None:
        """out [queries, heads * dim]; log_sum [queries, heads], the logarithm of each softmax's denominator."""
        q, k, v = _by_heads(parts, rows, heads)
        scores = _scores(q, k, rows, heads)
        wide = scores.to(log_sum.dtype)
        sums = wide.logsumexp(-1, keepdim=True)
        weights = torch.sub(wide, sums).exp_().to(v.dtype)
        kept = _kept(rows, heads, k.shape[2])
        if kept is not None:
            weights = weights.mul_(kept).div_(1 - heads.p)
        torch.index_select(_lines(weights @ v), 0, rows.padding.query_lines, out=out)
        torch.index_select(_lines(sums), 0, rows.padding.query_lines, out=log_sum)

    def attend_rows_back(
        self,
        parts: Parts,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        grad: torch.Tensor,
        grads: Parts,
        rows: Rows,
        heads: Heads,
    ) -> None:
        """Gradients of queries, keys and values from that of `out`, overwriting `grads`."""
        q, k, v = _by_heads(parts, rows, heads)
        sums = _padded(log_sum, rows, heads.count, math.inf)
        weights = torch.sub(_scores(q, k, rows, heads).to(log_sum.dtype), sums).exp_()
        given = _padded(grad, rows, heads.count)
        inner = (given * _padded(out, rows, heads.count)).sum(-1, keepdim=True, dtype=log_sum.dtype)
        kept = _kept(rows, heads, k.shape[2])
        factor = None if kept is None else kept.to(weights.dtype).div_(1 - heads.p)
        slope = (given @ v.transpose(-1, -2)).to(weights.dtype)
        shares = weights
        if factor is not None:
            slope, shares = slope.mul_(factor), weights * factor
        slope = slope.sub_(inner).mul_(weights).mul_(heads.scaling).to(q.dtype)
        made = (slope @ k, slope.transpose(-1, -2) @ q, shares.to(q.dtype).transpose(-1, -2) @ given)
        for one, place, lines in zip(
            made, grads, (rows.padding.query_lines, rows.padding.key_lines, rows.padding.key_lines), strict=True
        ):
            place.copy_(_lines(one).index_select(0, lines))


def _by_heads(parts: Parts, rows: Rows, heads: Heads) -> Parts:
    """Queries, keys and values [rows, heads, most, dim]."""
    places = rows.padding.query_places, rows.padding.key_places, rows.padding.key_places
    made = [
        part[place.flatten()].view(*place.shape, heads.count, heads.dim).transpose(1, 2)
        for part, place in zip(parts, places, strict=True)
    ]
    return made[0], made[1], made[2]


def _scores(q: torch.Tensor, k: torch.Tensor, rows: Rows, heads: Heads) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).mul_(heads.scaling)
    return (
        scores
        if rows.padding.hidden is None
        else scores.masked_fill_(rows.padding.hidden[:, None, None], float("-inf"))
    )


def _kept(rows: Rows, heads: Heads, most: int) -> torch.Tensor | None:
    """Which weights [rows, heads, queries, keys] dropout leaves: the column is key * heads + head."""
    if not heads.p:
        return None
    places = rows.padding.query_places.flatten()
    kept = keep_mask(rows.keys[places], rows.indices[places], heads.salt, most * heads.count, heads.p)
    return kept.view(*rows.padding.query_places.shape, most, heads.count).permute(0, 3, 1, 2)


def _padded(x: torch.Tensor, rows: Rows, heads: int, fill: float = 0.0) -> torch.Tensor:
    """x [queries, heads * n] as [rows, heads, most, n], `fill` where padding is."""
    count, most = rows.padding.query_places.shape
    made = x.new_full((count * most, x.shape[1]), fill)
    made[rows.padding.query_lines] = x
    return made.view(count, most, heads, -1).transpose(1, 2)


def _lines(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads, most, n] -> [rows * most, heads * n]."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1)


def gelu_of(config: object) -> bool:
    """Whether a configuration's activation is the exact one that `EncoderOps.gelu` computes."""
    return getattr(config, "hidden_act", None) == "gelu" or getattr(config, "activation", None) == "gelu"
