"""What a decoder's layers do between the products, on CUDA: FlashAttention over ragged rows, and no large temporaries.

Attention is one call for all spans of a pack, whatever each may see: the keys of a span's context and its own are laid
one after another, and a causal mask that is aligned at the bottom right (arXiv 2307.08691, as of its version 2.1) lets
each query see all of its context and its own past. The kernels are those that torch brings
(`torch.nn.attention.varlen`); they are tried on a small pack before they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..memory.scratch import SPARING, TEMPORARY, blocks
from .ops import AttentionShape, Parts, TorchOps

DTYPES = (torch.bfloat16, torch.float16)
# How many times the tokens of a pack the keys that are gathered for one call may be, and the least that may be.
_MORE_KEYS, _LEAST_KEYS = 4, 16384
_BOUND = 0.02  # of the largest value, as bfloat16 rounds shares and sums; the check's own float32 is exact beside it

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Call:
    """Neighbouring spans that one call of the kernel attends.

    Attributes:
        first, end: their queries.
        starts: where each span's queries begin, and the end [spans + 1] int32; `key_starts` of its keys.
        longest, longest_keys: tokens of the longest span, and keys.
        keys: rows of the keys; a slice where they stand one after another already.
    """

    first: int
    end: int
    starts: torch.Tensor
    key_starts: torch.Tensor
    longest: int
    longest_keys: int
    keys: slice | torch.Tensor


def calls_of(spans: list[list[int]], device: torch.device) -> list[Call]:
    """The calls for all spans; each a (first query, queries, first own key, first context key, context keys)."""
    if not any(before for *_, before in spans):
        first = spans[0][2]
        return [_call(spans, slice(first, first + sum(count for _, count, *_ in spans)), device)]
    most = max(_LEAST_KEYS, _MORE_KEYS * sum(count for _, count, *_ in spans))
    groups: list[list[list[int]]] = [[]]
    used = 0
    for span in spans:
        keys = span[1] + span[4]
        if groups[-1] and used + keys > most:
            groups.append([])
            used = 0
        groups[-1].append(span)
        used += keys
    return [_call(group, _rows(group, device), device) for group in groups]


def _call(spans: list[list[int]], keys: slice | torch.Tensor, device: torch.device) -> Call:
    counts, seen = [span[1] for span in spans], [span[1] + span[4] for span in spans]
    starts, key_starts = (
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (counts, seen)
    )
    first = spans[0][0]
    return Call(first, first + sum(counts), starts, key_starts, max(counts), max(seen), keys)


def _rows(spans: list[list[int]], device: torch.device) -> torch.Tensor:
    rows: list[int] = []
    for _, count, own, context, before in spans:
        rows += [*range(context, context + before), *range(own, own + count)]
    return torch.tensor(rows, dtype=torch.long, device=device)


def flash_forward(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: Call, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's output [queries, heads, dim] and log-sum-exp [heads, queries] by torch's own kernel."""
    causal, left = _mask(shape)
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        queries, keys, values, call.starts, call.key_starts, call.longest, call.longest_keys, 0.0, causal, False,
        scale=shape.scaling, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return out, sums


def flash_backward(
    grad: torch.Tensor,
    parts: Parts,
    out: torch.Tensor,
    sums: torch.Tensor,
    call: Call,
    shape: AttentionShape,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries [queries, heads, dim], keys and values [keys, kv_heads, dim]."""
    causal, left = _mask(shape)
    state = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # of dropout, which there is none of
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
        grad, *parts, out, sums, call.starts, call.key_starts, call.longest, call.longest_keys, 0.0, causal,
        state, torch.empty(0, device=grad.device), scale=shape.scaling, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return found


def _mask(shape: AttentionShape) -> tuple[bool, int]:
    """Whether the call is causal, and how many keys before its own place a query sees (-1: all)."""
    return (True, -1) if shape.window is None else (False, shape.window - 1)


class CudaOps(TorchOps):
    """`Ops` on CUDA in bfloat16 or float16; `forward` and `backward` compute attention.

    Attributes:
        note: what a person should know of how this computes, or None.
    """

    name = "cuda"

    def __init__(
        self,
        forward: Forward | None = flash_forward,
        backward: Backward | None = flash_backward,
        note: str | None = None,
    ) -> None:
        self._flash_forward, self._flash_backward, self.note = forward, backward, note
        self._spans: torch.Tensor | None = None
        self._calls: list[Call] = []
        self.temporary = TEMPORARY

    def sparing(self) -> CudaOps:
        """The same with smaller temporaries and more launches."""
        found = copy(self)
        found.temporary = SPARING
        return found

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, inverse: torch.Tensor
    ) -> None:
        """See `Ops`."""
        for rows in self._blocks(x):
            super().rms_norm(x[rows], weight, eps, out[rows], inverse[rows])

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
        for rows in self._blocks(x):
            super().rms_norm_back(grad[rows], x[rows], weight, inverse[rows], out[rows], add)

    def swiglu(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """See `Ops`."""
        for rows in self._blocks(out):
            super().swiglu(gate_up[rows], out[rows])

    def swiglu_back(self, gate_up: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> None:
        """See `Ops`."""
        for rows in self._blocks(grad):  # out may be grad
            gate, up = gate_up[rows].chunk(2, -1)
            wide = gate.to(torch.promote_types(gate.dtype, torch.float32), copy=True)
            open_ = wide.sigmoid()
            active = wide.mul_(open_).to(gate.dtype, copy=True)
            wide.addcmul_(wide, open_, value=-1).add_(open_)  # SiLU's slope: open + silu - silu * open
            del open_
            gate.copy_(wide.mul_(grad[rows] * up))
            made = active * up
            torch.mul(grad[rows], active, out=up)
            out[rows].copy_(made)

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """See `Ops`."""
        for rows in self._blocks(logits):
            super().cross_entropy(logits[rows], targets[rows], losses[rows])

    def drop(
        self, x: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, salt: int, p: float, out: torch.Tensor
    ) -> None:
        """See `Ops`."""
        for rows in self._blocks(x, 8):  # the hash counts in int64
            super().drop(x[rows], keys[rows], tokens[rows], salt, p, out[rows])

    def attend(
        self, parts: Parts, out: torch.Tensor, log_sum: torch.Tensor, spans: torch.Tensor, shape: AttentionShape
    ) -> None:
        """See `Ops`."""
        if self._flash_forward is None:
            super().attend(parts, out, log_sum, spans, shape)
            return
        for call in self._calls_of(spans):
            own = slice(call.first, call.end)
            found, sums = self._flash_forward(*_gathered(parts, call, shape), call, shape)
            out[own].copy_(found.flatten(1))
            log_sum[own].copy_(sums.t())

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
        if self._flash_backward is None:
            super().attend_back(parts, out, log_sum, grad, grads, spans, shape)
            return
        calls = self._calls_of(spans)
        wide = None
        if any(isinstance(call.keys, torch.Tensor) for call in calls):
            # Keys of a context have gradients from many spans: their sum is formed in float32 and rounded once.
            wide = [torch.zeros(part.shape, dtype=log_sum.dtype, device=part.device) for part in grads[1:]]
        for call in calls:
            own = slice(call.first, call.end)
            found = self._flash_backward(
                _by_head(grad[own], shape), _gathered(parts, call, shape), _by_head(out[own], shape),
                log_sum[own].t().contiguous(), call, shape,
            )  # fmt: skip
            grads[0][own].copy_(found[0].flatten(1))
            if isinstance(call.keys, slice):
                grads[1][call.keys].copy_(found[1].flatten(1))
                grads[2][call.keys].copy_(found[2].flatten(1))
                continue
            assert wide is not None
            for sums, some in zip(wide, found[1:], strict=True):
                sums.index_add_(0, call.keys, some.flatten(1).to(sums.dtype))
        for part, sums in zip(grads[1:], wide or (), strict=False):
            part.copy_(sums)

    def _blocks(self, x: torch.Tensor, itemsize: int = 4) -> list[slice]:
        return blocks(x, self.temporary, itemsize)

    def _calls_of(self, spans: torch.Tensor) -> list[Call]:
        """Those of a pack, made once for all its layers."""
        if self._spans is not spans:
            self._calls, self._spans = calls_of(spans.tolist(), spans.device), spans
        return self._calls


def _gathered(parts: Parts, call: Call, shape: AttentionShape) -> Parts:
    """Queries, keys and values of a call [rows, heads, dim], views where they stand one after another."""
    keys, values = (
        part[call.keys] if isinstance(call.keys, slice) else part.index_select(0, call.keys) for part in parts[1:]
    )
    return _by_head(parts[0][call.first : call.end], shape), _by_head(keys, shape), _by_head(values, shape)


def _by_head(x: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    return x.view(len(x), -1, shape.dim)


def cuda_ops(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> CudaOps:
    """Ops of a CUDA device: with FlashAttention where it gives what plain attention gives, else with a note."""
    if dtype not in DTYPES:
        return CudaOps(None, None, f"attention is computed row by row: FlashAttention does not compute in {dtype}")
    reason = unlike(CudaOps(), shape, device, dtype)
    if reason is None:
        return CudaOps()
    return CudaOps(None, None, f"attention is computed row by row, which is slow: FlashAttention {reason}")


def unlike(ops: CudaOps, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with attention of `ops` on a small pack with a context and, where there is one, a window."""
    try:
        for window in {None, None if shape.window is None else min(shape.window, 9)}:
            for spans in (
                [[0, 40, 0, 0, 0], [40, 29, 40, 0, 0]],
                [[0, 40, 3, 0, 3], [40, 1, 43, 3, 40], [41, 28, 44, 3, 40]],
            ):
                small = AttentionShape(shape.heads, shape.kv_heads, shape.dim, shape.scaling, window)
                worst = _difference(ops, torch.tensor(spans, device=device), small, dtype)
                if not worst <= _BOUND:
                    return f"is wrong by {worst:.2g} of the largest value"
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        return f"does not run here ({(str(error).splitlines() or [type(error).__name__])[0][:120]})"
    return None


def _difference(ops: CudaOps, spans: torch.Tensor, shape: AttentionShape, dtype: torch.dtype) -> float:
    """The largest difference from plain attention in float32, as a share of each result's largest value."""
    generator = torch.Generator().manual_seed(0)
    device, before = spans.device, int(spans[0, 2])
    queries, keys = shape.heads * shape.dim, shape.kv_heads * shape.dim
    count = int(spans[-1, 0] + spans[-1, 1])
    whole = torch.randn(before + count, queries + 2 * keys, generator=generator).to(device, dtype)
    given = torch.randn(count, queries, generator=generator).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    ours = _results(ops, whole, given, spans, shape)
    theirs = _results(TorchOps(), whole.to(wide), given.to(wide), spans, shape)
    return max(
        float((a.to(wide) - b).abs().max()) / max(float(b.abs().max()), 1e-30)
        for a, b in zip(ours, theirs, strict=True)
    )


def _results(
    ops: TorchOps, whole: torch.Tensor, given: torch.Tensor, spans: torch.Tensor, shape: AttentionShape
) -> list[torch.Tensor]:
    """Output, log-sums and gradients; of views of one wide matrix, as layers have them."""
    count, before = len(given), len(whole) - len(given)
    ends = shape.heads * shape.dim, (shape.heads + shape.kv_heads) * shape.dim

    def split(x: torch.Tensor) -> Parts:
        return x[before:, : ends[0]], x[:, ends[0] : ends[1]], x[:, ends[1] :]

    out, grads = torch.empty_like(given), torch.zeros_like(whole)
    wide = torch.promote_types(given.dtype, torch.float32)
    sums = torch.empty(count, shape.heads, dtype=wide, device=given.device)
    ops.attend(split(whole), out, sums, spans, shape)
    ops.attend_back(split(whole), out, sums, given, split(grads), spans, shape)
    return [out, sums, *split(grads)]
