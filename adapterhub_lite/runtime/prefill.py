"""Read tokens ahead: the prompts of rows into a new window, an adapter's virtual tokens into keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..adapters.prefix import FittedPrefix, prefix_shape
from ..bases.inputs import new_cache, pad_rows
from ..bases.load import Base
from .batch import BatchPlan
from .changes import Changes, NativeChanges, changes_of
from .window import Window

if TYPE_CHECKING:
    from .decoder import Decoder


def prefill(
    decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan
) -> tuple[torch.Tensor, Window, torch.Tensor]:
    """Next-token logits [rows, vocabulary], the window that holds prefixes and prompts, and the next positions [rows].

    Prompts end in the same column of the window. The columns of prefixes come before those of all prompts, so that a
    short prompt leaves a gap between the two; the mask knows of it, and positions do not count it.
    """
    window, lengths, before = _window(decoder, prompts, plan)
    changes = changes_of(decoder.base, plan)
    if _natively(decoder, prompts, changes):
        logits = decoder.native.read(prompts, before, window, changes)  # type: ignore[union-attr,arg-type]
    else:
        logits = _padded(decoder, prompts, before, window, changes, every=False)
    return logits, window, before + lengths


def read_all(decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan) -> list[torch.Tensor]:
    """The logits after every token of the rows, [tokens, vocabulary] each."""
    window, lengths, before = _window(decoder, prompts, plan)
    changes = changes_of(decoder.base, plan)
    if _natively(decoder, prompts, changes):
        every = decoder.native.read(prompts, before, window, changes, every=True)  # type: ignore[union-attr,arg-type]
        return list(every.split(lengths.tolist()))
    logits = _padded(decoder, prompts, before, window, changes, every=True)
    return [logits[i, -len(row) :] for i, row in enumerate(prompts)]


def _window(
    decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan
) -> tuple[Window, torch.Tensor, torch.Tensor]:
    """A window that holds the prefixes and has room for the prompts, whose columns count as filled.

    Also the lengths of the prompts and of the prefixes, [rows] each.
    """
    device = decoder.base.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    gap = 0 if plan.prefix is None else int(plan.prefix.mask.shape[1])
    new = max(map(len, prompts))
    window = decoder.new_window(len(prompts), gap + new)
    before = torch.zeros_like(lengths)
    if plan.prefix is not None:
        window.keys[:, :, :, :gap] = plan.prefix.keys
        window.values[:, :, :, :gap] = plan.prefix.values
        window.filled[:, :gap] = plan.prefix.mask.bool()
        before = plan.prefix.lengths.to(device)
    window.end = gap + new
    window.filled[:, gap : window.end] = torch.arange(new, device=device) >= new - lengths[:, None]
    return window, lengths, before


def _natively(decoder: Decoder, prompts: Sequence[list[int]], changes: Changes) -> bool:
    native = decoder.native
    return native is not None and isinstance(changes, NativeChanges) and sum(map(len, prompts)) <= native.most_tokens


def _padded(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    before: torch.Tensor,
    window: Window,
    changes: Changes,
    *,
    every: bool,
) -> torch.Tensor:
    """By torch: [rows, vocabulary], or [rows, longest, vocabulary], a row's own at its end."""
    ids, real = (t.to(decoder.base.device) for t in pad_rows(list(prompts), decoder.base.pad_id, left=True))
    positions = (real.cumsum(1) - 1).clamp(min=0) + before[:, None]
    return decoder(ids, positions, window, changes, _causal(window, ids.shape[1]), every=every)


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
