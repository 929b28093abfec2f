"""What stands in for a CUDA graph on a machine without one: it records a step and runs the recording again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for a value or a shape that depends on data; a stream that is captured refuses it.
WAITS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique")


class Recording(TorchDispatchMode):
    """The operations of one step with the tensors they had: as in a graph, each is read and written where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in WAITS), f"{func} cannot be captured"
        out = func(*args, **(kwargs or {}))
        memory = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in memory]
        if made or func._schema.is_mutable:
            self.operations.append((func, args, kwargs or {}, made))
        return out

    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            again = func(*args, **kwargs)
            if made:
                for to, what in zip(made, tensors(again), strict=True):
                    to.copy_(what)


class Recorder:
    """A capture that counts, and whose steps run nothing of Python's but the recorded operations."""

    name, slow = "recorder", False

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captures += 1
        step()  # a capture may run it before
        recording = Recording()
        with recording:
            out = step()

        def replay() -> torch.Tensor:
            self.replays += 1
            out.fill_(float("nan"))  # whatever is not computed again shows
            recording.replay()
            return out

        return replay


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
