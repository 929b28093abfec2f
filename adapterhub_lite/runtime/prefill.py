"""Read tokens ahead: the prompts of rows into a new window, an adapter's virtual tokens into keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..adapters.prefix import FittedPrefix, prefix_shape
from ..bases.inputs import new_cache, pad_rows
from ..bases.load import Base
from .batch import BatchPlan
from .changes import changes_of
from .window import Window

if TYPE_CHECKING:
    from .decoder import Decoder


def prefill(
    decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan, *, every: bool = False
) -> tuple[torch.Tensor, Window, torch.Tensor]:
    """Next-token logits [rows, vocabulary], the window that holds prefixes and prompts, and the next positions [rows].

    With `every` the logits are those after every token [rows, longest, vocabulary], a row's own at its end.
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
    logits = decoder(ids, positions, window, changes_of(decoder.base, plan), _causal(window, new), every=every)
    return logits, window, positions[:, -1] + 1


def read_prompt(base: Base, embeddings: torch.Tensor) -> FittedPrefix:
    """The keys and values that virtual tokens [tokens, hidden] leave behind in a causal base.

    They come before the text and see themselves alone, so what they leave is the same for every text: a prompt-tuned
    row is a row with this prefix.

    Raises:
        Unsupported: the layers differ in key-value shape.
    """
    prefix_shape(base.config)
    cache = new_cache(None, encoder_decoder=False)
    with torch.no_grad():
        given = embeddings.to(base.device, base.dtype)[None]
        base.view("FEATURE_EXTRACTION").model(inputs_embeds=given, past_key_values=cache, use_cache=True)
    keys, values = ([getattr(layer, name)[0] for layer in cache.layers] for name in ("keys", "values"))
    return FittedPrefix(torch.stack(keys), torch.stack(values))


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
