"""The adapters that are combined: whether they go together, in what order, and what each has a part in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from ..errors import AdapterMismatch, BaseMismatch, NoEffect, Unsupported
from ..formats.specs import FactoredSpec, Ia3Spec, LoraSpec, Spec
from .changes import Change, Changes
from .rules.rule import Rule
from .written import Kin

_SAME_BASE = ("weights", "config", "tokenizer")
_LARGEST = 1e38


@dataclass(frozen=True)
class Part:
    """One member's change of one layer, and the factor it is taken with.

    Attributes:
        key: what its random numbers depend on; each member's own.
    """

    name: str
    key: str
    change: Change
    factor: float


@dataclass(frozen=True)
class Party:
    """All members that take part, in an order that does not depend on the caller's.

    Attributes:
        modules: the parts in each layer that any of them changes; sorted by name.
        embeddings: which of the layers are embeddings.
        specs: of the members.
        notes: what dropped out, and what was approximated before.
        facts: what was computed on the way, which is nothing to worry about.
    """

    modules: dict[str, list[Part]]
    embeddings: dict[str, bool]
    specs: tuple[Spec, ...]
    head: dict[str, torch.Tensor]
    kin: Kin
    notes: tuple[str, ...]
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Member:
    changes: Changes
    weight: float
    key: str

    @property
    def name(self) -> str:
        return self.changes.name


def party_of(given: Sequence[tuple[Changes, float]], rule: Rule, head_of: int | None) -> Party:
    """Check members against each other and put them in order. Raises as `combine`."""
    _check_given(given, rule, head_of)
    everyone = _ordered(given)
    _check_base(everyone)
    factors, facts = _factors(everyone, rule)
    active = [(member, factor) for member, factor in zip(everyone, factors, strict=True) if factor]
    notes = [f"{m.name} has the weight 0 and takes no part." for m, f in zip(everyone, factors, strict=True) if not f]
    if not active:
        raise NoEffect("All weights are 0, so nothing is left.", "Give one of them another weight.")
    modules = _modules(active)
    notes += _told(active, modules)
    whole = given[head_of][0] if head_of is not None else None
    head, owner = _head([member.changes for member, _ in active], whole)
    kin = _kin([member.changes for member, _ in active], owner, notes)
    embeddings = {name: parts[0].change.embedding for name, parts in modules.items()}
    return Party(modules, embeddings, tuple(m.changes.spec for m, _ in active), head, kin, tuple(notes), tuple(facts))


def _check_given(given: Sequence[tuple[Changes, float]], rule: Rule, head_of: int | None) -> None:
    if not given:
        raise Unsupported("There is nothing to combine.", "Name adapters.")
    if rule.members is not None and len(given) != rule.members:
        raise Unsupported(f"{rule.name} takes {rule.members} adapters, not {len(given)}.", "Use linear, or in turns.")
    for changes, weight in given:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            message = f"The weight of {changes.name} is {weight!r}, which is no finite number."
            raise Unsupported(message, "Negative ones subtract.")
    if head_of is not None and not 0 <= head_of < len(given):
        raise Unsupported(f"There is no member {head_of} whose head could come along.", "Count from 0.")


def _ordered(given: Sequence[tuple[Changes, float]]) -> list[_Member]:
    """By digest, else name, and weight: sums are rounded alike and the same values are dropped in any order."""
    named = sorted(((changes.digest or changes.name, float(w), changes) for changes, w in given), key=lambda m: m[:2])
    seen: Counter[str] = Counter()
    found = []
    for key, weight, changes in named:
        found.append(_Member(changes, weight, f"{key}\n{seen[key]}"))
        seen[key] += 1
    return found


def _check_base(members: Sequence[_Member]) -> None:
    """What cards say of the base must agree."""
    marks = [(member, member.changes.base.get("fingerprint")) for member in members]
    known = [(member, mark) for member, mark in marks if isinstance(mark, dict)]
    for member, mark in known[1:]:
        first, other = known[0]
        differing = [key for key in _SAME_BASE if mark.get(key) and other.get(key) and mark[key] != other[key]]
        if differing:
            raise BaseMismatch(
                f"{first.name} and {member.name} are of different bases: their {' and '.join(differing)} differ.",
                "Changes of one base add up, those of two do not. Choose adapters of one base.",
            )


def _factors(members: Sequence[_Member], rule: Rule) -> tuple[list[float], list[str]]:
    weights = [member.weight for member in members]
    if rule.share is None:
        return weights, []
    products = torch.zeros(len(members), len(members), dtype=torch.float64)
    for i, one in enumerate(members):
        for j, other in enumerate(members[: i + 1]):
            products[i, j] = products[j, i] = _inner(one.changes, other.changes)
    factors, told = rule.share(products, weights)
    names = " to ".join(member.name for member in members)
    return factors, [f"{rule.name} from {names}: {told}."]


def _inner(one: Changes, other: Changes) -> float:
    """The inner product of all that two adapters add, biases too, as one long vector."""
    total = []
    for name, change in one.modules.items():
        partner = other.modules.get(name)
        if partner is None:
            continue
        _check_alike(one.name, other.name, name, change, partner)
        total.append(_inner_of(change, partner))
        if change.bias is not None and partner.bias is not None:
            total.append(float(change.bias @ partner.bias))
    return math.fsum(total)


def _inner_of(one: Change, other: Change) -> float:
    if not (one.full or other.full):
        return one.matrix.inner(other.matrix)
    mine = one.streamed()
    theirs = mine if other is one else other.streamed()
    pairs = zip(mine.blocks(), theirs.blocks(), strict=True)
    return math.fsum(float((left * right).sum()) for (_, left), (_, right) in pairs)


def _modules(active: Sequence[tuple[_Member, float]]) -> dict[str, list[Part]]:
    """The union of all members' layers."""
    found: dict[str, list[Part]] = {}
    for member, factor in active:
        for name, change in member.changes.modules.items():
            parts = found.setdefault(name, [])
            if parts:
                _check_alike(parts[0].name, member.name, name, parts[0].change, change)
            _check_size(member, name, change, factor)
            parts.append(Part(member.name, member.key, change, factor))
    return dict(sorted(found.items()))


def _check_alike(one: str, other: str, module: str, mine: Change, theirs: Change) -> None:
    if mine.matrix.shape != theirs.matrix.shape or mine.embedding != theirs.embedding:
        told = sorted((name, list(change.matrix.shape)) for name, change in ((one, mine), (other, theirs)))
        found = " and ".join(f"{shape} in {name}" for name, shape in told)
        raise AdapterMismatch(f"{module} is {found}.", "They were made for different bases.")


def _check_size(member: _Member, module: str, change: Change, factor: float) -> None:
    """Before anything is decomposed, which would end in an error of its own."""
    norms = [float(torch.linalg.matrix_norm(m)) for m in (change.matrix.up, change.matrix.down)]
    norms[1] *= norms[0]
    norms += [] if change.bias is None else [float(change.bias.abs().max())]
    if not all(abs(factor) * norm < _LARGEST for norm in norms):
        message = f"{member.name} times {factor:g} is beyond what float32 holds, at {module}."
        raise AdapterMismatch(message, "Give smaller weights.")


def _told(active: Sequence[tuple[_Member, float]], modules: dict[str, list[Part]]) -> list[str]:
    """Who has no part in some layers, and whose changes are approximations."""
    notes = []
    for member, _ in active:
        absent = len(modules) - len(member.changes.modules)
        if absent:
            notes.append(f"{member.name} has no part in {absent} of {len(modules)} layers.")
        error = error_of(member.changes)
        if error:
            notes.append(f"{member.name} was brought to low rank first, with a relative error of {error:.3g}.")
        if any(change.full for change in member.changes.modules.values()):
            notes.append(
                f"{member.name} is of full rank: of the whole the result is what its rank holds, see its error."
            )
    return notes


def error_of(changes: Changes) -> float:
    """The relative error (Frobenius) of all matrices to those that the adapter really adds."""
    if not any(change.error for change in changes.modules.values()):
        return 0.0
    whole = lost = 0.0
    for change in changes.modules.values():
        square = change.matrix.norm() ** 2 / (1 - change.error**2)
        whole, lost = whole + square, lost + square * change.error**2
    return math.sqrt(lost / whole) if whole else 0.0


def _head(active: Sequence[Changes], chosen: Changes | None) -> tuple[dict[str, torch.Tensor], Changes | None]:
    """The whole tensors that come along, and from whom. They are no changes, so they are not summed."""
    if chosen is not None:
        if not chosen.head:
            raise Unsupported(f"{chosen.name} has no head that could come along.", "Name a member that has one.")
        return chosen.head, chosen
    owners = headed(active)
    if len(owners) > 1:
        raise one_head([own.name for own in owners], [own.head for own in owners], "head_of, its place among them")
    return (owners[0].head, owners[0]) if owners else ({}, None)


def headed(active: Sequence[Changes]) -> list[Changes]:
    """Those that bring a head of their own; one for all where their heads are equal."""
    found = [changes for changes in active if changes.head]
    return found if heads_differ([changes.head for changes in found]) else found[:1]


def heads_differ(heads: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    """Whether two of them, by names inside the base, are not the same."""
    return any(not _equal(heads[0], other) for other in heads[1:])


def one_head(names: Sequence[str], heads: Sequence[Mapping[str, torch.Tensor]], how: str) -> Unsupported:
    """Why heads that differ are not combined.

    Args:
        how: the caller's way to choose one.
    """
    told = f"{', '.join(names)} each bring a head of their own ({next(iter(heads[0]))}), and heads are not summed."
    return Unsupported(told, f"Say whose comes along: {how}.")


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def _kin(active: Sequence[Changes], owner: Changes | None, notes: list[str]) -> Kin:
    """What the result is called and stands on: the owner of the head decides, else whatever all say alike.

    Raises:
        Unsupported: task types that differ, where no head decides and names of layers do not show that classes agree.
    """
    specs = [changes.spec for changes in active]
    tasks = sorted({spec.task_type for spec in specs if spec.task_type})
    task = owner.spec.task_type if owner else None
    if len(tasks) > 1 and (task is None or not _one_class(active)):
        told = ", ".join(f"{changes.name} is {changes.spec.task_type}" for changes in active)
        raise Unsupported(f"Their task types differ: {told}.", "Combine adapters of one task type, or name a head.")
    if len(tasks) > 1:
        notes.append(f"Their task types differ ({', '.join(tasks)}); the result is {task}, as its head.")
    bases = sorted({spec.base_model for spec in specs if spec.base_model})
    if len(bases) > 1:
        notes.append(f"They name different bases: {', '.join(bases)}. Their layers have the same shapes.")
    one = next((spec for spec in [*([owner.spec] if owner else []), *specs] if spec.base_model), specs[0])
    transposed = any(
        spec.options.get("fan_in_fan_out", False) if isinstance(spec, FactoredSpec) else spec.fan_in_fan_out
        for spec in specs
        if isinstance(spec, LoraSpec | FactoredSpec | Ia3Spec)
    )
    saved = owner.spec.modules_to_save if owner else ()
    return Kin(task or (tasks[0] if tasks else None), one.base_model, one.revision, transposed, saved)


def _one_class(active: Sequence[Changes]) -> bool:
    """Whether all members' layers are named as one class of model names them: some layer is everybody's."""
    return bool(set.intersection(*(set(changes.modules) for changes in active)))
