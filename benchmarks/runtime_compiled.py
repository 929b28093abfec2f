"""Steps that stand still: what swaps among ranks capture anew, and decoding beside the same steps launch by launch."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_lite.bases.load import Base
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.captures import Capture, Compiled, CudaGraphs
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store

from .common import chosen_prompts, in_turn, random_lora
from .rows import Row, faster, skip

if TYPE_CHECKING:
    from .runtime import Sizes

PART = "compiled"
_RANKS = (1, 4, 8, 13, 16, 32, 47, 64)
_SWAPS = 100
_ROWS = 4


class Counted:
    """A capture, and how often it was asked for one."""

    def __init__(self, capture: Capture) -> None:
        self.name, self.slow, self.count, self._capture = capture.name, capture.slow, 0, capture

    def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See `Capture`."""
        self.count += 1
        return self._capture(step)


def rows(base: Base, sizes: Sizes) -> Iterator[Row]:
    """The figures of this part."""
    yield _swaps(base, sizes)
    for count in (1, sizes.rows):
        for adapters in (0, count):
            what = f"decoding, {count} rows, {adapters} adapters, one launch a step / launch by launch"
            if base.device.type == "cuda":
                yield _decoding(base, sizes, what, count, adapters)
            else:
                yield skip(PART, what, "no CUDA device")


def _swaps(base: Base, sizes: Sizes) -> Row:
    """Rows of few tokens whose adapters are drawn anew: each that enters is a swap."""
    capture = Counted(CudaGraphs(base.device) if base.device.type == "cuda" else Compiled("eager"))
    runtime = Runtime(base, Store(), slots=None, batch_size=_ROWS)
    runtime._engine.static._capture = capture
    refs = [runtime.attach(random_lora(base, rank, seed=rank)) for rank in _RANKS]
    swaps = min(_SWAPS, sizes.registered)
    _serve(runtime, refs, max(_ROWS, swaps // 4), 0)
    first = capture.count
    _serve(runtime, refs, swaps, 1)
    failed = runtime._engine.static._capture is None
    runtime.close()
    new = capture.count - first
    what = f"{swaps} swaps among ranks {_RANKS[0]} to {_RANKS[-1]}, {_ROWS} rows: captures by {capture.name}"
    told = "it failed" if failed else f"{first} at first, {new} after"
    return Row(PART, what, figure=new, told=told, goal="none after", met=new == 0 and not failed)


def _serve(runtime: Runtime, refs: list[Ref], count: int, seed: int) -> None:
    dice = random.Random(seed)
    prompts = [[dice.randrange(3, 200) for _ in range(dice.randint(2, 12))] for _ in range(count)]
    runtime.generate_ids(prompts, [dice.choice(refs) for _ in prompts], [dice.randint(2, 6) for _ in prompts])


def _decoding(base: Base, sizes: Sizes, what: str, count: int, adapters: int) -> Row:
    prompts = [list(base.tokenizer(text)["input_ids"]) for text in chosen_prompts(count)]
    works: dict[str, Callable[[], Any]] = {}
    made = []
    for name, switch in (("graph", "1"), ("launches", "0")):
        with _switched(switch):
            runtime = Runtime(base, Store(), slots=None, batch_size=count)
        refs: list[Any] = [runtime.attach(random_lora(base, 16, seed=i)) for i in range(adapters)] or [None] * count
        works[name] = lambda runtime=runtime, refs=refs: runtime.generate_ids(prompts, refs, sizes.new_tokens)  # type: ignore[misc]
        made.append(runtime)
    found = in_turn(works, sizes.rounds)
    for runtime in made:
        runtime.close()
    speeds = " / ".join(f"{sizes.new_tokens / found[name].p50:,.0f}" for name in works)
    return faster(PART, f"{what}: {speeds} steps/s", found["graph"], "launches", found["launches"])


@contextmanager
def _switched(value: str) -> Iterator[None]:
    before = os.environ.get("AHL_CUDA_GRAPHS")
    os.environ["AHL_CUDA_GRAPHS"] = value
    try:
        yield
    finally:
        os.environ.pop("AHL_CUDA_GRAPHS")
        if before is not None:
            os.environ["AHL_CUDA_GRAPHS"] = before
