"""Combine stored versions of one base into a new version: proven, measured on its parents' test sets, and stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from ..adapters.adapter import Adapter
from ..bases.load import Base
from ..combining.changes import Changes, changes_of, check_additive, head_of
from ..combining.combine import Options
from ..combining.combine import combine as combine_changes
from ..combining.members import heads_differ, one_head
from ..combining.rules import RULES
from ..combining.terms import weighted_sum
from ..errors import Unsupported
from ..events import Listener, Stage, ignore
from ..names import Ref, check_name
from ..store import Store
from .combine_base import FrozenWeights, Ground, ground_of
from .combine_members import Member, Weighted, check_one_base, members_of, primary_of
from .combine_publish import Made, Making, check_size, put_made
from .combine_setting import ROWS, Setting

_LONGEST_NAME = 64
_WHOLE = ("task_arithmetic", "ties", "dare_ties")  # they add tasks, or take means: 1 each by default; others share 1
_USED = {  # options that have a part in a method's result, beside rank and error
    "ties": ("density", "majority_sign"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "majority_sign", "seed"),
    "magnitude_prune": ("density",),
}


def combine(
    adapters: Weighted,
    method: str = "linear",
    *,
    weights: Sequence[float] | None = None,
    name: str | None = None,
    rank: int | None = None,
    error: float | None = None,
    density: float = Options.density,
    seed: int = 0,
    majority_sign: str = "total",
    head: str | Ref | None = None,
    store: Store | None = None,
    base: Base | str | None = None,
    quantize: str | None = None,
    device: str = "auto",
    evaluate: bool = True,
    rows: int = ROWS,
    on_event: Listener = ignore,
) -> Ref:
    """Combine versions of one base into a new version, whose card has its parents, weights and errors.

    Before it is stored it must move logits, and its parents' test sets are answered by each parent alone and by it;
    both go into the card. A parent that was measured in this store on the same rows is not measured again. Without the
    base on this disk it is stored unmeasured, and its card says so.

    Args:
        adapters: references, pairs of reference and weight, or a mapping of both; weights may be negative.
        method: linear (the exact sum), cat, svd, ties, dare_linear, dare_ties, magnitude_prune, slerp or
            task_arithmetic.
        weights: one for each; by default equal ones that add up to 1, or 1 each for task_arithmetic and both ties.
        name: of the new version; by default made of the parents' names.
        rank, error: the rank that the result is brought to, or the relative error that it may have.
        density: the share of elements that ties, DARE and magnitude_prune keep.
        head: the member whose classification head is kept, where several have one.
        base: their base, loaded or by name; needed where a card does not tell its fingerprint.
        evaluate: False stores it without a base, unmeasured.
        rows: most rows of each parent's test set to measure on, evenly over all of them; 0: none.

    Raises:
        BaseMismatch: the adapters are of different bases.
        Unsupported: an adapter that is no change of weights, an unknown method, options that contradict each other.
        NoEffect: the sum moves no logit.
    """
    options = Options(rank=rank, error=error, density=density, seed=seed, majority_sign=majority_sign)  # type: ignore[arg-type]
    setting = Setting(store if store is not None else Store(), base, quantize, device, evaluate, rows, on_event)
    return make_combined(adapters, method, options, setting, weights=weights, name=name, head=head).ref


def make_combined(
    adapters: Weighted,
    method: str,
    options: Options,
    setting: Setting,
    *,
    weights: Sequence[float] | None = None,
    name: str | None = None,
    head: str | Ref | None = None,
    choose_head: str = 'head="{}"',
) -> Made:
    """As `combine`, with all that was found on the way.

    Args:
        choose_head: how the caller would name the member whose head is kept.
    """
    started, store, on_event = time.perf_counter(), setting.store, setting.on_event
    setting.check()
    _check_method(method)
    check_size(options.rank, options.error)
    options.check(RULES[method])
    members = members_of(store, adapters, weights, 1.0 if method in _WHOLE else None)
    name = check_name(name) if name is not None else _name_of(members)
    owner = _head_of(store, members, head)
    if not isinstance(setting.base, str):  # one that is named is loaded, which takes a while
        check_one_base(members, setting.base)
    read = [member.adapter(store) for member in members]
    for adapter in read:
        check_additive(adapter)
    _check_alone(members, method, options)
    if owner is not None and not head_of(read[owner]):
        raise Unsupported(f"{members[owner]} has no head that could be kept.", "Name one that has, or none.")
    if owner is None:
        _check_heads(members, read, choose_head)
    store.prepare()
    ground = ground_of(members, setting.base, setting.quantize, setting.device, on_event)
    on_event(Stage(f"combining {weighted_sum((one, one.weight) for one in members)} by {method}"))
    changes = [
        (changes_in(member, adapter, ground, whole=True), member.weight)
        for member, adapter in zip(members, read, strict=True)
    ]
    combined = combine_changes(changes, method, options, head_of=owner, on_event=on_event)
    headed = [member for member, (own, _) in zip(members, changes, strict=True) if own.head]
    primary = members[owner] if owner is not None else primary_of(headed or members)
    making = Making(
        name=name,
        members=members,
        primary=primary,
        origin=_origin(method, options, members, owner),
        started=started,
        seed=options.seed if "seed" in _USED.get(method, ()) else None,
    )
    return put_made(combined, making, ground, setting)


def changes_in(member: Member, adapter: Adapter, ground: Ground, *, whole: bool = False) -> Changes:
    """The member's changes of weights; of DoRA and IA3 with the frozen weights, where they are on this disk.

    Args:
        whole: these are not brought to low rank; their frozen weights are read anew when a layer is computed.
    """
    frozen = FrozenWeights(member, ground.folder, adapter.spec.task_type) if ground.folder is not None else None
    return changes_of(adapter, frozen, bias_of=frozen.bias if frozen else None, whole=whole)


def _check_alone(members: Sequence[Member], method: str, options: Options) -> None:
    """One adapter as it is would be stored again under another name."""
    sized = options.rank is not None or options.error is not None
    thinned = "density" in _USED.get(method, ()) and options.density < 1
    needs_more = RULES[method].members is not None  # and says so itself
    moving = [member for member in members if member.weight]
    if len(moving) == 1 and moving[0].weight == 1 and not (sized or thinned or needs_more):
        zero = ", ".join(str(member) for member in members if not member.weight)
        others = f"With the weight 0 of {zero}, " if zero else ""
        raise Unsupported(
            f"{others}{moving[0]} alone, with weight 1, would be stored again as it is.",
            "Name another adapter, give a weight other than 1, a rank or an error; `ahl alias` gives it another name.",
        )


def _check_heads(members: Sequence[Member], read: Sequence[Adapter], choose: str) -> None:
    """Before anything is computed; of members that take part."""
    found = [(str(member), head_of(adapter)) for member, adapter in zip(members, read, strict=True) if member.weight]
    found = [(name, head) for name, head in found if head]
    names, heads = [name for name, _ in found], [head for _, head in found]
    if heads_differ(heads):
        raise one_head(names, heads, " or ".join(choose.format(name) for name in names[:3]))


def _check_method(method: str) -> None:
    if method not in RULES:
        near = get_close_matches(method, RULES, 1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise Unsupported(f"There is no method {method!r}.", f"{guess}There are {', '.join(RULES)}.")


def _origin(method: str, options: Options, members: Sequence[Member], owner: int | None) -> dict[str, Any]:
    used = ("rank", "error", *_USED.get(method, ()))
    return {
        "kind": "combined",
        "method": method,
        "weights": [member.weight for member in members],
        "options": {key: value for key, value in asdict(options).items() if key in used and value is not None},
        **({"head": str(members[owner])} if owner is not None else {}),
    }


def _head_of(store: Store, members: Sequence[Member], head: str | Ref | None) -> int | None:
    if head is None:
        return None
    wanted = store.resolve(head)
    found = next((i for i, member in enumerate(members) if member.ref.digest == wanted.digest), None)
    if found is None:
        told = ", ".join(map(str, members))
        raise Unsupported(f"{head} is not among the adapters, so its head cannot be kept.", f"Name one of {told}.")
    return found


def _name_of(members: Sequence[Member]) -> str:
    names = dict.fromkeys(member.ref.name for member in members)
    joined = f"{'-'.join(names)}-mix"
    return joined if len(joined) <= _LONGEST_NAME else f"{next(iter(names))[: _LONGEST_NAME - 4]}-mix"
