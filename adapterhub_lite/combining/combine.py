"""Several adapters of one base as one LoRA adapter, by a rule, with the error of each layer said.

Rules that sum work on thin factors, or on rows where a member is of full rank (`sums`).
Rules on values (TIES, DARE, pruning) mean the true changes up @ down, whose rows are formed in blocks that are thrown
away; their results are of no low rank, so they are brought to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..errors import NoEffect, Unsupported
from ..events import Listener, Note, Progress, ignore
from ..formats.peft_config import MAX_RANK
from .changes import Changes
from .members import Part, Party, party_of
from .rules import RULES
from .rules.dare import dropped, stream
from .rules.prune import trimmed
from .rules.rule import Majority, Rule, added
from .streamed import Streamed, brought_to_rank, largest
from .sums import Result, stored, summed, summed_whole
from .written import Written, lora_adapter, target_names

_LOSSY = 1e-3  # relative error of storing that a person should know of
_FLOAT32 = 1e-7  # relative error that storing factors makes at most, where nothing cancels


@dataclass(frozen=True)
class Options:
    """What rules may be told.

    Attributes:
        rank: at most this one in every layer. None: see `Rule.keeps`.
        error: the largest relative error of a layer, which gets the least rank within it.
        density: the share of values that TIES, DARE and pruning keep of each member.
        seed: of what DARE drops.
        majority_sign: how TIES elects: the sign of the sum, or that of most.
    """

    rank: int | None = None
    error: float | None = None
    density: float = 0.5
    seed: int = 0
    majority_sign: Majority = "total"

    def check(self, rule: Rule) -> None:
        """Raise Unsupported for what is out of range or has no meaning for a rule."""
        self.check_size()
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise Unsupported(f"{self.density!r} is no share of values.", "Give more than 0 and at most 1.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise Unsupported(f"A seed is a whole number, and {self.seed!r} is none.", "Give 0, for example.")
        if self.majority_sign not in ("total", "frequency"):
            raise Unsupported(f"{self.majority_sign!r} is no way to elect a sign.", "Use total or frequency.")
        if rule.keeps == "all" and (self.rank is not None or self.error is not None):
            raise Unsupported(f"{rule.name} keeps all ranks as they are.", "Use svd for a rank or an error.")

    def check_size(self) -> None:
        """Raise Unsupported for a rank or an error that is out of range."""
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool)):
            raise Unsupported(f"A rank is a whole number, and {self.rank!r} is none.", "Give 1 or more.")
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise Unsupported(f"A rank of {self.rank} cannot be stored.", f"Give 1 to {MAX_RANK}.")
        if self.error is not None and not _is_number(self.error):
            raise Unsupported(f"A relative error is a number, and {self.error!r} is none.", "Give a share, as 0.01.")
        if self.error is not None and not 0 < self.error < 1:
            raise Unsupported(f"{self.error:g} is no relative error.", "Give more than 0 and less than 1: 0.01 is 1 %.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Layer:
    """One layer of the result: its rank, and the relative error (Frobenius) of what is stored.

    The error is that to the rule's exact result on what the members truly add, whatever their rank.
    """

    module: str
    rank: int
    error: float
    members: tuple[str, ...]


@dataclass(frozen=True)
class Combined:
    """An adapter made of others.

    Attributes:
        error: relative error of all layers as one vector.
        weights: the members as they were named, with the weights that were given.
        notes: what a person should know: who dropped out, which layers cancel, what was approximated before.
    """

    adapter: Adapter
    layers: list[Layer]
    error: float
    method: str
    weights: tuple[tuple[str, float], ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain form, without tensors."""
        return {
            "method": self.method,
            "weights": [{"name": name, "weight": weight} for name, weight in self.weights],
            "error": self.error,
            "layers": [asdict(layer) for layer in self.layers],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For a person to read: members, ranks, errors, notes."""
        ranks = [layer.rank for layer in self.layers]
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        found = [
            f"{self.method} of {' + '.join(f'{weight:g}*{name}' for name, weight in self.weights)}",
            f"{len(ranks)} layers of rank {span}, relative error {self.error:.3g}",
        ]
        worst = sorted((layer for layer in self.layers if layer.error > 1e-6), key=lambda layer: -layer.error)[:3]
        found += [f"  {layer.module}: {layer.error:.3g} at rank {layer.rank}" for layer in worst]
        return [*found, *self.notes]


def combine(
    members: Sequence[tuple[Changes, float]],
    method: str,
    options: Options | None = None,
    *,
    head_of: int | None = None,
    on_event: Listener = ignore,
) -> Combined:
    """Combine the changes of adapters by a rule of `RULES`.

    The order of the members changes nothing. A member of weight 0 takes no part; layers that come to nothing are left
    out; both are told, as notes and to `on_event`.

    Args:
        members: changes with their weights, any finite numbers.
        head_of: index of the member whose head comes along, where heads differ.

    Raises:
        Unsupported: an unknown rule, options or weights it has no meaning for, heads that differ and none is chosen.
        Unsupported: a wished error that float32 cannot keep, since the changes nearly cancel.
        AdapterMismatch: members whose layers differ in shape, or values that float32 cannot hold.
        BaseMismatch: cards that name different bases.
        NoEffect: nothing is left.
    """
    options = options or Options()
    rule = RULES.get(method)
    if rule is None:
        raise Unsupported(f"There is no rule {method!r}.", f"Use {', '.join(RULES)}.")
    options.check(rule)
    party = party_of(members, rule, head_of)
    results: dict[str, Result] = {}
    adding = rule.merge is None or (rule.merge is added and options.density == 1)
    for name, result in (
        _summed(party, rule, options, on_event) if adding else _by_value(party, rule, options, on_event)
    ):
        _check_error(name, result, options.error if options.rank is None else None)
        results[name] = result
    biases = {name: _bias(party, name, rule, options, adding) for name in party.modules}
    kept = {
        name: Written(results[name].matrix, biases[name], party.embeddings[name])
        for name in party.modules
        if results[name].matrix.rank or biases[name] is not None
    }
    gone = [name for name in party.modules if name not in kept]
    notes = [*party.notes, *_cancelled(gone, len(party.modules)), *_rounded(results)]
    if not kept:
        raise NoEffect("Nothing is left: in every layer the changes come to zero.", "Give other weights.")
    _tell(party.facts, notes, on_event)
    title = f"{method} of {' + '.join(f'{weight:g}*{changes.name}' for changes, weight in members)}"
    targets = target_names(kept, gone, party.specs)
    adapter = lora_adapter(title, kept, party.kin, targets, party.head)
    layers = [
        Layer(name, max(1, written.matrix.rank), results[name].error, tuple(part.name for part in party.modules[name]))
        for name, written in kept.items()
    ]
    whole = math.sqrt(math.fsum(r.norm**2 for r in results.values()))
    lost = math.sqrt(math.fsum((r.norm * r.error) ** 2 for r in results.values()))
    weights = tuple((changes.name, float(weight)) for changes, weight in members)
    return Combined(adapter, layers, lost / whole if whole else 0.0, method, weights, (*party.facts, *notes))


def _tell(facts: Sequence[str], notes: Sequence[str], on_event: Listener) -> None:
    for fact in facts:
        on_event(Note(fact))
    for note in notes:
        on_event(Note(note, "warning"))


def _cancelled(gone: Sequence[str], total: int) -> list[str]:
    if not gone:
        return []
    named = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
    return [f"{len(gone)} of {total} layers are left out, since their changes come to zero: {named}."]


def _rounded(results: Mapping[str, Result]) -> list[str]:
    found = {name: result.rounding for name, result in results.items() if result.rounding > _LOSSY}
    if not found:
        return []
    worst = max(found, key=lambda name: found[name])
    return [
        f"{len(found)} of {len(results)} layers nearly cancel, and float32 holds what is left with a relative error of "
        f"up to {found[worst]:.3g}, at {worst}."
    ]


def _aimed(wished: float | None) -> float | None:
    """The error for which ranks are chosen, so that what is stored has the wished one."""
    return wished and math.sqrt(max(wished**2 - _FLOAT32**2, wished**2 / 4))


def _check_error(module: str, result: Result, wished: float | None) -> None:
    """Where changes nearly cancel, float32 adds more than what was left room for."""
    if wished is not None and result.error > wished:
        message = f"An error of {wished:.3g} cannot be kept at {module}: what is stored has {result.error:.3g}"
        raise Unsupported(f"{message}, of which float32 makes {result.rounding:.3g}.", "Give a larger error.")


# --- sums, in factors --------------------------------------------------------------------------------------------


def _summed(party: Party, rule: Rule, options: Options, on_event: Listener) -> Iterator[tuple[str, Result]]:
    whole = {name: parts for name, parts in party.modules.items() if any(part.change.full for part in parts)}
    thin = {name: parts for name, parts in party.modules.items() if name not in whole}
    wished = partial(_rank, rule=rule, options=options)
    yield from summed(thin, wished, _aimed(options.error), rule.keeps == "all")
    for done, (name, parts) in enumerate(whole.items()):
        on_event(Progress("combining", done, len(whole), "layers"))
        rank = wished(parts)
        if rank is None and options.error is None:  # as many as the members would have alone
            rank = min(sum(part.change.rank for part in parts), MAX_RANK)
        yield name, summed_whole(name, parts, rank, _aimed(options.error))
    if whole:
        on_event(Progress("combining", len(whole), len(whole), "layers"))


def _rank(parts: Sequence[Part], rule: Rule, options: Options) -> int | None:
    """The largest rank that a layer may have."""
    if options.rank is not None or options.error is not None:
        return options.rank
    return max(part.change.rank for part in parts) if rule.keeps == "largest" else None


# --- values, in blocks -------------------------------------------------------------------------------------------


def _by_value(party: Party, rule: Rule, options: Options, on_event: Listener) -> Iterator[tuple[str, Result]]:
    for done, (name, parts) in enumerate(party.modules.items()):
        on_event(Progress("combining", done, len(party.modules), "layers"))
        yield name, _layer_by_value(name, parts, rule, options)
    on_event(Progress("combining", len(party.modules), len(party.modules), "layers"))


def _layer_by_value(name: str, parts: Sequence[Part], rule: Rule, options: Options) -> Result:
    matrices = [part.change.streamed() for part in parts]
    matrix = _merged(name, parts, matrices, rule, options)
    found = brought_to_rank(matrix, _rank(parts, rule, options), _aimed(options.error), MAX_RANK)
    return stored(Result(found.matrix, found.error, found.norm))


def _merged(name: str, parts: Sequence[Part], matrices: Sequence[Streamed], rule: Rule, options: Options) -> Streamed:
    """The rule's exact result, by rows."""
    assert rule.merge is not None
    sparse = [_sparse(name, part, matrix, rule, options) for part, matrix in zip(parts, matrices, strict=True)]

    def rows(start: int, stop: int) -> torch.Tensor:
        blocks = [one.rows(start, stop) * part.factor for part, one in zip(parts, sparse, strict=True)]
        return rule.merge(blocks, options.majority_sign)  # type: ignore[misc]

    return replace(matrices[0], rows=rows)


def _sparse(name: str, part: Part, matrix: Streamed, rule: Rule, options: Options) -> Streamed:
    """One member's change with most of its values 0."""
    if options.density == 1 or rule.sparsify is None:
        return matrix
    if rule.sparsify == "drop":
        begun = stream(options.seed, part.key, name)
        return replace(
            matrix, rows=lambda start, stop: dropped(matrix.rows(start, stop), options.density, begun, start)
        )
    least = largest(matrix, max(1, round(options.density * math.prod(matrix.shape))))
    return replace(matrix, rows=lambda start, stop: trimmed(matrix.rows(start, stop), least))


def _bias(party: Party, name: str, rule: Rule, options: Options, adding: bool) -> torch.Tensor | None:
    """What is added to a layer's output: a rule treats it as a matrix of one column."""
    parts = [part for part in party.modules[name] if part.change.bias is not None]
    if not parts:
        return None
    columns = [part.change.bias[:, None] for part in parts if part.change.bias is not None]
    if adding:
        total = added([column * part.factor for column, part in zip(columns, parts, strict=True)])
    else:
        matrices = [Streamed((len(c), 1), partial(_rows_of, c)) for c in columns]
        total = _merged(f"{name}.bias", parts, matrices, rule, options).rows(0, len(columns[0]))
    least = 1e-15 * sum(
        abs(part.factor) * float(column.abs().max()) for part, column in zip(parts, columns, strict=True)
    )
    return total[:, 0] if float(total.abs().max()) > least else None


def _rows_of(column: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return column[start:stop]
