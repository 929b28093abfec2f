"""From a version to what a reader gets: its findings and, where none is a refusal, the adapter to be written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..adapters.adapter import Adapter
from ..adapters.lora import split_tensors
from ..errors import Unsupported
from ..formats.specs import InjectedSpec, LoraSpec, PrefixSpec, PromptSpec
from ..merging.weights import Weights
from .base import BaseFacts, Shape
from .findings import Finding, refusals
from .lint import lint
from .pairs import Pair, Pairs, is_exact, pairs_of, total
from .readers import Reader, as_cut
from .rewrite import rewritten, served_pairs
from .traits import Asked, Facts, lacking_layers, lacking_siblings

FREE_RANK = 64
"""Rank that DoRA and IA3 are brought to for a reader without a limit, where the user names neither rank nor error."""


@dataclass(frozen=True)
class Layer:
    """One module of the file: its rank there, and the relative Frobenius error to the version's change."""

    module: str
    rank: int
    error: float


@dataclass(frozen=True)
class Prepared:
    """What would be written.

    Attributes:
        adapter: None where a finding is a refusal.
        source: the version's changes, by the names that the file has.
    """

    facts: Facts
    findings: list[Finding]
    adapter: Adapter | None
    source: Mapping[str, Pair]

    def layers(self, written: Mapping[str, Pair]) -> tuple[Layer, ...]:
        """Every module of a file against the version, in float64."""
        found = ((name, pair.rank, *self._lost(name, pair)) for name, pair in written.items())
        return tuple(Layer(name, rank, lost / norm if norm else lost) for name, rank, lost, norm in found)

    def error(self, written: Mapping[str, Pair]) -> float:
        """The relative error of all modules as one; infinite where one is missing."""
        if set(written) != set(self.source):
            return math.inf
        return total(self._lost(name, pair) for name, pair in written.items())

    def _lost(self, name: str, found: Pair) -> tuple[float, float]:
        """The Frobenius norm of what a module's change differs by, and of the change."""
        source = self.source[name]
        rounded = found.exact.plus([source.exact.scaled(-1.0)]).norm()
        return math.hypot(rounded, source.error * source.norm), source.norm


def prepare(
    adapter: Adapter,
    reader: Reader,
    asked: Asked,
    *,
    base: BaseFacts | None = None,
    weights: Weights | None = None,
    base_name: str | None = None,
) -> Prepared:
    """Look at an adapter as `reader` would, and rewrite it so that it computes what it was trained to.

    Args:
        base: facts of its base; None where it is not at hand.
        weights: the base's weights, for DoRA and IA3.
        base_name: the name to write into the file.

    Raises:
        Unsupported: options that the reader does not have.
    """
    limit = reader.checked_limit(asked.max_rank)
    if not reader.plain and not asked.cuts:
        return _as_stored(adapter, reader, asked, base, base_name)
    reader = as_cut(reader)
    if asked.rank is not None and limit is not None and asked.rank > limit:
        raise Unsupported(f"{reader.name} takes ranks up to {limit}, not {asked.rank}.", f"Use --rank {limit}.")
    source = _source(adapter, asked, limit or FREE_RANK, weights)
    cut = source
    if asked.cuts and is_exact(adapter):
        modules = {name: pair.truncated(asked.rank, asked.error) for name, pair in source.modules.items()}
        cut = replace(source, modules=modules)
    ranks = {name: pair.rank for name, pair in source.modules.items()}
    rank = reader.padded(max([1, *(pair.rank for pair in cut.modules.values())]))
    facts = Facts(adapter.spec, cut, ranks, base, asked, base_name, limit, rank)
    facts = replace(facts, missing=_missing(facts, reader))
    findings = lint(facts, reader)
    if refusals(findings):
        return Prepared(facts, findings, None, {})
    return Prepared(facts, findings, rewritten(adapter, facts, reader), served_pairs(replace(facts, pairs=source)))


def _as_stored(
    adapter: Adapter, reader: Reader, asked: Asked, base: BaseFacts | None, base_name: str | None
) -> Prepared:
    """For a reader of all that PEFT writes: nothing is changed but the name of the base."""
    pairs = _visible(adapter)
    ranks = {name: pair.rank for name, pair in pairs.modules.items()}
    facts = Facts(adapter.spec, pairs, ranks, base, asked, base_name, None, max([1, *ranks.values()]))
    findings = lint(facts, reader)
    made = None if refusals(findings) else rewritten(adapter, facts, reader)
    plain = isinstance(adapter.spec, LoraSpec) and not adapter.spec.use_dora
    return Prepared(facts, findings, made, pairs.modules if plain else {})


def _visible(adapter: Adapter) -> Pairs:
    """What can be seen of any adapter without its base: LoRA's matrices, and its heads."""
    spec = adapter.spec
    if isinstance(spec, LoraSpec) and not spec.use_dora:
        return pairs_of(adapter)
    if isinstance(spec, LoraSpec):
        parts, heads = split_tensors(adapter.tensors)
        modules = {name: Pair(part["A"], part["B"], spec.scaling(name, len(part["A"]))) for name, part in parts.items()}
        return Pairs(modules, (), heads)
    saved = spec.modules_to_save
    heads = {key: t for key, t in adapter.tensors.items() if any(f".{name}." in key for name in saved)}
    return Pairs({}, (), heads)


def _source(adapter: Adapter, asked: Asked, limit: int, weights: Weights | None) -> Pairs:
    """The version's changes; none where its method has no such form, or needs weights that are not at hand."""
    if isinstance(adapter.spec, PrefixSpec | PromptSpec | InjectedSpec):
        return Pairs({}, (), {})
    if not is_exact(adapter) and weights is None:
        return Pairs({}, (), {})
    return pairs_of(adapter, weights, asked.rank if asked.cuts else limit, asked.error)


def _missing(facts: Facts, reader: Reader) -> dict[str, Shape]:
    """Layers that must have matrices of zeros, with their shapes."""
    base = facts.base
    if base is None or reader.fills is None or not facts.pairs.modules:
        return {}
    served = {base.served_name(name) or name: pair for name, pair in facts.pairs.modules.items()}
    wanted = lacking_siblings(served) if reader.fills == "siblings" else lacking_layers(served, base)
    return {name: base.served[name] for name in wanted if name in base.served}
