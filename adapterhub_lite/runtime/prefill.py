"""Read the prompts of rows into a new window: one forward over all their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..bases.inputs import pad_rows
from .batch import BatchPlan
from .window import Window

if TYPE_CHECKING:
    from .decoder import Decoder


def prefill(
    decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan
) -> tuple[torch.Tensor, Window, torch.Tensor]:
    """Next-token logits [rows, vocabulary], the window that holds prefixes and prompts, and the next positions [rows].

    Prompts are padded on the left. The columns of prefixes come before those of all prompts, so that a short prompt
    leaves a gap between the two; the mask knows of it, and positions do not count it.
    """
    device = decoder.base.device
    ids, real = (t.to(device) for t in pad_rows(list(prompts), decoder.base.pad_id, left=True))
    rows, new = ids.shape
    before = 0 if plan.prefix is None else int(plan.prefix.mask.shape[1])
    window = decoder.new_window(rows, before + new)
    if plan.prefix is not None:
        window.keys[:, :, :, :before] = plan.prefix.keys
        window.values[:, :, :, :before] = plan.prefix.values
        window.filled[:, :before] = plan.prefix.mask.bool()
    window.filled[:, before : before + new] = real.bool()
    window.end = before + new
    positions = (real.cumsum(1) - 1).clamp(min=0)
    if plan.prefix is not None:
        positions = positions + plan.prefix.lengths[:, None]
    logits = decoder(ids, positions, window, plan, _causal(window, new))
    return logits, window, positions[:, -1] + 1


def _causal(window: Window, new: int) -> torch.Tensor:
    """[rows or 1, 1, new, columns]: which columns each of the last `new` ones sees."""
    columns = torch.arange(window.end, device=window.filled.device)
    queries = columns[-new:, None]
    seen = (columns[None, :] <= queries)[None]
    filled = window.mask()
    if filled is not None:
        # Tokens of the padding see themselves: a softmax over nothing is NaN, and it would spread.
        seen = (seen & filled[:, None, :]) | (columns[None, :] == queries)[None]
    return seen[:, None]
