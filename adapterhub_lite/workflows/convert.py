"""Convert a stored version to plain LoRA, or to another rank: a new version with the old one as its parent."""

from __future__ import annotations

import time
from dataclasses import replace

from ..adapters.adapter import Adapter
from ..adapters.compare import kind_of
from ..bases.load import Base
from ..combining.changes import changes_of, check_additive
from ..combining.combine import Combined
from ..combining.convert import to_lora
from ..errors import Unsupported
from ..events import Listener, Note, Stage, ignore
from ..names import Ref, check_name
from ..store import Store
from .combine_base import FrozenWeights, ground_of
from .combine_members import Member, members_of
from .combine_publish import Made, Making, check_size, put_made
from .combine_setting import ROWS, Setting

KINDS = ("lora",)
_LONGEST_NAME = 64


def convert(
    ref: str | Ref,
    *,
    rank: int | None = None,
    error: float | None = None,
    to: str = "lora",
    name: str | None = None,
    store: Store | None = None,
    base: Base | str | None = None,
    quantize: str | None = None,
    device: str = "auto",
    evaluate: bool = True,
    rows: int = ROWS,
    on_event: Listener = ignore,
) -> Ref:
    """Bring a version of any method that adds to weights into the form of a LoRA, and store it as a new version.

    The best of its rank, layer by layer (Eckart-Young); the error goes into the card. With neither rank nor error it is
    exact, where the method has a finite rank. It is proven and measured beside its parent, as `combine` does.

    Args:
        rank, error: the rank to keep, or the relative error that may be made.
        name: of the new version; by default the old name with what it became, as sql-r4 or sql-lora.
        base: the adapter's base, loaded or by name. DoRA and IA3 need its weights on this disk.
        rows: most rows of its test set to measure on, evenly over all of them; 0: none.

    Raises:
        Unsupported: a prefix or prompt, which changes no weight; a method that only PEFT's layers know; a LoRA that has
            no larger rank than the wished one.
        NoEffect: what is left moves no logit.
    """
    setting = Setting(store if store is not None else Store(), base, quantize, device, evaluate, rows, on_event)
    return make_converted(ref, setting, rank=rank, error=error, to=to, name=name).ref


def make_converted(
    ref: str | Ref,
    setting: Setting,
    *,
    rank: int | None = None,
    error: float | None = None,
    to: str = "lora",
    name: str | None = None,
) -> Made:
    """As `convert`, with all that was found on the way."""
    started, store, on_event = time.perf_counter(), setting.store, setting.on_event
    setting.check()
    check_size(rank, error)
    if to not in KINDS:
        raise Unsupported(f"{to!r} is not a method that adapters are converted to.", f"Use {', '.join(KINDS)}.")
    members = members_of(store, ref, None)
    member = members[0]
    adapter = member.adapter(store)
    check_additive(adapter)
    if rank is not None:
        _check_smaller(member, adapter, rank)
    if name is not None:
        check_name(name)
    store.prepare()
    ground = ground_of(members, setting.base, setting.quantize, setting.device, on_event)
    on_event(Stage(f"converting {member} to {to}"))
    frozen = FrozenWeights(member, ground.folder, adapter.spec.task_type) if ground.folder is not None else None
    converted = to_lora(
        adapter, weight_of=frozen, bias_of=frozen.bias if frozen else None, rank=rank, error=error, on_event=on_event
    )
    options = {key: value for key, value in (("rank", rank), ("error", error)) if value is not None}
    if rank is not None:
        converted, rank = _of_true_rank(converted, rank, on_event)
    name = name if name is not None else _name_of(member.ref.name, rank, to)
    origin = {
        "kind": "converted",
        "from": kind_of(adapter),
        "to": to,
        "options": options,
        "from_parameters": adapter.parameters,
    }
    return put_made(converted, Making(name, members, member, origin, started), ground, setting)


def _check_smaller(member: Member, adapter: Adapter, rank: int) -> None:
    """A LoRA has its rank already; any other method gets what it truly has."""
    if kind_of(adapter) != "lora":
        return
    has = max((change.rank for change in changes_of(adapter).modules.values()), default=0)
    if rank >= has:
        raise Unsupported(
            f"{member} has rank {has} already, so rank {rank} would store it again as it is.",
            ("" if has == 1 else f"Give less than {has}; ") + "`ahl alias` gives it another name.",
        )


def _of_true_rank(converted: Combined, rank: int, on_event: Listener) -> tuple[Combined, int]:
    """The rank that the result has, where less than what was wished holds all of it."""
    has = max(layer.rank for layer in converted.layers)
    if has >= rank:
        return converted, rank
    note = f"Rank {has} holds all of it: rank {rank} was asked for."
    on_event(Note(note))
    return replace(converted, notes=(*converted.notes, note)), has


def _name_of(name: str, rank: int | None, to: str) -> str:
    end = f"-r{rank}" if rank is not None else f"-{to}"
    return name if name.endswith(end) else f"{name[: _LONGEST_NAME - len(end)]}{end}"
