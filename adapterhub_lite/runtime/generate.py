"""A mixed batch, decoded step by step: rows that are done leave it, and others join it in a forward of our own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..adapters.fit import Fitted
from ..bases.load import Base
from ..errors import NoEffect, Unsupported
from .batch import BatchPlan
from .changes import Changes, NativeChanges, changes_of
from .decoder import Decoder, decoder_of
from .engine import Engine
from .own_forward import AloneLoop, CausalLoop, Loop, Seq2SeqLoop, batches, flattens
from .prefill import Reader
from .prompting import position_limit
from .requests import Request
from .sampling import choose
from .static_rows import Static, StaticFailed, StaticRows
from .wishes import heeded, wishes

# A batch is cut to its unfinished rows when at least this share of it has finished: cutting copies the cache.
_COMPACT_AT = 0.25


def end_tokens(base: Base) -> set[int]:
    """Token ids that end an answer."""
    generation = getattr(base.model, "generation_config", None)
    ids: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), base.tokenizer.eos_token_id, base.config.eos_token_id):
        ids |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return ids


class Batch:
    """Rows that are decoded together. Rows that are done stay in it until `cut`, and rows of ours may `join`."""

    def __init__(self, engine: Engine, rows: Sequence[Request], decoder: Decoder | None) -> None:
        """`decoder`: a forward of our own that knows all that the rows change; None: the model's own."""
        self.rows = list(rows)
        self._base, self._hooks, self._composer = engine.base, engine.hooks, engine.composer
        self._decoder = decoder
        self._ends = end_tokens(engine.base)
        self._plan = self._compose(self.rows)
        prompts = [[*row.prompt, *row.tokens] for row in self.rows]
        self._loop = self._started(prompts, engine)
        self._room = [_room(self._base, row) for row in self.rows]
        self._wishes = [wishes(self._base, row) for row in self.rows]
        self._tokens: torch.Tensor | None = None

    @property
    def ours(self) -> bool:
        """Whether rows may join."""
        return self._decoder is not None

    @property
    def alive(self) -> list[int]:
        """Places of the rows that go on."""
        return [i for i, row in enumerate(self.rows) if not row.done]

    @property
    def unread(self) -> int:
        """Tokens of prompts of ours that are to be read before the first step; 0 after it."""
        return self._loop.unread if isinstance(self._loop, _WindowLoop) else 0

    def read(self) -> list[tuple[Request, bool | Exception]]:
        """Read a piece of the prompts; after the last one this is the first step."""
        if isinstance(self._loop, _WindowLoop) and self._loop.more:
            with torch.inference_mode():
                self._loop.read()
            return []
        return self.step()

    def step(self) -> list[tuple[Request, bool | Exception]]:
        """One token for every row; of each row that went on until now: whether it still does, or what went wrong."""
        with torch.inference_mode(), self._hooks.using(self._plan.sites if self._loop.hooked else {}):
            if self._tokens is not None:
                self._loop.append(self._tokens)
                self._room = [room - 1 for room in self._room]
            logits = self._loop.step()
            finite = logits.amax(-1).isfinite().tolist()
            logits = heeded(self._base, logits, self.rows, self._wishes)
            self._tokens = choose(logits, [row.sampler for row in self.rows])
        tokens = self._tokens.tolist()
        return [(self.rows[i], self._take(self.rows[i], tokens[i], finite[i])) for i in self.alive]

    def cut(self, at: float = _COMPACT_AT) -> None:
        """Go on with the rows that are not done, where these are few enough or one is at the end of its positions."""
        keep = self.alive
        if len(keep) == len(self.rows) or not keep:
            return
        full = any(row.done and room < 1 for row, room in zip(self.rows, self._room, strict=True))
        if len(self.rows) - len(keep) < at * len(self.rows) and not full:
            return
        self.rows, self._room = [self.rows[i] for i in keep], [self._room[i] for i in keep]
        self._wishes = [self._wishes[i] for i in keep]
        assert self._tokens is not None
        with torch.inference_mode():
            self._tokens = self._tokens[keep]
            self._plan = self._plan.select(keep)
            self._loop.select(keep, self._plan)

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch of ours that has made a step."""
        assert isinstance(self._loop, _WindowLoop)
        assert isinstance(other._loop, _WindowLoop)
        assert self._tokens is not None
        assert other._tokens is not None
        self.cut(0.0)
        other.cut(0.0)
        self.rows, self._room = self.rows + other.rows, self._room + other._room
        self._wishes = self._wishes + other._wishes
        with torch.inference_mode():
            self._plan = replace(self._compose(self.rows, read=True), prefix=None)
            self._tokens = torch.cat([self._tokens, other._tokens])
            self._loop.join(other._loop, self._plan)

    def _started(self, prompts: list[list[int]], engine: Engine) -> Loop:
        if self._decoder is not None:
            return _WindowLoop(self._decoder, self._plan, prompts, engine.static, engine.piece)
        mixed = len({row.fitted.digest if row.fitted else "" for row in self.rows}) > 1
        if batches(self._base) and not (mixed and flattens(self._base, self._plan)):
            return (Seq2SeqLoop if self._base.kind == "seq2seq" else CausalLoop)(self._base, self._plan, prompts)
        plans = [self._compose([row]) for row in self.rows]
        return AloneLoop(self._base, plans, prompts, self._hooks)

    def _take(self, row: Request, token: int, finite: bool) -> bool | Exception:
        if not finite:
            text = f"logits of {self._base.name} that are not finite."
            if row.fitted is None:
                return Unsupported(f"The base computes {text}", "Load it in a wider dtype.")
            return NoEffect(f"{row.fitted.name} makes {text}", "Use another adapter, or a wider dtype.")
        try:
            return row.take(token, self._ends)
        except Exception as error:
            return error

    def _compose(self, rows: Sequence[Request], read: bool = False) -> BatchPlan:
        """The plan of the rows, without stacks where nothing reads them.

        Args:
            read: the prefixes are in the window by now.
        """
        fitted = [row.fitted for row in rows]
        bare = BatchPlan(tuple(fitted), (), None, self._base.device)
        prefixes = not read and any(one is not None and one.prefix is not None for one in fitted)
        if self._decoder is not None and not prefixes and isinstance(changes_of(self._base, bare), NativeChanges):
            return bare
        return self._composer.compose(fitted, self._base.device)


def decoder_for(base: Base, fitted: Fitted | None) -> Decoder | None:
    """Our forward of a base, if it has one that knows all that an adapter changes."""
    decoder = decoder_of(base)
    plan = BatchPlan((fitted,), (), None, base.device)
    return decoder if decoder is not None and decoder.knows(plan) else None


def _room(base: Base, row: Request) -> int:
    """Tokens that a row may still grow by before it leaves the base's positions."""
    limit = position_limit(base)
    virtual = row.fitted.virtual_tokens if row.fitted else 0
    return sys.maxsize if limit is None else limit - len(row.prompt) - len(row.tokens) - virtual


class _WindowLoop:
    """Decode state of a forward of our own: window and next positions [rows], or places of captured steps."""

    hooked = False

    def __init__(self, decoder: Decoder, plan: BatchPlan, prompts: list[list[int]], static: Static, piece: int) -> None:
        self._decoder, self._plan, self._piece = decoder, plan, piece
        self._prompts: list[list[int]] = prompts
        self._reader: Reader | None = None
        self._static: Static | None = static
        self._places: StaticRows | None = None
        self._changes: Changes | None = None

    @property
    def unread(self) -> int:
        """Tokens of prompts that are not read yet."""
        return sum(map(len, self._prompts)) if self._reader is None else self._reader.left

    @property
    def more(self) -> bool:
        """Whether a piece of the prompts is to be read before the one that ends them."""
        return self.unread > self._piece and len(self._prompts) == 1

    def read(self) -> torch.Tensor:
        """Logits [rows, vocabulary] after the next piece of the prompts."""
        self._reader = self._reader or Reader(self._decoder, self._prompts, self._plan, self._piece)
        return self._reader.read()

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token, after what is left of the prompts."""
        if self._prompts:
            while self.more:
                self.read()
            logits = self.read()
            assert self._reader is not None
            self._window, self._positions = self._reader.window, self._reader.positions
            self._prompts, self._reader = [], None
            return logits
        if self._places is not None:
            try:
                return self._places.step(self._tokens)
            except StaticFailed as error:
                self._give_up(error)
        self._window.extend()
        if self._changes is None:
            self._changes = changes_of(self._decoder.base, self._plan)
        logits = self._decoder.step(self._tokens, self._positions, self._window, self._changes)
        self._positions = self._positions + 1
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        self._tokens = tokens
        if self._static is not None and self._places is None:
            self._sit_down(self._static)

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only."""
        self._plan, self._changes = plan, None
        if self._places is not None:
            try:
                self._places.keep(keep)
                return
            except StaticFailed as error:  # the rows that left have left
                self._give_up(error)
                return
        self._window.select(keep)
        self._positions = self._positions[keep]

    def join(self, other: _WindowLoop, plan: BatchPlan) -> None:
        """Take in the rows of another loop, after these; `plan` is that of all."""
        if other._places is not None:
            other.stand_up()
        self._plan, self._changes = plan, None
        if self._places is not None:
            rows = plan.rows[-other._window.rows :]
            try:
                self._places.enter(other._window, other._positions, rows)
                return
            except StaticFailed as error:
                self._give_up(error)
        self._window.join(other._window)
        self._positions = torch.cat([self._positions, other._positions])

    def stand_up(self) -> None:
        """Leave the places of captured steps for good: another batch takes them."""
        assert self._places is not None
        self._window, self._positions = self._places.leave()
        self._places = self._static = None

    def _sit_down(self, static: Static) -> None:
        """Go on in captured steps, where there are any."""
        places = static.rows(self._decoder)
        if places is None:
            self._static = None
            return
        try:
            places.seat(self, self._window, self._positions, self._plan.rows)
        except StaticFailed as error:
            self._static = None
            static.give_up(error)
            return
        self._places = places
        del self._window, self._positions

    def _give_up(self, error: StaticFailed) -> None:
        static = self._static
        self.stand_up()
        if static is not None:
            static.give_up(error)
