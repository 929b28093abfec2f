"""Merging into checkpoints beside PEFT: speed, peak memory and bits; combining; quantised merges.

The merge of one adapter on all linear layers is made by both sides in fresh processes, in turn: ours from the folder,
the peer's by `from_pretrained`, `merge_and_unload` and `save_pretrained`. Imports are not counted on either side. Ours
is durable when it ends (fsync), the peer's is not; the page cache holds the base. A checkpoint of Llama-3.2-3B's shape
is made of random weights, where there is room for it.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import replace

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quiet import quiet

from . import merging_combine, merging_quantised, merging_speed
from .common import BASE, print_machine
from .options import add_options
from .rows import Row

_QUICK_COMBINE = {"rounds": 1, "rank": 4, "looked_at": 2}
_QUICK_QUANTISED = {"steps": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it with these options, by default those of the command line."""
    options = add_options(ArgumentParser()).parse_known_args(arguments)[0]
    kept: list[Row] = []
    print_machine("merging: ours beside PEFT")
    with quiet():
        for row in _rows(options.quick):
            # Little work judges no goal; that the bits are equal holds however little it is.
            kept.append(replace(row, met=None) if options.quick and row.part != merging_speed.BITS else row)
            print(kept[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in kept], indent=2) + "\n")


def _rows(quick: bool) -> Iterator[Row]:
    yield from merging_speed.rows(quick)
    base = load_base(BASE)
    yield from merging_combine.rows(base, **(_QUICK_COMBINE if quick else {}))
    del base
    yield from merging_quantised.rows(**(_QUICK_QUANTISED if quick else {}))
