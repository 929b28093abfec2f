"""A process that trains a tiny recipe and may kill itself: python -m tests.training.broken_off RECIPE WHAT AT.

WHAT is `step`, `evaluated` or a system call of writing checkpoints (`write`, `rename`, ...); AT counts from 1.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.events import Evaluated, Step
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem
from adapterhub_lite.workflows.train import train, train_together

_EVENTS = {"step": Step, "evaluated": Evaluated}


def main(recipes: str, what: str, at: int, *more: str) -> None:
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def listen(event: Any) -> None:
        if what in _EVENTS and isinstance(event, _EVENTS[what]):
            reached()

    plans = [load_recipe(Path(one)) for one in recipes.split(",")]
    base = load_base(plans[0].base, plans[0].quantize, device="cpu")
    if what not in _EVENTS:
        original = getattr(FileSystem, what)

        def watched(self: FileSystem, *arguments: Any) -> Any:
            if "runs" in str(arguments[0]) or what in ("write", "fsync", "close"):
                reached()
            return original(self, *arguments)

        setattr(FileSystem, what, watched)
    arguments: dict[str, Any] = {"store": Store(), "base": base, "on_event": listen, "resume": "resume" in more}
    if len(plans) == 1:
        train(plans[0], **arguments)
    else:
        train_together(plans, **arguments)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
