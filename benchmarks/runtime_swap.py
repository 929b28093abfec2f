"""Switching among resident adapters, and bringing one in, beside PEFT's `set_adapter` and `load_adapter`."""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases.load import Base
from adapterhub_lite.runtime.runtime import Runtime

from .common import in_turn, lora_store, random_lora, synchronise
from .rows import Row, Sample, faster, slower

if TYPE_CHECKING:
    from .runtime import Sizes

PART = "swap"
_RESIDENT = 8
_SWITCHES = 1000


def rows(base: Base, sizes: Sizes) -> Iterator[Row]:
    """The figures of this part."""
    with lora_store(base, _RESIDENT + max(sizes.loads[1], sizes.peer_loads)) as (store, refs, folders):
        plain = AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=base.dtype).to(base.device)
        peer = PeftModel.from_pretrained(plain, folders[0], adapter_name="s000", low_cpu_mem_usage=True).eval()
        for i in range(1, _RESIDENT):
            peer.load_adapter(folders[i], adapter_name=f"s{i:03}", low_cpu_mem_usage=True)
        runtime = Runtime(base, store, slots=len(refs))
        resolved = [runtime.load(ref) for ref in refs[:_RESIDENT]]
        turn = itertools.cycle(range(_RESIDENT))
        found = in_turn(
            {
                "ours": lambda: _many(lambda: runtime.use(resolved[next(turn)]), _SWITCHES),
                "peer": lambda: _many(lambda: peer.set_adapter(f"s{next(turn):03}"), 5),
            },
            rounds=3 * sizes.rounds,
        )
        ours, theirs = found["ours"].per(_SWITCHES), found["peer"].per(5)
        yield faster(PART, f"switch among {_RESIDENT} residents", ours, "set_adapter", theirs, at_least=200)
        yield from _loads(runtime, peer, refs[_RESIDENT:], folders[_RESIDENT:], sizes)
        runtime.close()
    yield _growth(base, sizes)


def _loads(runtime: Runtime, peer: Any, refs: list[str], folders: list[Path], sizes: Sizes) -> Iterator[Row]:
    """From files in the page cache to the first logits; each adapter is new to the runtime and was measured before."""
    ids = list(runtime.base.tokenizer("The ferry leaves at seven.")["input_ids"])
    tensor = torch.tensor([ids], device=runtime.base.device)
    for ref in refs:  # its certificate on this machine
        runtime.load(ref)
        runtime.unload(ref)
    ours: list[float] = []
    theirs: list[float] = []
    for i, ref in enumerate(refs[: sizes.peer_loads]):
        begun = _now()
        runtime.use(ref)
        got = runtime.logits([ids])[0]
        ours.append(_now() - begun)
        begun = _now()
        peer.load_adapter(folders[i], adapter_name=f"l{i:03}", low_cpu_mem_usage=True)
        peer.set_adapter(f"l{i:03}")
        with torch.inference_mode():
            expected = peer(tensor).logits[0]
        theirs.append(_now() - begun)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    yield faster(PART, "load to first logits", Sample.of(ours), "load_adapter", Sample.of(theirs), at_least=20)
    yield from _linear(runtime, refs, (folders[0] / "adapter_model.safetensors").stat().st_size, sizes)


def _linear(runtime: Runtime, refs: list[str], size: int, sizes: Sizes) -> Iterator[Row]:
    """Few and many loads, at first in memory new to the process, then in memory it had before; and beside them what the
    machine asks for as much new memory, since a virtual one may have to fetch it from its host.

    Args:
        size: bytes of an adapter.
    """
    few, many = sizes.loads
    found: dict[int, list[float]] = {few: [], many: []}
    for _ in range(1 + sizes.rounds):
        for count in sizes.loads:
            runtime.use(None)
            for ref in runtime.resident():
                runtime.unload(ref)
            begun = _now()
            for ref in refs[:count]:
                runtime.load(ref)
            found[count].append(_now() - begun)
    touched = {count: Sample.of([_touch(size * count)]) for count in (few, many)}  # last: it would warm memory up
    limit = 1.15 * many / few
    what, beside = f"load {many} / {few} adapters", f"{few} adapters"
    first = [Sample.of(found[count][:1]) for count in (many, few)]
    again = [Sample.of(found[count][1:]) for count in (many, few)]
    yield slower(PART, f"{what}, the first time", first[0], beside, first[1], at_most=limit)
    yield slower(PART, f"{what}, in memory used before", again[0], beside, again[1], at_most=limit)
    yield slower(PART, f"the machine's new memory for {many} / {few}", touched[many], f"for {few}", touched[few])


def _touch(size: int) -> float:
    """Seconds to write once to every page of `size` bytes of new memory, which is given back."""
    with mmap.mmap(-1, size) as memory:
        begun = _now()
        for first in range(0, size, mmap.PAGESIZE):
            memory[first] = 1
        return _now() - begun


def _growth(base: Base, sizes: Sizes) -> Row:
    """One switch among few and among many residents; adapters of rank 1, so that many fit."""
    few, many = sizes.residents
    runtime = Runtime(base, slots=many)
    held = [runtime.attach(random_lora(base, 1, seed=i)) for i in range(many)]
    turns = {count: itertools.cycle(held[:count]) for count in (few, many)}
    works = {
        str(count): lambda count=count: _many(lambda: runtime.use(next(turns[count])), _SWITCHES)  # type: ignore[misc]
        for count in (few, many)
    }
    found = in_turn(works, rounds=3 * sizes.rounds)
    runtime.close()
    ours, peer = found[str(many)].per(_SWITCHES), found[str(few)].per(_SWITCHES)
    return slower(PART, f"switch among {many} residents", ours, f"among {few}", peer, at_most=1.2)


def _many(work: Any, times: int) -> None:
    for _ in range(times):
        work()


def _now() -> float:
    synchronise()
    return time.perf_counter()
