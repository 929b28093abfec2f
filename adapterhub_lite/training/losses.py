"""Cross-entropy through a frozen output layer, in chunks: the full logits never exist.

The gradient with respect to the hidden states is made in the forward pass, chunk by chunk, since the output layer's
own weights need none. Only supervised tokens come here (the idea of chunked losses: Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .decoder.ops import Ops
    from .memory.buffers import Buffers

# 128 rows of a 50,000-word vocabulary are 25 MB, which an allocator still keeps for reuse.
CHUNK = 128
# More rows at once make faster products with the output layer: 512 of a vocabulary of 50,000 by a seventh over 128.
LOGITS_BYTES = 96 * 2**20


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grads = []
        for rows, wanted in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            logits = torch.nn.functional.linear(rows, weight, bias).to(total.dtype)
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, wanted[:, None])).sum()
            if ctx.needs_input_grad[0]:
                slope = logits.sub_(normaliser).exp_()
                slope[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
                grads.append(slope.to(rows.dtype) @ weight)
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * grad.to(slope.dtype), None, None, None


def frozen_head_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden W^T + b).

    Args:
        hidden: [tokens, width].
        weight, bias: [vocabulary, width] and [vocabulary], frozen.
        targets: [tokens], token ids.
    """
    result: torch.Tensor = _FrozenHeadCrossEntropy.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return result


def head_losses(
    hidden: torch.Tensor,
    head: tuple[torch.Tensor, torch.Tensor | None],
    targets: torch.Tensor,
    tools: tuple[Ops, Buffers],
    gradients: bool,
) -> torch.Tensor:
    """The cross-entropy of each token [tokens], in memory that is reused.

    Args:
        hidden: [tokens, width]; becomes the gradient of the summed losses with respect to itself, if `gradients`.
        head: weight [vocabulary, width] and bias, frozen.
    """
    ops, buffers = tools
    weight, bias = head
    count = len(targets)
    losses = buffers("losses", count, 1, torch.promote_types(hidden.dtype, torch.float32))[:, 0]
    most = max(LOGITS_BYTES // (len(weight) * weight.itemsize), 1)
    rows_each = -(-count // -(-count // most))  # chunks of like size: a small last one would be slow
    whole = buffers("logits", rows_each, len(weight))
    for first in range(0, count, rows_each):
        end = min(first + rows_each, count)
        logits, rows = whole[: end - first], hidden[first:end]
        if bias is None:
            torch.mm(rows, weight.t(), out=logits)
        else:
            torch.addmm(bias, rows, weight.t(), out=logits)
        ops.cross_entropy(logits, targets[first:end], losses[first:end])
        if gradients:
            torch.mm(logits, weight, out=rows)
    return losses
