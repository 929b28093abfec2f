"""Ways to make one launch of a step: a CUDA graph, or the code that torch.compile makes of it.

A step reads and writes its own buffers alone (`StaticStep`), so what is made of it once serves for all later tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch

from ..bases.load import Base

Step = Callable[[], torch.Tensor]
_SWITCH = "AHL_CUDA_GRAPHS"
_WARMUPS = 2


class Capture(Protocol):
    """Makes of a step what does the same, in the same buffers, and faster; `slow`: it takes seconds or more."""

    name: str
    slow: bool

    def __call__(self, step: Step) -> Step:
        """May run the step some times: what a step does twice is as if done once."""
        ...


def capture_for(base: Base, compile: bool) -> Capture | None:
    """What is used with a base; None: steps with shapes that change, as they are.

    Args:
        compile: by torch.compile, on any device; else CUDA graphs where there are any and AHL_CUDA_GRAPHS is not 0.
    """
    if compile:
        return Compiled()
    if base.device.type == "cuda" and os.environ.get(_SWITCH, "").strip() != "0":
        return CudaGraphs(base.device)
    return None


class CudaGraphs:
    """One launch for all kernels of a step; graphs share one pool of memory, because they run one after another.

    Each run of a graph writes over what the run before, of any graph, has returned.
    """

    name, slow = "CUDA graphs", False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, step: Step) -> Step:
        """See `Capture`."""
        with torch.cuda.device(self._device):
            stream, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(stream)
            with torch.cuda.stream(side):  # libraries allocate and choose kernels at their first calls
                for _ in range(_WARMUPS):
                    step()
            stream.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may bring an adapter in, which is no business of this capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                out = step()
            stream.wait_stream(side)
            self._pool = graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class Compiled:
    """By torch.compile, with every shape fixed and no part left to Python."""

    name, slow = "torch.compile", True

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self._backend = backend

    def __call__(self, step: Step) -> Step:
        """See `Capture`. Compiles now, so that what cannot be compiled is known now."""
        # torch keeps what it compiled, and limits it, by code object: each step has one of its own.
        own = FunctionType(_run.__code__.replace(co_name=f"step_{id(step)}"), _run.__globals__)
        compiled = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=False)
        compiled(step)
        return partial(compiled, step)


def _run(step: Step) -> torch.Tensor:
    return step()
