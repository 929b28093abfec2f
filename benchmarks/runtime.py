"""The runtime: switching, loading, generating and labelling with many adapters, beside PEFT and transformers.

Same weights, prompts and greedy tokens, in one process and in turn; medians with the 95th percentile in brackets. The
peers run with their best public settings: PEFT with `low_cpu_mem_usage`, transformers' `generate` in float32 and in
bfloat16, whichever is faster. Everything runs on the first CUDA device where there is one, else on the CPU.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quiet import quiet

from . import runtime_compiled, runtime_encoder, runtime_generate, runtime_swap
from .common import BASE, print_head
from .options import add_options
from .rows import Row


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    new_tokens: int = 64
    rows: int = 16
    registered: int = 1000
    residents: tuple[int, int] = (10, 1000)
    loads: tuple[int, int] = (10, 100)
    peer_loads: int = 6
    rounds: int = 3
    labelled: int = 64


QUICK = Sizes(new_tokens=3, rows=4, registered=6, residents=(2, 4), loads=(1, 3), peer_loads=2, rounds=1, labelled=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it with these options, by default those of the command line."""
    options = add_options(ArgumentParser()).parse_known_args(arguments)[0]
    sizes = QUICK if options.quick else Sizes()
    rows: list[Row] = []
    base = load_base(BASE, options.quantize)
    print_head("runtime: switch, load, generate, label", base)
    with quiet():
        for part in (runtime_swap, runtime_generate, runtime_compiled):
            _take(rows, part.rows(base, sizes), options.quick)
        _take(rows, runtime_encoder.rows(sizes), options.quick)
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=2) + "\n")


def _take(kept: list[Row], found: Iterable[Row], quick: bool) -> None:
    for row in found:
        kept.append(replace(row, met=None) if quick else row)  # little work judges no goal
        print(kept[-1], flush=True)
        sys.stdout.flush()
