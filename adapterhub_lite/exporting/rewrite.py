"""An adapter as a reader wants it: one rank, every scale folded into B, so that alpha = r; names and layers as served.

A fold is exact where the scale is a power of two. Else it is computed in float64 and rounded once; where that would
cost more than float32's rounding, the whole file is written in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import PREFIX
from ..formats.adapter_files import A_SUFFIX, B_SUFFIX
from ..formats.specs import LoraSpec, PrefixSpec, PromptSpec
from .lint import kept_as_stored
from .pairs import Pair
from .readers import Reader
from .traits import Facts


def rewritten(adapter: Adapter, facts: Facts, reader: Reader) -> Adapter:
    """The adapter to be written; only for facts without a refusal."""
    base_model = facts.base_name or adapter.spec.base_model
    if not reader.plain:
        return replace(adapter, spec=replace(adapter.spec, base_model=base_model), card=None)
    assert not isinstance(adapter.spec, PrefixSpec | PromptSpec)
    pairs = served_pairs(facts)
    alpha = float(facts.rank)
    if kept_as_stored(facts, reader):
        alpha = _stored_alpha(alpha, next(iter(pairs.values())).scale, adapter.spec)
    else:
        pairs = same_dtype({name: padded(folded(pair), facts.rank) for name, pair in pairs.items()})
    spec = LoraSpec(
        rank=facts.rank,
        alpha=alpha,
        target_modules=targets(facts, reader, pairs),
        fan_in_fan_out=_fan_in_fan_out(facts),
        modules_to_save=adapter.spec.modules_to_save if facts.pairs.heads else (),
        task_type="CAUSAL_LM" if _is_renamed(facts) else adapter.spec.task_type,
        base_model=base_model,
        revision=adapter.spec.revision,
    )
    return Adapter(spec, {**_tensors(pairs), **facts.pairs.heads}, name=adapter.name, finite=adapter.finite)


def _stored_alpha(rank: float, scale: float, spec: object) -> float:
    """The alpha that gives this scale: the version's own where it does, so that no division rounds it."""
    own = spec.alpha if isinstance(spec, LoraSpec) else 0.0
    return own if own / rank == scale else float(f"{rank * scale:.12g}")


def served_pairs(facts: Facts) -> dict[str, Pair]:
    """All pairs by the names that the server has, and pairs of zeros where it wants some."""
    base = facts.base
    named = {(base.served_name(name) or name) if base else name: pair for name, pair in facts.pairs.modules.items()}
    dtype = next(iter(named.values())).up.dtype
    for name, (n_in, n_out) in facts.missing.items():
        down, up = torch.zeros(facts.rank, n_in, dtype=dtype), torch.zeros(n_out, facts.rank, dtype=dtype)
        named[name] = Pair(down, up, 1.0)
    return dict(sorted(named.items()))


def folded(pair: Pair) -> Pair:
    """The same change with scale 1; in float32 where a shorter dtype would round what was exact."""
    if pair.scale == 1.0:
        return pair
    exact = pair.up.double() * pair.scale
    short = exact.to(pair.up.dtype)
    if pair.up.dtype.itemsize < 4 and not torch.equal(short.double(), exact):
        short = exact.to(torch.float32)
    return replace(pair, up=short, scale=1.0)


def padded(pair: Pair, rank: int) -> Pair:
    """The same change with rows and columns of zeros up to `rank`."""
    more = rank - pair.rank
    if more <= 0:
        return pair
    down = torch.cat([pair.down, pair.down.new_zeros(more, pair.down.shape[1])], 0)
    up = torch.cat([pair.up, pair.up.new_zeros(pair.up.shape[0], more)], 1)
    return replace(pair, down=down, up=up)


def same_dtype(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """All matrices in the widest dtype of any: readers multiply one with the other as they are."""
    widest = torch.float16 if not pairs else next(iter(pairs.values())).up.dtype
    for pair in pairs.values():
        widest = torch.promote_types(widest, torch.promote_types(pair.up.dtype, pair.down.dtype))
    return {name: replace(pair, down=pair.down.to(widest), up=pair.up.to(widest)) for name, pair in pairs.items()}


def targets(facts: Facts, reader: Reader, pairs: Mapping[str, Pair]) -> tuple[str, ...]:
    """`target_modules`, sorted: last names where they name exactly these modules, or where the reader wants them so."""
    last = sorted({name.rpartition(".")[2] for name in pairs})
    if facts.base is not None:
        named = {name for name in facts.base.served if name.rpartition(".")[2] in last}
        exact = named == set(pairs)
    else:
        exact = set(facts.spec.target_modules) == set(last)  # type: ignore[union-attr]
    return tuple(last if exact or reader.fills == "siblings" else sorted(pairs))


def _tensors(pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        kind = "embedding" if pair.embedding else "linear"
        tensors[PREFIX + name + A_SUFFIX[kind]] = pair.down.contiguous()  # type: ignore[index]
        tensors[PREFIX + name + B_SUFFIX[kind]] = pair.up.contiguous()  # type: ignore[index]
    return tensors


def _is_renamed(facts: Facts) -> bool:
    base = facts.base
    return base is not None and any(base.served_name(name) not in (None, name) for name in facts.pairs.modules)


def _fan_in_fan_out(facts: Facts) -> bool:
    return bool(getattr(facts.spec, "fan_in_fan_out", False)) or (facts.base is not None and facts.base.conv1d)
