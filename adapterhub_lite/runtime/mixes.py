"""Weighted mixes: several adapters as one, W + w1 dW1 + w2 dW2 + ..., made by putting their matrices side by side.

A low-rank change is a sum over its rank, so the sum of changes is one of more ranks, exactly; a weight is folded into
`up`. What DoRA, IA3 and lora_bias add besides is summed with the same weights. PEFT calls it `cat`
(`add_weighted_adapter`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..adapters.fit import Fitted
from ..adapters.lora import LoraSite
from ..adapters.pack import Group
from ..errors import AdapterMismatch, Unsupported
from ..names import Ref

Mix = Mapping[str, float] | Mapping[Ref, float] | Mapping[str | Ref, float]
Chosen = str | Ref | Mix | None
"""What a row may name: one adapter, adapters with weights, or None for the bare base."""
_FORM = 'Write {"sql": 0.7, "style": 0.3}.'


@dataclass(frozen=True)
class MixRef(Ref):
    """Resolved versions with weights, each once, none of them 0. `digest` depends on these alone, not on the order."""

    members: tuple[tuple[Ref, float], ...] = ()

    @property
    def heaviest(self) -> Ref:
        """The member of the largest weight, the first named of equals: it says how a question is put."""
        return max(self.members, key=lambda member: member[1])[0]

    def __str__(self) -> str:
        return " + ".join(f"{weight:g}*{ref}" for ref, weight in self.members)


def resolve_mix(given: Mapping[Any, Any], resolve: Callable[[Any], Ref | None]) -> Ref | None:
    """The reference of a mix; that of the adapter itself for one of weight 1, and None where all weights are 0.

    Raises:
        Unsupported: no adapters, or a weight that is no finite number.
        NotFound, InvalidName: an adapter that does not exist, also where its weight is 0.
    """
    if not given:
        raise Unsupported("A mix of no adapters.", f"{_FORM} None is the bare base.")
    weights: dict[str, list[float]] = {}
    refs: dict[str, Ref] = {}
    for key, value in given.items():
        weight = _weight(key, value)
        ref = resolve(key)
        for member, share in _members(key, ref):
            assert member.digest is not None
            refs.setdefault(member.digest, member)
            weights.setdefault(member.digest, []).append(weight * share)
    summed = {digest: _finite(refs[digest], _sum_of(some)) for digest, some in weights.items()}
    members = tuple((refs[digest], weight) for digest, weight in summed.items() if weight)
    if not members:
        return None
    if len(members) == 1 and members[0][1] == 1.0:
        return members[0][0]
    text = "\n".join(sorted(f"{ref.digest} {weight.hex()}" for ref, weight in members))
    digest = hashlib.sha256(f"mix\n{text}".encode()).hexdigest()
    return MixRef(" + ".join(f"{weight:g}*{ref}" for ref, weight in members), digest=digest, members=members)


def _sum_of(weights: Sequence[float]) -> float:
    """Rounded once, so that the order of the names does not matter."""
    try:
        return math.fsum(weights)
    except OverflowError:
        return math.inf


def _members(key: Any, ref: Ref | None) -> Iterable[tuple[Ref, float]]:
    if ref is None:
        raise Unsupported("None is no member of a mix: the bare base is under every adapter.", "Leave it out.")
    if isinstance(ref, MixRef):
        return ref.members
    return ((ref, 1.0),)


def _weight(key: Any, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Unsupported(f"The weight of {key} is {value!r}, not a number.", _FORM)
    try:
        return _finite(key, float(value))
    except OverflowError:
        raise Unsupported(f"The weight of {key} is beyond all bounds.", _FORM) from None


def _finite(key: Any, weight: float) -> float:
    if not math.isfinite(weight):
        raise Unsupported(f"The weight of {key} is {weight}.", "Give a finite number; negative ones subtract.")
    return weight


def mix(ref: MixRef, members: Sequence[Fitted], groups: Iterable[Group]) -> Fitted:
    """One fitted adapter of several of one base, in the order of `ref.members`.

    A head, and what stands before a text, is no change of weights and has no share: it comes along whole, with weight
    1, from one member at most. A prefix or prompt comes along as what it is in the bare base.

    Raises:
        Unsupported: two heads, two prefixes, or one of a weight other than 1; changes of a layer that do not add up; an
            adapter that PEFT runs.
        AdapterMismatch: a weight makes infinity of a tensor.
    """
    named = zip(members, (weight for _, weight in ref.members), strict=True)
    weighted = sorted(named, key=lambda part: part[0].digest)  # the order decides how sums are rounded
    for fitted in members:
        if fitted.injected is not None:
            message = f"{ref}: {fitted.name} ({fitted.injected.method}) is computed by PEFT's own layers"
            raise Unsupported(f"{message}, which have no weight in a mix.", "Mix adapters that have a form of ours.")
    headed = _whole(ref, weighted, "a classification head", lambda fitted: fitted.head is not None)
    fronted = _whole(ref, weighted, "virtual tokens (a prefix or prompt)", lambda fitted: fitted.virtual_tokens > 0)
    by_module: dict[nn.Module, list[tuple[LoraSite, float]]] = {}
    for fitted, weight in weighted:
        for module, site in fitted.sites.items():
            by_module.setdefault(module, []).append((site, weight))
    assert ref.digest is not None
    made = Fitted(
        str(ref),
        ref.digest,
        (headed or weighted[0][0]).task_type,
        {module: _mix_site(ref, parts) for module, parts in by_module.items()},
        fronted.prefix if fronted else None,
        headed.head if headed else None,
        sum(fitted.tensors for fitted in members),
        prompt=fronted.prompt if fronted else None,
    ).packed(groups)
    if not made.finite:
        raise AdapterMismatch(f"{ref}: a weight makes infinity of a tensor.", "Give smaller weights.")
    return made


def _whole(
    ref: MixRef, weighted: Sequence[tuple[Fitted, float]], what: str, has: Callable[[Fitted], bool]
) -> Fitted | None:
    """The member that brings what cannot be shared."""
    found = [(fitted, weight) for fitted, weight in weighted if has(fitted)]
    if len(found) > 1:
        names = ", ".join(fitted.name for fitted, _ in found)
        raise Unsupported(f"{ref}: {names} each bring {what}, which cannot be mixed.", "Keep one of them.")
    if not found:
        return None
    fitted, weight = found[0]
    if weight != 1.0:
        message = f"{ref}: {fitted.name} brings {what}, which is there or not: it has no share of {weight:g}."
        raise Unsupported(message, f"Give {fitted.name} the weight 1, or leave it out.")
    return fitted


def _mix_site(ref: MixRef, parts: Sequence[tuple[LoraSite, float]]) -> LoraSite:
    gain = _sum([(site.gain, weight) for site, weight in parts])
    bias = _sum([(site.bias, weight) for site, weight in parts])
    scale = _sum([(site.scale, weight) for site, weight in parts], around=1.0)
    down = torch.cat([site.down for site, _ in parts])
    up = torch.cat([site.up * weight for site, weight in parts], 1)
    if scale is not None:
        if gain is not None:
            raise Unsupported(
                f"{ref}: one member scales the input of a layer (IA3) and another its output (DoRA, IA3), "
                "which do not add up.",
                "Mix adapters of one kind, or merge one of them into the base first.",
            )
        # The layer's input is scaled before `down` sees it, and a sum of changes reads it as it was.
        down = down / scale
        if not bool(torch.isfinite(down).all()):
            raise Unsupported(
                f"{ref}: one member switches off an input of a layer (IA3) that another one's low-rank change reads.",
                "Change the weights a little, or mix adapters of one kind.",
            )
    return LoraSite(down, up, gain, bias, scale)


def _sum(parts: Sequence[tuple[torch.Tensor | None, float]], around: float = 0.0) -> torch.Tensor | None:
    """around + the weighted sum of how far the tensors are from it, in float64; None where there are none."""
    held = [(tensor, weight) for tensor, weight in parts if tensor is not None]
    if not held:
        return None
    total = torch.stack([(tensor.double() - around) * weight for tensor, weight in held]).sum(0) + around
    return total.to(held[0][0].dtype)
