"""That a base is after a run what it was before, seen in a few milliseconds: a sample of every tensor.

`Base.live_digest` reads every byte, which takes a second for each gigabyte; tests do that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import TrainingFailed

_SAMPLE = 512  # values of each tensor, evenly taken


def sampled_digest(model: nn.Module) -> str:
    """sha256 of some values of every parameter and buffer."""
    whole = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().reshape(-1)
        taken = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].contiguous()
        whole.update(name.encode() + taken.view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Raise TrainingFailed if a run that ended well has changed its base."""
    before = sampled_digest(model)
    yield
    if sampled_digest(model) != before:
        raise TrainingFailed(
            "Training changed a weight of the base, which is a bug of this package.", "Load the base anew; report it."
        )
