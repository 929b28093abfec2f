"""Read tokens ahead: the prompts of rows into a new window, an adapter's virtual tokens into keys and values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.prefix import FittedPrefix, prefix_shape
from ..bases.inputs import new_cache, pad_rows
from ..bases.load import Base
from .batch import BatchPlan
from .changes import Changes, NativeChanges, changes_of
from .window import Window

if TYPE_CHECKING:
    from .decoder import Decoder


# Most tokens of a prompt that are read at a time; between two pieces of one the rows that run get a token. Any prompt
# that is longer is read alone and in these pieces, so that its logits do not depend on who else is there.
PIECE = 256


class Reader:
    """Prompts on their way into a window that holds the prefixes of their rows: all at once, or piece by piece.

    Prompts end in the same column of the window. The columns of prefixes come before those of all prompts, so that a
    short prompt leaves a gap between the two; the mask knows of it, and positions do not count it.

    Attributes:
        window: what is read so far.
        positions: the next ones [rows].
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan, pieces: int = sys.maxsize
    ) -> None:
        """`pieces`: most tokens that are read at a time of a row that is alone; others are read at once."""
        self._decoder, self._changes = decoder, changes_of(decoder.base, plan)
        longest = max(map(len, prompts))
        step = longest if len(prompts) > 1 else min(longest, pieces)
        self._parts = [[prompt[at : at + step] for prompt in prompts] for at in range(0, longest, step)]
        self.window, self.positions = _window(decoder, len(prompts), longest, plan)

    @property
    def left(self) -> int:
        """Tokens that are not read yet."""
        return sum(len(row) for part in self._parts for row in part)

    def read(self, every: bool = False) -> torch.Tensor:
        """Read a piece: logits [rows, vocabulary] after it; after `every` token, each row's at its end, if asked for.

        Natively these are [tokens of all rows, vocabulary], else [rows, longest, vocabulary].
        """
        prompts = self._parts.pop(0)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.positions.device)
        self.window.extend(lengths)
        if _natively(self._decoder, prompts, self._changes):
            native: Any = self._decoder.native
            logits: torch.Tensor = native.read(prompts, self.positions, self.window, self._changes, every)
        else:
            logits = _padded(self._decoder, prompts, self.positions, self.window, self._changes, every=every)
        self.positions = self.positions + lengths
        return logits


def prefill(
    decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan
) -> tuple[torch.Tensor, Window, torch.Tensor]:
    """Next-token logits [rows, vocabulary], the window of prefixes and prompts, and the next positions [rows]."""
    reader = Reader(decoder, prompts, plan)
    return reader.read(), reader.window, reader.positions


def read_all(decoder: Decoder, prompts: Sequence[list[int]], plan: BatchPlan) -> list[torch.Tensor]:
    """The logits after every token of the rows, [tokens, vocabulary] each."""
    logits = Reader(decoder, prompts, plan).read(every=True)
    if logits.dim() == 2:
        return list(torch.split(logits, [len(row) for row in prompts]))  # type: ignore[no-untyped-call]
    return [logits[i, -len(row) :] for i, row in enumerate(prompts)]


def _window(decoder: Decoder, rows: int, new: int, plan: BatchPlan) -> tuple[Window, torch.Tensor]:
    """A window that holds the prefixes, with room for `new` columns, and the lengths of the prefixes [rows]."""
    gap = 0 if plan.prefix is None else int(plan.prefix.mask.shape[1])
    window = decoder.new_window(rows, gap + new)
    before = torch.zeros(rows, dtype=torch.long, device=decoder.base.device)
    if plan.prefix is not None:
        window.keys[:, :, :, :gap] = plan.prefix.keys
        window.values[:, :, :, :gap] = plan.prefix.values
        window.filled[:, :gap] = plan.prefix.mask.bool()
        before = plan.prefix.lengths.to(before.device)
    window.end = gap
    return window, before


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
