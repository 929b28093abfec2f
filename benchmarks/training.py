"""Training adapters beside transformers' Trainer with PEFT: speed, losses, memory, several at once, share of the roof.

Both sides learn from the same token ids, make the same number of updates of as many rows, from the same values; tokens
are counted without padding. Speeds are seconds of 1,000 real tokens, medians of rounds in turn in one process (the 95th
percentile in brackets); memory is measured in fresh processes. `--long` trains a classifier to its end on both sides.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.bases.quiet import quiet

from . import training_accuracy, training_gpu, training_memory, training_plan, training_speed, training_together
from .common import BASE, print_head
from .options import add_options
from .rows import Row, skip
from .training_cases import classify_case, instruct_case
from .training_speed import Seen

ENCODER = "minilm-l6"


@dataclass(frozen=True)
class Sizes:
    """How much is done. The first of the updates is not timed."""

    updates: int = 4
    classifier_updates: int = 17
    rounds: int = 3
    tried_rows: int = 4
    adapters: int = 8
    memory_updates: int = 3


QUICK = Sizes(updates=3, classifier_updates=3, rounds=1, tried_rows=2, adapters=3, memory_updates=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it with these options, by default those of the command line."""
    options = add_options(ArgumentParser()).parse_known_args(arguments)[0]
    sizes = QUICK if options.quick else Sizes()
    kept: list[Row] = []
    base = load_base(BASE)
    print_head("training: ours beside Trainer + PEFT", base)
    with quiet():
        for row in _rows(base, sizes, options.long):
            # Little work judges no goal; that losses are equal holds however little it is.
            kept.append(replace(row, met=None) if options.quick and row.part != training_speed.LOSS else row)
            print(kept[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in kept], indent=2) + "\n")


def _rows(base: Base, sizes: Sizes, long: bool) -> Iterator[Row]:
    seen = Seen()
    yield from training_speed.decoder_rows(base, sizes, seen)
    yield from training_speed.roof_rows(base, seen)
    yield from training_together.rows(base, sizes.adapters, 2 * sizes.updates, sizes.rounds)
    yield from training_memory.rows(instruct_case(base, sizes.memory_updates))
    yield from training_speed.encoder_rows(ENCODER, sizes, seen)
    yield from training_memory.rows(classify_case(load_base(ENCODER), sizes.classifier_updates))
    if long:
        yield from training_accuracy.rows(ENCODER)
    else:
        yield skip(training_accuracy.PART, "accuracy of a classifier trained to its end by both", "only with --long")
    yield from training_speed.quantized_rows(BASE, sizes, seen)
    quantized = load_base(BASE, "nf4")
    yield from training_memory.rows(instruct_case(quantized, sizes.memory_updates, quantize="nf4"))
    yield from training_plan.rows(training_plan.QUICK if sizes is QUICK else training_plan.TRIALS)
    yield from training_gpu.rows(sizes.updates, sizes.rounds)
    least = min(seen.busy)
    yield Row("machine", "least share of its cores that a timed run had", figure=least, told=f"{least:.0%}")
