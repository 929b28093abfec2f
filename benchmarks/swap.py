"""Switching and loading adapters against PEFT: `set_adapter` among residents, `load_adapter` from the page cache."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quiet import quiet
from adapterhub_lite.runtime.runtime import Runtime

from .common import BASE, in_turn, lora_store, print_head, print_row

RESIDENT = 8
LOADS = 6


def main() -> None:
    """Print the comparison."""
    base = load_base(BASE)
    print_head(f"swap: {RESIDENT} LoRA adapters, rank 16, all linear layers", base)
    with lora_store(base, RESIDENT + LOADS) as (store, refs, folders), quiet():
        runtime = Runtime(base, store, slots=RESIDENT + LOADS)
        plain = AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=base.dtype)
        peer = PeftModel.from_pretrained(plain, folders[0], adapter_name="s000", low_cpu_mem_usage=True).eval()
        for i in range(1, RESIDENT):
            peer.load_adapter(folders[i], adapter_name=f"s{i:03}", low_cpu_mem_usage=True)
        resolved = [runtime.load(ref) for ref in refs[:RESIDENT]]
        turn = itertools.cycle(range(RESIDENT))
        seconds = in_turn(
            {
                "ours": lambda: _many(lambda: runtime.use(resolved[next(turn)]), 1000),
                "peer": lambda: _many(lambda: peer.set_adapter(f"s{next(turn):03}"), 5),
            },
            rounds=9,
        )
        print_row("switch among residents (use / set_adapter)", seconds["ours"] / 1000, seconds["peer"] / 5, "us")
        _loads(runtime, peer, refs, folders)
        runtime.close()


def _loads(runtime: Runtime, peer: PeftModel, refs: list[str], folders: list[Path]) -> None:
    """From files in the page cache to the first logits, one adapter after another."""
    ids = list(runtime.base.tokenizer("The ferry leaves at seven.")["input_ids"])
    tensor = torch.tensor([ids])
    ours, theirs = [], []
    for i in range(RESIDENT, RESIDENT + LOADS):
        begun = time.perf_counter()
        runtime.use(refs[i])
        got = runtime.logits([ids])[0]
        ours.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        peer.load_adapter(folders[i], adapter_name=f"s{i:03}", low_cpu_mem_usage=True)
        peer.set_adapter(f"s{i:03}")
        with torch.inference_mode():
            expected = peer(tensor).logits[0]
        theirs.append(time.perf_counter() - begun)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    print_row(
        "load to first logits (use / load_adapter low_cpu_mem_usage)",
        statistics.median(ours),
        statistics.median(theirs),
    )


def _many(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


if __name__ == "__main__":
    main()
