"""Traits of an adapter that some reader does not read as PEFT does: functions that say what they found, or None."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import Unsupported
from ..formats.patterns import first_match
from ..formats.specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec, PromptSpec, Spec
from ..merging.gguf_names import Layout
from .base import BaseFacts, Shape
from .pairs import Pairs

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers on one input that servers fuse into one."""
_FRONT = {
    PrefixSpec: "a prefix: keys and values before the text, not a change of weights",
    PromptSpec: "a prompt: virtual tokens before the text, not a change of weights",
}


@dataclass(frozen=True)
class Asked:
    """What the user wants of an export.

    Attributes:
        max_rank: what the reader's server takes; None: its default.
        rank, error: the largest rank of a module, and the relative error that cutting it may cost.
        base_name: what the reader calls the base.
    """

    max_rank: int | None = None
    rank: int | None = None
    error: float | None = None
    base_name: str | None = None

    @property
    def cuts(self) -> bool:
        """Whether ranks may be cut."""
        return self.rank is not None or self.error is not None


@dataclass(frozen=True)
class Facts:
    """All that rules look at.

    Attributes:
        pairs: the changes of the modules, cut where the user asked for it; empty where the method has none.
        ranks: of the modules before anything was cut.
        missing: layers that a reader wants beside those that the adapter changes; all by the base's names.
        base_name: what will be written as the base's name.
        limit: the largest rank that the reader takes; None: any.
        rank: the one rank that all modules will have.
    """

    spec: Spec
    pairs: Pairs
    ranks: Mapping[str, int]
    base: BaseFacts | None
    asked: Asked
    base_name: str | None
    limit: int | None
    rank: int
    missing: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def cut(self) -> dict[str, float]:
        """Modules that were cut to a smaller rank, and what it cost."""
        return {name: p.error for name, p in self.pairs.modules.items() if p.rank < self.ranks.get(name, 0)}


def _method(facts: Facts) -> str | None:
    front = _FRONT.get(type(facts.spec))
    if front:
        return front
    return f"of method {facts.spec.method}, which only PEFT computes" if isinstance(facts.spec, InjectedSpec) else None


def _dora(facts: Facts) -> str | None:
    return "DoRA: a magnitude for each output" if isinstance(facts.spec, LoraSpec) and facts.spec.use_dora else None


def _ia3(facts: Facts) -> str | None:
    return "IA3: factors, no sum" if isinstance(facts.spec, Ia3Spec) else None


def _factored(facts: Facts) -> str | None:
    return f"peft_type {facts.spec.method}" if isinstance(facts.spec, FactoredSpec) else None


def _lora_bias(facts: Facts) -> str | None:
    return f"biases at {_some(facts.pairs.biases)}" if facts.pairs.biases else None


def _head(facts: Facts) -> str | None:
    return f"a head: {_some(sorted(facts.pairs.heads))}" if facts.pairs.heads else None


def _rank_pattern(facts: Facts) -> str | None:
    if _dora(facts) or _ia3(facts):  # whose ranks are those of our own SVD
        return None
    ranks = set(facts.ranks.values())
    return f"ranks from {min(ranks)} to {max(ranks)}" if len(ranks) > 1 else None


def _alpha_pattern(facts: Facts) -> str | None:
    spec = facts.spec
    if not isinstance(spec, LoraSpec) or not spec.alpha_pattern:
        return None
    keys = {first_match(spec.alpha_pattern, name) for name in facts.pairs.modules}
    alphas = {spec.alpha if key is None else spec.alpha_pattern[key] for key in keys}
    return f"alphas from {min(alphas):g} to {max(alphas):g}" if len(alphas) > 1 else None


def _rslora(facts: Facts) -> str | None:
    return "rsLoRA: scale alpha / sqrt(r)" if isinstance(facts.spec, LoraSpec) and facts.spec.use_rslora else None


def _rank_limit(facts: Facts) -> str | None:
    most = max(facts.ranks.values(), default=0)
    if not facts.limit or max(most, facts.rank) <= facts.limit:
        return None
    if facts.asked.max_rank is not None and most <= facts.limit:
        return f"rank {most}, padded to {facts.rank},"
    return f"rank {max(most, facts.rank)}"


def _padded_rank(facts: Facts) -> str | None:
    ranks = {pair.rank for pair in facts.pairs.modules.values()}
    return f"rank {max(ranks)}" if ranks and facts.rank > max(ranks) else None


def _key_prefix(facts: Facts) -> str | None:
    base = facts.base
    renamed = [name for name in facts.pairs.modules if base and base.served_name(name) not in (None, name)]
    return f"names as another class has them: {_some(renamed)}" if renamed else None


def _architecture(facts: Facts) -> str | None:
    if facts.base is None:
        return "a base whose configuration is not at hand"
    try:
        Layout.of(facts.base.config)
    except Unsupported as error:
        return error.message.removesuffix(".")
    return None


def _module(facts: Facts) -> str | None:
    base, modules = facts.base, facts.pairs.modules
    if base is None:
        return None
    unknown = [name for name in modules if base.served_name(name) is None]
    if unknown:
        return f"modules that the base does not have: {_some(unknown)}"
    shapes = {name: (pair.down.shape[1], pair.up.shape[0]) for name, pair in modules.items()}
    other = [name for name, shape in shapes.items() if base.served[base.served_name(name) or name] != shape]
    return f"modules of another shape than the base's: {_some(other)}" if other else None


def _missing(facts: Facts) -> str | None:
    """Layers that must be there beside those that are changed; without a base nobody knows their shapes."""
    if facts.missing:
        return f"no change at {_some(facts.missing)}"
    return None


def _siblings(facts: Facts) -> str | None:
    if facts.base is not None:
        return _missing(facts)
    lacking = list(lacking_siblings(facts.pairs.modules))
    return f"no change at {_some(lacking)}" if lacking else None


def _layers(facts: Facts) -> str | None:
    return _missing(facts) if facts.base is not None else "layers of a base that is not at hand"


def _embedding(facts: Facts) -> str | None:
    embedded = [name for name, pair in facts.pairs.modules.items() if pair.embedding]
    return f"an embedding: {_some(embedded)}" if embedded else None


def _tied_output(facts: Facts) -> str | None:
    modules = facts.pairs.modules.items()
    tied = [name for name, pair in modules if pair.embedding or name.rpartition(".")[2] in ("lm_head", "embed_out")]
    return (
        f"{_some(tied)}, where embedding and output layer are one" if tied and facts.base and facts.base.tied else None
    )


def _conv1d(facts: Facts) -> str | None:
    return "a GPT-2 base (Conv1D)" if facts.base and facts.base.conv1d else None


def _base_name(facts: Facts) -> str | None:
    if facts.base_name is None:
        return "no name of the base"
    if facts.base_name.startswith(("/", "~", ".", "\\")):
        return f"a path of this machine as the base's name, {facts.base_name}"
    stored = facts.spec.base_model
    return None if facts.base_name == stored else f"{stored or 'nothing'} as the base's name"


TRAITS: dict[str, Callable[[Facts], str | None]] = {
    "method": _method,
    "dora": _dora,
    "ia3": _ia3,
    "factored": _factored,
    "lora_bias": _lora_bias,
    "head": _head,
    "rslora": _rslora,
    "alpha_pattern": _alpha_pattern,
    "rank_pattern": _rank_pattern,
    "padded_rank": _padded_rank,
    "rank_limit": _rank_limit,
    "architecture": _architecture,
    "module": _module,
    "key_prefix": _key_prefix,
    "siblings": _siblings,
    "layers": _layers,
    "embedding": _embedding,
    "tied_output": _tied_output,
    "conv1d": _conv1d,
    "base_name": _base_name,
}
"""Rule -> what it looks for. What a reader does with it, `readers` says."""


def lacking_siblings(modules: Mapping[str, object]) -> Iterator[str]:
    """Modules that are not changed although one is that a server fuses them with."""
    for group in SIBLINGS:
        for name in [name for name in modules if name.rpartition(".")[2] in group]:
            stem = name.rpartition(".")[0]
            for other in group:
                sibling = f"{stem}.{other}" if stem else other
                if sibling not in modules:
                    yield sibling


def lacking_layers(modules: Mapping[str, object], base: BaseFacts) -> Iterator[str]:
    """Modules of the base that are called as a changed one is, in layers that the adapter leaves alone."""
    kinds = {_kind(name) for name in modules}
    yield from (name for name in base.served if name not in modules and _kind(name) in kinds)


def _kind(name: str) -> str:
    """A module's path without the number of its layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _some(names: object) -> str:
    listed = list(dict.fromkeys(names))  # type: ignore[call-overload]
    more = f" and {len(listed) - 2} more" if len(listed) > 2 else ""
    return ", ".join(map(str, listed[:2])) + more
