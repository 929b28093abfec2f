"""Adapters whose base was quantised when they were trained: on its other weights they answer otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..bases.quantization import QUANTIZATIONS
from ..merging.report import likeliest
from .findings import Finding, one_of
from .readers import Reader

RULE = "base_quantization"


def is_quantized(kind: object) -> bool:
    """Whether a card's quantisation is one that changes weights."""
    return kind != "none" and kind in QUANTIZATIONS


def quantized_base(
    kind: object, base: str, ref: str, reader: Reader, measured: str | None, *, merges: bool = True
) -> Finding | None:
    """The warning for every reader; None for an adapter of unquantised weights.

    Args:
        kind: the base's quantisation, as the card says it.
        measured: what `measured_original` found.
        merges: whether it is of a method that can be merged.
    """
    if not is_quantized(kind):
        return None
    merge = f"ahl merge {ref} --out DIR"
    known = f"a merge measured {measured}" if measured else f"how far, `{merge}` measures" if merges else ""
    what = f"it was trained on {kind} weights of {base}; on the unquantised weights it answers otherwise"
    loads = reader.quantized.get(str(kind))
    gguf = " --to gguf-q8_0" if reader.form == "gguf" else ""
    ways = [f"load the base in {kind} with it, in {reader.name} by {loads}"] if loads else []
    ways += [f"serve what `{merge}{gguf}` writes"] if merges else []
    done = one_of(ways) or f"Serve it here, or with PEFT on a base in {kind}."
    return Finding(RULE, "warning", f"{what}{': ' if known else ''}{known}.", "told", done)


def quantized_advice(findings: Sequence[Finding], reader: Reader, kind: object) -> list[Finding]:
    """The same findings; a command that serves the base has the option by which it is loaded as it was."""
    option = reader.quantized.get(str(kind), "").partition(" (")[0]
    if not option.startswith("--"):
        return list(findings)
    return [
        replace(one, what=one.what.replace("BASE ", f"BASE {option} ", 1)) if one.rule == "advice" else one
        for one in findings
    ]


def measured_original(reports: Sequence[Mapping[str, Any]], digest: str | None, kind: object) -> str | None:
    """What the latest merge report measured of a version, and of it alone, on unquantised weights.

    Args:
        reports: contents of merge_report.json, oldest first.
        digest: the version's.
        kind: the quantisation that it was trained with.
    """
    for report in reversed(reports):
        if report.get("digest") != digest or report.get("quantization") != kind or not _is_plain(report):
            continue
        bakes = report.get("bakes")
        for bake in bakes if isinstance(bakes, list) else ():
            if isinstance(bake, Mapping) and bake.get("bake") == "original":
                found = _figures(bake.get("difference"), report.get("task_type"))
                if found is not None:
                    return found
    return None


def _is_plain(report: Mapping[str, Any]) -> bool:
    """Whether it is of one adapter at its full weight, in weights that the merge did not quantise again."""
    members = report.get("adapters")
    if report.get("to") in ("nf4", "int8") or not isinstance(members, list) or len(members) != 1:
        return False
    return isinstance(members[0], Mapping) and members[0].get("weight") == 1


def _figures(difference: object, task_type: object) -> str | None:
    if not isinstance(difference, Mapping):
        return None
    kl, same = difference.get("mean_kl"), difference.get("top1_agreement")
    if not isinstance(kl, int | float) or not isinstance(same, float) or not 0 <= same <= 1 or not kl >= 0:
        return None
    return f"{same:.1%} {likeliest(task_type)}, KL {kl:.2g} nats"
