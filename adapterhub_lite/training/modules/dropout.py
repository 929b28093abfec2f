"""The dropout of a model's own layers as a pure function of row, token and place, whatever is computed beside a row.

Every model calls torch for its dropout, directly or through modules: within `Dropping` those calls are answered with
masks of `keep_mask`. Places are numbered by the order of the calls. Random numbers that a model draws otherwise come
from a generator that starts at the first row's key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..dropout import keep_mask
from .lines import Run

_SDPA: Any = F.scaled_dot_product_attention


class Dropping(TorchFunctionMode):
    """Within the block torch's dropout is ours, by the lines of `run`."""

    def __init__(self, run: Run, first_salt: int = 0) -> None:
        super().__init__()
        self.run = run
        self._salt = first_salt

    def next_salt(self) -> int:
        """The number of the next place."""
        self._salt += 1
        return self._salt

    def skip_to(self, salt: int) -> None:
        """Go on after this place: those before it were numbered elsewhere."""
        self._salt = salt

    @property
    def salt(self) -> int:
        """The number of the last place."""
        return self._salt

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch's function gives, with our masks where it drops."""
        named = dict(kwargs or {})
        if func is F.dropout:
            return self._dropout(*args, **named)
        if func is _SDPA and _share(args, named):
            return self._attend(*args, **named)
        return func(*args, **named)

    def _dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or not p:
            return x
        salt, rows = self.next_salt(), len(self.run.rows)
        if x.dim() == 4 and x.shape[0] == rows:
            return x * _by_heads(self.row_keys(x), x.shape, salt, p).to(x.dtype) / (1 - p)
        if x.dim() < 2 or x[..., 0].numel() not in self.run.known:
            self.run.strange = True
            return x  # of no row: what is shared by rows cannot be dropped for each of them
        lines = self.run.lines(x[..., 0].numel(), x.device)
        kept = keep_mask(lines.keys, lines.tokens, salt, x.shape[-1], p).view(x.shape)
        return x * kept / (1 - p)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        keys = self.row_keys(query)
        return attend_dropping(query, key, value, attn_mask, is_causal, scale, dropout_p, keys, self.next_salt())

    def row_keys(self, x: torch.Tensor) -> torch.Tensor:
        """The key of each row."""
        return torch.tensor([row.key for row in self.run.rows], dtype=torch.int64, device=x.device)


class Dropless(TorchFunctionMode):
    """Within the block nothing is dropped, also by a model in training mode, as checkpoints of layers ask for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch's function gives, without dropout."""
        named = dict(kwargs or {})
        if func is F.dropout:
            return args[0] if args else named["input"]
        if func is _SDPA and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        elif func is _SDPA:
            named["dropout_p"] = 0.0
        return func(*args, **named)


def attend_dropping(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    p: float,
    keys: torch.Tensor,
    salt: int,
) -> torch.Tensor:
    """Attention [rows, heads, tokens, width] whose weights are dropped with probability p, by each row's key."""
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    least = torch.finfo(scores.dtype).min  # finite, so that a padded token that sees nothing is no NaN
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, least)
    if mask is not None:
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights * _by_heads(keys, weights.shape, salt, p).to(weights.dtype) / (1 - p)) @ value


def _by_heads(keys: torch.Tensor, shape: Sequence[int], salt: int, p: float) -> torch.Tensor:
    """Kept weights [rows, heads, queries, keys]: the line is the query, the column key * heads + head."""
    rows, heads, queries, seen = shape
    tokens = torch.arange(queries, device=keys.device).repeat(rows)
    kept = keep_mask(keys.repeat_interleave(queries), tokens, salt, seen * heads, p)
    return kept.view(rows, queries, seen, heads).permute(0, 3, 1, 2)


def _share(args: tuple[Any, ...], named: Mapping[str, Any]) -> float:
    """The share that a call of attention drops."""
    return float(args[4] if len(args) > 4 else named.get("dropout_p", 0.0))
