"""The state of a run on disk: safetensors and JSON in a folder that appears whole or not at all.

    checkpoint-<N>/state.safetensors    <learner>.parameters, .first_moment, .second_moment, .losses, .best
    checkpoint-<N>/state.json           steps, evaluations, early stopping; digests of the tensors, the run and itself

A checkpoint is written beside its place, synced, and renamed; the one before goes when the new name is durable. So
after a crash at any system call the previous or the new one is there, whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ...errors import FormatError, NotFound, StoreCorrupt, StoreError
from ...events import Listener, Note, ignore
from ...formats.files import read_regular
from ...formats.safetensors_header import parse_header
from ...formats.strict_json import dump, parse_object
from ...store.fs import FileSystem, discard, new_tmp, storing, write_file
from ..member import Member
from .folders import PLAIN, checkpoints, steps_done

FORMAT = 1
TENSORS = "state.safetensors"
_LIMITS = {TENSORS: 1 << 40, PLAIN: 64 << 20}


@dataclass(frozen=True)
class State:
    """Tensors by name, and plain values, of each learner in order."""

    tensors: Sequence[Mapping[str, torch.Tensor]]
    plain: Sequence[Mapping[str, Any]]

    @property
    def step(self) -> int:
        """Steps of the learner that came furthest."""
        return max(int(one["step"]) for one in self.plain)


def write_checkpoint(fs: FileSystem, folder: Path, number: int, state: State, run: str) -> None:
    """Make checkpoint `number` in the folder of a run whose identity has the digest `run`; the earlier ones go."""
    flat = {f"{i}.{name}": t.contiguous().cpu() for i, one in enumerate(state.tensors) for name, t in one.items()}
    tensors = save(flat, metadata={"format": "pt"})
    told = {"format": FORMAT, "run": run, "tensors": sha256(tensors).hexdigest(), "learners": list(state.plain)}
    staged = new_tmp(folder)
    try:
        fs.mkdir(staged)
        write_file(fs, staged / TENSORS, tensors)
        write_file(fs, staged / PLAIN, dump({**told, "seal": sha256(dump(told)).hexdigest()}))
        fs.fsync_dir(staged)
        fs.rename(staged, folder / f"checkpoint-{number}")
        fs.fsync_dir(folder)
    except BaseException:
        discard(fs, staged)
        raise
    for other, path in checkpoints(folder):
        if other < number:
            discard(fs, path)
    for path in folder.glob(".*"):
        discard(fs, path)


def read_checkpoint(path: Path, run: str) -> State:
    """The state that a checkpoint holds.

    Raises:
        StoreCorrupt: it was changed, is incomplete, or belongs to another run.
    """
    try:
        data = {name: read_regular(path / name, limit) for name, limit in _LIMITS.items()}
        told = parse_object(data[PLAIN], PLAIN, limit=_LIMITS[PLAIN], values=1 << 24)
        seal = told.pop("seal", None)
        if seal != sha256(dump(told)).hexdigest() or told["tensors"] != sha256(data[TENSORS]).hexdigest():
            raise FormatError("its digest is another one")
        if told["run"] != run:
            raise FormatError("it belongs to another run")
        if told["format"] != FORMAT:
            raise FormatError(f"it has format {told['format']}, this version reads {FORMAT}")
        parse_header(data[TENSORS], TENSORS)
        flat = load(data[TENSORS])
        parts: list[dict[str, torch.Tensor]] = [{} for _ in told["learners"]]
        for key, tensor in flat.items():
            index, _, name = key.partition(".")
            parts[int(index)][name] = tensor
    except (FormatError, NotFound, OSError, LookupError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise StoreCorrupt(f"The checkpoint {path} is damaged: {reason}.", "Start anew with --from-scratch.") from error
    return State(parts, told["learners"])


class Checkpoints:
    """Writes the checkpoints of one run (`loop.Keeper`), and reads the latest.

    A disk that is full, or fails, does not end the run: it is said once, and the checkpoint before stays.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        evaluations: bool = True,
        fs: FileSystem | None = None,
        on_event: Listener = ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`steps`, `seconds`: between checkpoints; `evaluations`: whether one is written at each, and at the end."""
        self._folder, self._run, self._fs = folder, run, fs or FileSystem()
        self._on_event, self._clock = on_event, clock
        self._steps, self._seconds, self._evaluations = steps, seconds, evaluations
        self._written: object = None
        self._at, self._since = clock(), 0
        self._failed = False

    def latest(self) -> State | None:
        """The state of the latest checkpoint, or None where there is none. Raises StoreCorrupt."""
        for _, path in checkpoints(self._folder):
            return read_checkpoint(path, self._run)
        return None

    @property
    def kept_step(self) -> int:
        """The step of the latest checkpoint, 0 where there is none."""
        return steps_done(self._folder)

    def after_step(self, members: Sequence[Member], evaluated: bool) -> None:
        """Write a checkpoint, if it is time for one."""
        step = max(member.step for member in members)
        by_steps = self._steps is not None and step - self._since >= self._steps
        by_time = self._seconds is not None and self._clock() - self._at >= self._seconds
        if by_steps or by_time or (evaluated and self._evaluations):
            self.save(members)

    def save(self, members: Sequence[Member]) -> bool:
        """Write a checkpoint; whether there is one of this state."""
        progress = [(member.step, len(member.history.evaluations)) for member in members]
        if self._written == progress:
            return True
        if not any(step for step, _ in progress):
            return False
        states = [member.state() for member in members]
        state = State([tensors for tensors, _ in states], [plain for _, plain in states])
        self._at, self._since = self._clock(), state.step
        size = sum(t.nbytes for one in state.tensors for t in one.values())
        try:
            with storing("write a checkpoint", self._folder, size, "Training goes on; the checkpoint before is kept."):
                number = max((number for number, _ in checkpoints(self._folder)), default=0) + 1
                write_checkpoint(self._fs, self._folder, number, state, self._run)
        except StoreError as error:
            if not self._failed:
                self._on_event(Note(error.message, "warning"))
            self._failed = True
            return False
        self._written, self._failed = progress, False
        return True
