"""Cross-entropy through a frozen output layer, in chunks: the full logits never exist.

The gradient with respect to the hidden states is made in the forward pass, chunk by chunk, since the output layer's
own weights need none. Only supervised tokens come here (the idea of chunked losses: Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch

# 128 rows of a 50,000-word vocabulary are 25 MB, which an allocator still keeps for reuse.
CHUNK = 128


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
