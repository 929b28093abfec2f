"""The rows of a running batch in places that stand still: who comes and goes is data of a captured step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from ..adapters.fit import Fitted
from ..bases.load import Base
from ..events import Listener, Note, ignore
from .captures import Capture, Step, capture_for
from .decoder import Decoder
from .remark import remark
from .static_lanes import Arena, StaticLanes, site_lanes
from .static_size import Needs, Size, needs_of, size_for, size_needed
from .static_step import StaticStep, kinds_of, sites_in_order
from .window import Window

# Steps after which a size is left that was too large for all of them.
_PATIENCE = 64


class StaticFailed(Exception):
    """Something of a captured step could not be done; the rows are as they were before it, and can go on without."""


class Sitter(Protocol):
    """Who has its rows in the places."""

    def stand_up(self) -> None:
        """Take the rows out (`StaticRows.leave`)."""
        ...


class Static:
    """What a runtime has of captured steps, if it has any.

    Args:
        check_room: raises CapacityError where so many bytes more have no room beside the adapters.
    """

    def __init__(
        self,
        base: Base,
        compile: bool = False,
        on_event: Listener = ignore,
        check_room: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._base, self._on_event, self._check_room = base, on_event, check_room
        self._capture = capture_for(base, compile)
        self._rows: StaticRows | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and lanes of all sizes."""
        rows = self._rows
        return 0 if rows is None else rows.nbytes

    def close(self) -> None:
        """Let go of what no batch uses."""
        self._rows = None

    def rows(self, decoder: Decoder) -> StaticRows | None:
        """The places for the batch that is decoded; None where steps run as they are."""
        if self._rows is None and self._capture is not None:
            self._rows = StaticRows(decoder, self._capture, self._check_room, self._say)
        return self._rows

    def give_up(self, error: Exception) -> None:
        """Go on without from now on, and say so."""
        if self._capture is None:
            return
        name, cause = self._capture.name, error.__cause__ or error
        self._capture = self._rows = None
        first = str(cause).strip().partition("\n")[0] or type(cause).__name__
        text = f"Decoding goes on without {name}, more slowly: {first}"
        remark(text, name, self._base, self._on_event, RuntimeWarning)

    def _say(self, size: Size, before: int) -> None:
        """Say that a step is about to be made, where that takes long."""
        if self._capture is not None and self._capture.slow:
            text = f"Compiling the decode step for {size.rows} rows of up to {size.columns} tokens, once; it takes long"
            self._on_event(Note(f"{text} ({before} {'capture' if before == 1 else 'captures'} before)."))


@dataclass
class _Seat:
    """One row: its place, its adapter, what that needs, and the tokens that are in its columns."""

    place: int
    fitted: Fitted | None
    needs: Needs
    length: int


class StaticRows:
    """Rows in their places, and the steps of all sizes that were used.

    A step is captured once a size. Between two steps of one size only data changes, and a move to another size copies
    the rows and their adapters there.
    """

    def __init__(
        self,
        decoder: Decoder,
        capture: Capture,
        check_room: Callable[[int], None] = lambda size: None,
        say: Callable[[Size, int], None] = lambda size, before: None,
    ) -> None:
        """`check_room` as `Static` has it; `say` is told a size to be captured, and how many there are."""
        self._decoder, self._capture, self._say = decoder, capture, say
        self._kinds = kinds_of(decoder)
        self._arena = Arena(decoder.base.device, decoder.base.dtype, check_room)
        self._lanes: dict[tuple[int, Needs], StaticLanes] = {}
        self._steps: dict[Size, StaticStep] = {}
        self._runs: dict[Size, Step] = {}
        self._step: StaticStep | None = None
        self._lately: Size | None = None
        self._patience = _PATIENCE
        self._seats: list[_Seat] = []
        self._places = torch.zeros(0, dtype=torch.long)
        self._sitter: weakref.ref[Sitter] | None = None

    @property
    def sizes(self) -> list[Size]:
        """The sizes that were captured."""
        return list(self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and lanes of all sizes."""
        return self._arena.nbytes

    def seat(self, sitter: Sitter, window: Window, positions: torch.Tensor, rows: Sequence[Fitted | None]) -> None:
        """Take in the rows of a batch; those of an earlier one leave.

        Args:
            window, positions: as a step is given them; rows: each one's adapter.
        """
        before = self._sitter() if self._sitter is not None else None
        if before is not None and before is not sitter:
            before.stand_up()
        self._seats = []
        self.enter(window, positions, rows)
        self._sitter = weakref.ref(sitter, partial(_gone, weakref.ref(self)))

    def enter(self, window: Window, positions: torch.Tensor, rows: Sequence[Fitted | None]) -> None:
        """Take in the rows of a window, after those that are there.

        Raises:
            StaticFailed: as where there is no memory for them.
        """
        with _failing():
            lengths = positions.tolist()
            needs = [needs_of(row, self._kinds) if row is not None else () for row in rows]
            new = [_Seat(-1, row, some, n) for row, some, n in zip(rows, needs, lengths, strict=True)]
            self._fit([*self._seats, *new])
            step = self._current()
            taken = {seat.place for seat in self._seats}
            free = (place for place in range(step.size.rows) if place not in taken)
            for seat in new:
                seat.place = next(free)
            self._read(step, window, [seat.place for seat in new], max(lengths))
            self._deal([*self._seats, *new])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order.

        Raises:
            StaticFailed: the others have left all the same.
        """
        self._seats = [self._seats[i] for i in rows]
        with _failing():
            self._deal(self._seats)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] after one more token [rows] a row; to be read before the next step.

        Raises:
            StaticFailed: nothing has changed.
        """
        with _failing():
            self._patience -= 1
            if self._patience < 0 or max(seat.length for seat in self._seats) >= self._current().size.columns:
                self._fit(self._seats)
                self._deal(self._seats)
            step = self._current()
            step.tokens.index_copy_(0, self._places, tokens)
            if step.size not in self._runs:
                self._say(step.size, len(self._runs))
                self._runs[step.size] = self._capture(step)
            logits = self._runs[step.size]()
            step.positions.index_add_(0, self._places, torch.ones_like(self._places))
        for seat in self._seats:
            seat.length += 1
        n = len(self._seats)
        in_order = all(seat.place == i for i, seat in enumerate(self._seats))
        return logits[:n] if in_order else logits.index_select(0, self._places)

    def leave(self) -> tuple[Window, torch.Tensor]:
        """The rows as a window and their next positions [rows]; the places are free."""
        step, seats = self._current(), self._seats
        end = max(seat.length for seat in seats)
        window = self._decoder.new_window(len(seats), end + 1)
        for row, seat in enumerate(seats):
            begin = end - seat.length
            for i, (keys, values) in enumerate(zip(step.keys, step.values, strict=True)):
                window.keys[i, row, :, begin:end] = keys[seat.place, :, : seat.length]
                window.values[i, row, :, begin:end] = values[seat.place, :, : seat.length]
            window.filled[row, begin:end] = True
        window.end = end
        self._seats, self._sitter = [], None
        return window, torch.tensor([seat.length for seat in seats], device=step.positions.device)

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _current(self) -> StaticStep:
        assert self._step is not None
        return self._step

    def _fit(self, seats: Sequence[_Seat]) -> None:
        """Move to another size where this one is too small for these rows, or was too large for a while."""
        digests = {seat.fitted.digest for seat in seats if seat.fitted is not None and seat.fitted.packs}
        longest = max(seat.length for seat in seats) + 1
        needed = size_needed([seat.needs for seat in seats], len(digests), longest, len(self._kinds))
        lately = needed if self._lately is None else needed.joined(self._lately)
        size = None if self._step is None else self._step.size
        if size is None or not size.holds(needed):
            self._move(size_for(lately, size, self._steps))
        elif self._patience < 0 and not size.suits(lately):
            self._move(size_for(lately, None, self._steps))
        self._lately = lately
        if self._patience < 0:
            self._lately, self._patience = needed, _PATIENCE

    def _move(self, size: Size) -> None:
        """Go on in the buffers of another size. They may share memory with the old ones, so rows are copied twice."""
        before, step = self._step, self._step_of(size)
        same = before is not None and (before.size.rows, before.size.columns) == (size.rows, size.columns)
        if before is not None and self._seats and not same:
            places = torch.tensor([seat.place for seat in self._seats], device=step.tokens.device)
            longest = max(seat.length for seat in self._seats)
            pairs = list(zip((*before.keys, *before.values), (*step.keys, *step.values), strict=True))
            staged = [old[:, :, :longest].index_select(0, places) for old, _ in pairs]
            for (_, new), rows in zip(pairs, staged, strict=True):
                new.zero_()
                new[: len(rows), :, :longest] = rows
            for place, seat in enumerate(self._seats):
                seat.place = place
        if before is None or step.lanes is not before.lanes:
            step.lanes.reset()
        self._step = step

    def _step_of(self, size: Size) -> StaticStep:
        if size not in self._steps:
            key = (size.lanes, size.needs)
            if key not in self._lanes:
                sites = enumerate(sites_in_order(self._kinds))
                made = [site_lanes(group, size.needs[kind], size.lanes, self._arena, i) for i, (kind, group) in sites]
                self._lanes[key] = StaticLanes(made, size.lanes)
            self._steps[size] = StaticStep(self._decoder, size, self._lanes[key], self._arena)
        return self._steps[size]

    # -- data ----------------------------------------------------------------------------------------------------

    def _deal(self, seats: list[_Seat]) -> None:
        """Write which place has which adapter and how many tokens; a place without a row has neither."""
        step = self._current()
        lanes = step.lanes.deal([seat.fitted for seat in seats])
        positions, lane = [0] * step.size.rows, [step.size.lanes] * step.size.rows
        for seat, own in zip(seats, lanes, strict=True):
            positions[seat.place], lane[seat.place] = seat.length, own
        for held, values in ((step.positions, positions), (step.lane, lane)):
            held.copy_(torch.tensor(values))
        step.tokens.zero_()
        self._places = torch.tensor([seat.place for seat in seats], device=step.tokens.device)
        self._seats = seats

    def _read(self, step: StaticStep, window: Window, places: Sequence[int], longest: int) -> None:
        """Copy the rows of a window to places, each row's columns without the gaps between them.

        What an earlier row left there is wiped: it may be no number, and a column with weight zero takes part.
        """
        at = torch.tensor(places, device=step.tokens.device)
        order = (~window.filled[:, : window.end]).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        for of_window, of_step in ((window.keys, step.keys), (window.values, step.values)):
            for i, held in enumerate(of_step):
                rows, heads, _, head_dim = of_window[i].shape
                columns = order[:, None, :, None].expand(rows, heads, longest, head_dim)
                held.index_fill_(0, at, 0)
                held[at, :, :longest] = of_window[i].gather(2, columns)


@contextmanager
def _failing() -> Iterator[None]:
    """Within the block every error is a `StaticFailed`: nothing that goes wrong here may cost a row its text."""
    try:
        yield
    except Exception as error:
        raise StaticFailed from error


def _gone(rows: weakref.ref[StaticRows], sitter: weakref.ref[Sitter]) -> None:
    """Let go of the adapters of a batch that ended."""
    held = rows()
    if held is not None and held._sitter is sitter:
        held._seats = []
