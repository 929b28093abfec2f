"""Bring a stored adapter into memory: verified bytes, the right base, every tensor in its place."""

from __future__ import annotations

from typing import Any

from ..adapters.adapter import Adapter, read_adapter
from ..adapters.fit import Fitted, Target, fit
from ..bases.load import Base
from ..bases.quantization import dense_weight
from ..errors import AdapterMismatch, BaseMismatch
from ..names import Ref
from ..store import Store


def target_of(base: Base, task_type: str | None) -> Target:
    """The part of `base` that an adapter of this PEFT task type is fitted to."""
    view = base.view(task_type)
    return Target(view.modules, base.config, view.head, view.head_name, dense_weight)


def fit_to_base(adapter: Adapter, base: Base) -> Fitted:
    """Fit an adapter to a base, on the base's device and in its dtype.

    Raises:
        AdapterMismatch: it does not fit exactly.
    """
    fitted = fit(adapter, target_of(base, adapter.spec.task_type)).to(base.device, base.dtype)
    if not fitted.finite:  # zero times infinity would reach the other rows of a batch
        raise AdapterMismatch(
            f"{adapter.name}: its scale makes infinity of its tensors in {base.choices['dtype'].value}.",
            "Load the base in float32, or do not use it: the training diverged.",
        )
    return fitted


def admit(store: Store, ref: Ref, base: Base) -> tuple[Fitted, str]:
    """Read, verify and fit one version; returns it with a remark about its base ("" when the base is exactly its own).

    Raises:
        StoreCorrupt: the bytes are not those that were stored.
        BaseMismatch: it was made for another base.
        AdapterMismatch: it does not fit.
    """
    folder = store.verified_folder(ref)
    card = store.card(ref)
    remark = compare_base(str(ref), card.base, base)
    if not remark and "claimed_origin" in card.origin:
        remark = f"{ref} was imported: that it was made for this base is what its card claims."
    adapter = read_adapter(folder, name=str(ref), digest=ref.digest or "", card=card)
    return fit_to_base(adapter, base), remark


def compare_base(name: str, recorded: dict[str, Any], base: Base) -> str:
    """Three answers: "" for the very same base, a remark for the same weights in another precision, or an error.

    Raises:
        BaseMismatch: other weights, architecture or tokenizer; both fingerprints are shown.
    """
    mark = recorded.get("fingerprint")
    if not isinstance(mark, dict) or not mark.get("weights"):
        return f"{name} does not say which base's weights it was made for; its tensors fit {base.name}."
    differing = base.fingerprint.differs_from(mark)
    if set(differing) & {"weights", "config", "tokenizer"}:
        raise BaseMismatch(
            f"{name} was made for {recorded.get('name', 'another base')} ({str(mark.get('digest', '?'))[:12]}), "
            f"this is {base.name} ({base.fingerprint.digest[:12]}): {', '.join(differing)} differ.",
            f"Load it on {recorded.get('name', 'its own base')}.",
        )
    if "quantization" in differing:
        return (
            f"{name} was trained on {recorded.get('name')} in {mark['quantization']}; "
            f"this base has the same weights in {base.quantization}."
        )
    return f"{name} was trained with another chat template." if "chat_template" in differing else ""
