"""What to try first with adapters that are to be combined, from how their changes meet.

It is drawn from weights alone: only answers show which mix is good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conflicts import Meeting, Place

_LOUD, _AGAINST, _ALIKE, _SAME_INPUTS = 3.0, -0.1, 0.5, 0.5  # where the advice changes; docs/decisions.md
_AVERAGE = 1.05  # weights that add up to more do not average
_MEASURED = "`ahl combine` measures that"
_INDEPENDENT = "nearly orthogonal in weights, which does not show that their tasks are independent"


@dataclass(frozen=True)
class Advice:
    """The method to try first, and why, in one sentence.

    Attributes:
        notes: what else decides how they are combined: a head, of which one alone can come along.
    """

    method: str
    why: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What advice is asked for.

    Attributes:
        weights: of each; figures of `whole` are of the changes times these.
        trained_on: digest of each one's training data, "" where it is not known.
        headed: those that bring a head of their own; none where their heads are equal.
    """

    whole: Place
    names: Sequence[str]
    weights: Sequence[float]
    trained_on: Sequence[str]
    headed: Sequence[str]


def advise(asked: Question) -> Advice:
    """What to try first."""
    found = _unmoved(asked) or _subtracted(asked) or _same_data(asked) or _by_figures(asked)
    return Advice(found.method, found.why, _heads(asked.headed))


def _heads(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) < 2:
        return ()
    how = f"`ahl combine ... --head {names[0]}`"
    return (f"{', '.join(names)} each bring a head, and one head alone can come along: {how}.",)


def _unmoved(asked: Question) -> Advice | None:
    still = [name for name, norm in zip(asked.names, asked.whole.norms, strict=True) if not norm]
    if len(asked.names) - len(still) > 1:
        return None
    zero = [name for name, weight in zip(asked.names, asked.weights, strict=True) if not weight]
    told = ", ".join(f"{name} {'has the weight 0' if name in zero else 'changes nothing'}" for name in still)
    return Advice("linear", f"{told}, so there is nothing to settle.")


def _subtracted(asked: Question) -> Advice | None:
    """What is to be forgotten: its change times a negative weight."""
    taken = [
        (name, weight)
        for name, weight, norm in zip(asked.names, asked.weights, asked.whole.norms, strict=True)
        if weight < 0 and norm
    ]
    if not taken:
        return None
    names = [name for name, _ in taken]
    told = ", ".join(f"{name} (weight {weight:g})" for name, weight in taken)
    begun = f"{told} {'is' if len(taken) == 1 else 'are'} subtracted, for forgetting what {_it(taken)}"
    met = [one for one in _met(asked.whole) if (one.a in names) != (one.b in names)]
    worst = min(met, key=_cosine, default=None)
    if worst is None:
        how = "Nothing is added beside"
    elif _cosine(worst) <= _AGAINST:
        kept, lost = (worst.b, worst.a) if worst.a in names else (worst.a, worst.b)
        how = (
            f"{lost} and {kept} agree before weights (cosine {-_cosine(worst):+.2f}), so this takes from {kept} too; "
            "a smaller weight takes less"
        )
    elif max(map(_cosine, met)) < -_AGAINST:
        how = f"The changes are {_INDEPENDENT}, so what is kept may suffer too"
    else:
        alike = max(met, key=_cosine)
        how = (
            f"{alike.a} and {alike.b} are opposite before weights (cosine {-_cosine(alike):+.2f}), so that "
            "subtracting one strengthens the other"
        )
    return Advice("task_arithmetic", f"{begun}: method task_arithmetic with these weights. {how}; {_MEASURED}.")


def _it(taken: Sequence[object]) -> str:
    return "it does" if len(taken) == 1 else "they do"


def _same_data(asked: Question) -> Advice | None:
    """Two seeds of one task are as orthogonal as two tasks, and their effects add up all the same."""
    moving = [i for i, norm in enumerate(asked.whole.norms) if norm]
    marks = asked.trained_on
    first = next((i for i, j in combinations(moving, 2) if marks[i] and marks[i] == marks[j]), None)
    if first is None:
        return None
    same = [i for i in moving if marks[i] == marks[first]]
    names, number = " and ".join(asked.names[i] for i in same), "both" if len(same) == 2 else "all"
    told = f"{names}: {number} were trained on the same data: average them ({1 / len(same):.2g} each)"
    total = math.fsum(asked.weights[i] for i in same)
    times = f"; with these weights what they share is applied {total:g} times" if total > _AVERAGE else ""
    return Advice("linear", f"{told} or take the better one{times}; {_MEASURED}.")


def _by_figures(asked: Question) -> Advice:
    whole, names = asked.whole, asked.names
    known = [norm for norm in whole.norms if norm]
    met = _met(whole)
    worst, alike = min(met, key=_cosine), max(met, key=_cosine)
    if max(known) >= _LOUD * min(known):
        loud, quiet = names[whole.norms.index(max(known))], names[whole.norms.index(min(known))]
        return Advice(
            "linear",
            f"The change of {loud} is {max(known) / min(known):.1f} times that of {quiet} and would drown it out: "
            "combine with method linear, and weights that bring their norms together.",
        )
    if _cosine(worst) <= _AGAINST:
        return Advice(
            "ties",
            f"{worst.a} and {worst.b} pull in opposite directions (cosine {_cosine(worst):+.2f}), so a sum takes from "
            "both: try method ties, which lets the stronger sign of each element stand.",
        )
    if _cosine(alike) >= _ALIKE:
        return Advice(
            "linear",
            f"{alike.a} and {alike.b} say much the same (cosine {_cosine(alike):+.2f}): use method linear with weights "
            "that add up to 1, or what they share counts twice.",
        )
    read = mean(meeting.inputs for meeting in met if meeting.inputs is not None)
    if read is not None and read >= _SAME_INPUTS:
        return Advice(
            "dare_ties",
            f"They read the same inputs (overlap {read:.2f}) and do different things with them: try method dare_ties, "
            "which thins both before it settles signs.",
        )
    how = f"try method linear with these weights (--weights {','.join(f'{weight:g}' for weight in asked.weights)})"
    if _cosine(alike) >= -_AGAINST:
        near = f"{alike.a} and {alike.b} share a part (cosine {_cosine(alike):+.2f}), which a sum counts twice"
        return Advice("linear", f"{near}: {how}, and smaller ones; {_MEASURED}.")
    return Advice("linear", f"They are {_INDEPENDENT}: {how}; {_MEASURED}.")


def _met(whole: Place) -> list[Meeting]:
    return [meeting for meeting in whole.meetings if meeting.cosine is not None]


def _cosine(meeting: Meeting) -> float:
    return meeting.cosine or 0.0


def mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None
