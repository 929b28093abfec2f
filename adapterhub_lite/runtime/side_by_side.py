"""The rows of a batch side by side, without padding: where every adapter's tokens lie, and what it changes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.fit import Fitted
from ..adapters.sites import features
from ..bases.fused import fuse
from .batch import BatchPlan, Row


def tags_tokens(row: Row) -> bool:
    """Whether a row's head labels every token, and not the text as a whole."""
    return row is not None and row.task_type == "TOKEN_CLS"


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens [begin, end) whose rows have one adapter."""

    begin: int
    end: int
    fitted: Fitted


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one adapter and length, and which of their tokens the adapter's head reads.

    Attributes:
        begin, rows, length: first token, rows, and tokens a row, its virtual ones among them.
        first, read: of each row's tokens the first that is read, and how many are.
    """

    begin: int
    rows: int
    length: int
    first: int
    read: int
    fitted: Fitted

    @property
    def tokens(self) -> int:
        """Tokens of each row's text."""
        return self.length - (self.fitted.prompt.tokens if self.fitted.prompt else 0)


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch lie side by side.

    Attributes:
        order: the rows of the batch as they lie; those without a head are left out.
        ids: the token ids of each row.
        read: the tokens that heads read, as indices of x; None: all of them.
        spans, read_spans: the adapters' tokens in x, and in x after `read`.
    """

    order: list[int]
    ids: list[list[int]]
    runs: list[Run]
    spans: list[Span]
    read: torch.Tensor | None
    read_spans: list[Span]


class SpanSite:
    """Layers of one input, computed as one product where their weights allow it, and changed span by span."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self._fused = fuse(modules)
        self._biases: list[torch.Tensor | None] = [cast(Any, module).bias for module in modules]
        self._widths = [features(module)[1] for module in modules]

    def __call__(self, x: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out of all layers]."""
        given = self._scaled(x, spans)
        if self._fused is not None:
            out = F.linear(given, self._fused.weight, self._fused.bias)
        else:
            parts = [module(given) for module in self.modules]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        for span in spans:
            self._change(given[span.begin : span.end], out[span.begin : span.end], span.fitted)
        return out

    def _scaled(self, x: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """What the layers multiply in place of x; only a layer that is alone can have its input scaled."""
        given = x
        for span in spans if len(self.modules) == 1 else ():
            site = span.fitted.sites.get(self.modules[0])
            if site is not None and site.scale is not None:
                given = x.clone() if given is x else given
                given[span.begin : span.end] *= site.scale
        return given

    def _change(self, x: torch.Tensor, out: torch.Tensor, fitted: Fitted) -> None:
        """Change out = W x of one adapter's tokens, in place."""
        sites = [fitted.sites.get(module) for module in self.modules]
        if not any(sites):
            return
        pack = fitted.packs.get(self.modules)
        hidden, column = None if pack is None or not pack.down.shape[1] else x @ pack.down, 0
        parts = torch.split(out, self._widths, -1)  # type: ignore[no-untyped-call]
        for site, own, part in zip(sites, self._biases, parts, strict=True):
            if site is None:
                continue
            if site.gain is not None:
                part.addcmul_(site.gain, part if own is None else part - own)
            if site.bias is not None:
                part.add_(site.bias)
            rank = site.down.shape[0]
            if rank:
                own_hidden = x @ site.down.t() if hidden is None else hidden[:, column : column + rank]
                part.addmm_(own_hidden, site.up.t())
                column += rank


def lay_out(plan: BatchPlan, rows: Sequence[list[int]], device: torch.device) -> Layout:
    """Rows of one adapter side by side, adapters as they come first, shortest rows first."""
    ranks: dict[str, int] = {}
    for row in plan.rows:
        if row is not None:
            ranks.setdefault(row.digest, len(ranks))
    headed = [(i, row) for i, row in enumerate(plan.rows) if row is not None and row.head is not None]
    order = [i for i, _ in sorted(headed, key=lambda each: (ranks[each[1].digest], len(rows[each[0]])))]
    fitted = [cast(Fitted, plan.rows[i]) for i in order]
    runs: list[Run] = []
    begin = 0
    places = range(len(order))
    for _, some in groupby(places, key=lambda place: (fitted[place].digest, len(rows[order[place]]))):
        here = list(some)
        own, tokens = fitted[here[0]], len(rows[order[here[0]]])
        virtual = own.prompt.tokens if own.prompt else 0
        first, read = (virtual, tokens) if tags_tokens(own) else (0, 1)
        runs.append(Run(begin, len(here), virtual + tokens, first, read, own))
        begin += len(here) * (virtual + tokens)
    read_ids = [
        run.begin + row * run.length + run.first + i for run in runs for row in range(run.rows) for i in range(run.read)
    ]
    whole = len(read_ids) == begin
    return Layout(
        order,
        [rows[i] for i in order],
        runs,
        _spans(runs, [run.length for run in runs]),
        None if whole else torch.tensor(read_ids, device=device),
        _spans(runs, [run.read for run in runs]),
    )


def _spans(runs: Sequence[Run], tokens: Sequence[int]) -> list[Span]:
    """The tokens of each adapter, where a row of run i has tokens[i] of them."""
    spans: list[Span] = []
    begin = 0
    for _, some in groupby(zip(runs, tokens, strict=True), key=lambda each: each[0].fitted.digest):
        here = list(some)
        end = begin + sum(run.rows * n for run, n in here)
        spans.append(Span(begin, end, here[0][0].fitted))
        begin = end
    return spans
