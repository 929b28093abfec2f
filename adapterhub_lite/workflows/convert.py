"""Convert a stored version to plain LoRA, or to another rank: a new version with the old one as its parent."""

from __future__ import annotations

import time

from ..adapters.compare import kind_of
from ..bases.load import Base
from ..combining.convert import to_lora
from ..errors import Unsupported
from ..events import Listener, Stage, ignore
from ..names import Ref, check_name
from ..store import Store
from .combine_base import FrozenWeights, ground_of, with_base
from .combine_members import members_of
from .combine_publish import Made, Making, check_size, put_made

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
    on_event: Listener = ignore,
) -> Ref:
    """Bring a version of any method that adds to weights into the form of a LoRA, and store it as a new version.

    The best of its rank, layer by layer (Eckart-Young); the error goes into the card. With neither rank nor error it is
    exact, where the method has a finite rank. It is proven and measured beside its parent, as `combine` does.

    Args:
        rank, error: the rank to keep, or the relative error that may be made.
        name: of the new version; by default the old name with what it became, as sql-r4 or sql-lora.
        base: the adapter's base, loaded or by name. DoRA and IA3 need its weights on this disk.

    Raises:
        Unsupported: a prefix or prompt, which changes no weight; a method that only PEFT's layers know.
        NoEffect: what is left moves no logit.
    """
    return make_converted(
        ref, rank=rank, error=error, to=to, name=name, store=store, base=base, quantize=quantize, device=device,
        evaluate=evaluate, on_event=on_event,
    ).ref  # fmt: skip


def make_converted(
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
    on_event: Listener = ignore,
) -> Made:
    """As `convert`, with all that was found on the way."""
    started = time.perf_counter()
    store = store if store is not None else Store()
    check_size(rank, error)
    if to not in KINDS:
        raise Unsupported(f"{to!r} is not a method that adapters are converted to.", f"Use {', '.join(KINDS)}.")
    members = members_of(store, ref, None)
    member = members[0]
    adapter = member.adapter(store)
    name = check_name(name) if name is not None else _name_of(member.ref.name, rank, to)
    store.prepare()
    ground = ground_of(members, base, quantize, device, on_event)
    on_event(Stage(f"converting {member} to {to}"))
    frozen = FrozenWeights(member, ground.folder, adapter.spec.task_type) if ground.folder is not None else None
    converted = to_lora(
        adapter, weight_of=frozen, bias_of=frozen.bias if frozen else None, rank=rank, error=error, on_event=on_event
    )
    if evaluate:
        ground = with_base(ground, members, quantize, device, on_event)
    options = {key: value for key, value in (("rank", rank), ("error", error)) if value is not None}
    origin = {"kind": "converted", "from": kind_of(adapter), "to": to, "options": options}
    making = Making(name, members, member, origin, evaluate, started)
    return put_made(store, converted, making, ground, on_event)


def _name_of(name: str, rank: int | None, to: str) -> str:
    end = f"-r{rank}" if rank is not None else f"-{to}"
    return name if name.endswith(end) else f"{name[: _LONGEST_NAME - len(end)]}{end}"
