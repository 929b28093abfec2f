"""Progress for TensorBoard, where that is installed: scalars by step, a folder for each learner."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported
from ..events import Evaluated, Event, Step
from .render import remark

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_STEP = {
    "loss/step": "loss",
    "loss/smoothed": "smoothed",
    "learning_rate": "learning_rate",
    "speed/tokens_per_second": "tokens_per_second",
    "memory/bytes": "memory",
}
_MARK = "events.out.tfevents."


def check_tensorboard(folder: Path) -> None:
    """Refuse early what could not be written.

    Raises:
        Unsupported: the package is not installed, or `folder` is a file.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise Unsupported(
            "--tensorboard needs the package tensorboard, which is not installed.", "pip install tensorboard"
        )
    if folder.exists() and not folder.is_dir():
        raise Unsupported(f"{folder} is not a folder.", "Name another one for --tensorboard.")


class Board:
    """Writes `loss/step`, `loss/smoothed`, `learning_rate`, `speed/tokens_per_second`, `memory/bytes` and
    `<split>/<metric>` into FOLDER/NAME; into FOLDER/NAME-2, -3, ... where runs of that name lie already.

    A run that goes on writes into the latest folder of its name; TensorBoard then drops what lies beyond the step it
    goes on from.
    """

    def __init__(self, folder: Path, name: str, resume: bool, make: Callable[..., SummaryWriter] | None = None) -> None:
        """`name`: of the one learner that has none in its events."""
        self._folder, self._name, self._resume = folder, name, resume
        self._make = make
        self._writers: dict[str, Any] = {}
        self._is_broken = False

    def __call__(self, event: Event) -> None:
        """Write one event; those that have no step are not for it. A full disk is said once, and ends no training."""
        if self._is_broken:
            return
        try:
            self._write(event)
        except OSError as error:
            self._is_broken = True
            remark(f"warning: {self._folder} takes nothing more for TensorBoard: {error.strerror or error}")

    def _write(self, event: Event) -> None:
        if isinstance(event, Step):
            writer = self._writer(event.learner, event.step)
            for tag, field in _STEP.items():
                if (value := getattr(event, field)) is not None:
                    writer.add_scalar(tag, value, event.step)
        elif isinstance(event, Evaluated):
            writer = self._writer(event.learner, event.step)
            for metric, value in event.metrics.items():
                writer.add_scalar(f"{event.split}/{metric}", value, event.step)

    def close(self) -> None:
        """Write what is still in memory."""
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()
        self._writers.clear()

    def _writer(self, learner: str, step: int) -> Any:
        name = learner or self._name
        if name not in self._writers:
            if self._make is None:
                from torch.utils.tensorboard import SummaryWriter

                self._make = SummaryWriter
            folder = self._place(name)
            self._writers[name] = self._make(log_dir=str(folder), purge_step=step if self._resume else None)
        return self._writers[name]

    def _place(self, name: str) -> Path:
        """A folder without a run in it; of a run that goes on the latest one with."""
        number, latest = 1, self._folder / name
        while any((place := self._folder / (name if number == 1 else f"{name}-{number}")).glob(f"{_MARK}*")):
            number, latest = number + 1, place
        return latest if self._resume else place
