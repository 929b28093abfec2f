"""Bring a stored adapter into memory: verified bytes, the right base, every tensor in its place, the effect it had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..adapters.adapter import Adapter, name_of, stored_adapter
from ..adapters.fit import Fitted, Target, fit
from ..adapters.layout import Layouts
from ..adapters.pack import Packing
from ..bases.front import hidden_front
from ..bases.load import Base
from ..bases.quantization import dense_weight
from ..errors import AdapterMismatch, BaseMismatch, EffectChanged, Unsupported
from ..formats.card import Card
from ..formats.specs import PrefixSpec, PromptSpec
from ..names import Ref
from ..store import Store
from ..store.reading import Stored
from .certificate import compare, measure_fitted
from .collector import collector_paused
from .prefill import read_prompt

_FRONTS = (PrefixSpec, PromptSpec)


@dataclass(frozen=True)
class Admitted:
    """A stored version fitted to a base; `remark` says how the base is not exactly its own ("" when it is)."""

    fitted: Fitted
    card: Card
    remark: str


def target_of(base: Base, task_type: str | None) -> Target:
    """The part of `base` that an adapter of this PEFT task type is fitted to."""
    view = base.view(task_type)
    model: Any = base.model
    reader = partial(read_prompt, base) if base.kind == "causal" else None
    return Target(
        view.modules, base.config, view.head, view.head_name, dense_weight, model.get_input_embeddings(), reader
    )


def fit_to_base(adapter: Adapter, base: Base) -> Fitted:
    """Fit an adapter to a base, on the base's device and in its dtype.

    Raises:
        AdapterMismatch: it does not fit exactly.
        Unsupported: something before the text of a class that has no place for it.
    """
    return _fit_and_pack(adapter, base)[0]


def _fit_and_pack(adapter: Adapter, base: Base) -> tuple[Fitted, Packing]:
    if base.kind == "seq2seq" and adapter.spec.task_type == "SEQ_CLS" and isinstance(adapter.spec, _FRONTS):
        kind = "prefix" if isinstance(adapter.spec, PrefixSpec) else "prompt"
        raise Unsupported(
            f"{adapter.name} is a {kind} for the classifier of an encoder-decoder, which takes none; nor does PEFT's.",
            "Train a LoRA or IA3 adapter.",
        )
    if base.kind == "causal" and isinstance(adapter.spec, _FRONTS):
        _check_front(adapter.name, base)
    found = fit(adapter, target_of(base, adapter.spec.task_type)).to(base.device, base.dtype)
    fitted, packing = found.packing(base.siblings)
    if not fitted.finite:  # zero times infinity would reach the other rows of a batch
        raise AdapterMismatch(
            f"{adapter.name}: its scale makes infinity of its tensors in {base.choices['dtype'].value}.",
            "Load the base in float32, or do not use it: the training diverged.",
        )
    return fitted, packing


def _fit_stored(stored: Stored, base: Base) -> Fitted:
    """Fit a stored version, by the way that one of its shape has gone before if there was one."""
    layouts: Layouts = base.derived.setdefault("layouts", Layouts())
    again = layouts.fitted(stored, name_of(stored))
    if again is not None:
        return again
    fitted, packing = _fit_and_pack(stored_adapter(stored), base)
    layouts.note(stored, fitted, packing)
    return fitted


def _check_front(name: str, base: Base) -> None:
    """Raise Unsupported where what stands before a text would reach it by its row's neighbours, or not at all."""
    what = hidden_front(base.config)
    if what:
        raise Unsupported(f"{name} stands before the text, and {base.name} has {what}.", "Use a LoRA or IA3 adapter.")


def admit(store: Store, ref: Ref, base: Base) -> Admitted:
    """Read, verify and fit one version.

    Raises:
        StoreCorrupt: the bytes are not those that were stored.
        BaseMismatch: it was made for another base.
        AdapterMismatch: it does not fit.
    """

    def fitted(stored: Stored) -> Admitted:
        card = stored.card
        remark = compare_base(str(ref), card.base, base)
        return Admitted(_fit_stored(stored, base), card, remark or claim(str(ref), card.origin))

    with collector_paused():
        return store.read_while(ref, fitted)


def prove(admitted: Admitted, base: Base) -> dict[str, Any]:
    """Measure the effect of a version and compare it with the certificate in its card, if that has one.

    A foreign card's certificate is a claim, and this is where it is put to the test.

    Raises:
        NoEffect: it moves no logit of this base.
        EffectChanged: it has another effect than its card says; both figures are shown.
    """
    found = measure_fitted(base, admitted.fitted)
    problems = compare(admitted.card.effect, found, exact=_is_exact(admitted.card.base, base))
    if problems:
        name = admitted.fitted.name
        raise EffectChanged(
            f"{name} does not do to {base.name} what its card says it did when it was published: "
            f"{'; '.join(problems)}.",
            "Bytes and fingerprint agree, so look for another revision of the base, a wrong scale (alpha), a card of "
            f"another adapter, or a bug here. Measure it anew with: ahl verify --deep {name}",
        )
    return found


def _is_exact(recorded: dict[str, Any], base: Base) -> bool:
    """Whether figures measured on the recorded base must come out the same here: float32, same weights, same rounding.

    Not with int8: a CUDA device rounds the activations too, and a card does not say what it was measured on.
    """
    mark = recorded.get("fingerprint")
    if not isinstance(mark, dict) or not (mark.get("weights") and mark.get("quantization")):
        return False
    same = not set(base.fingerprint.differs_from(mark)) - {"chat_template"} and base.quantization != "int8"
    return same and recorded.get("dtype") == base.choices["dtype"].value == "float32"


def claim(name: str, origin: Mapping[str, Any]) -> str:
    """What is to be said of a version that came from elsewhere, whose base nobody has proven; "" of others."""
    if "claimed_origin" not in origin:
        return ""
    return f"{name} was imported: that it was made for this base is what its card claims."


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
    dtype = base.choices["dtype"].value
    if "quantization" in differing or recorded.get("dtype") not in (None, dtype):
        before = (mark.get("quantization") or base.quantization, recorded.get("dtype") or dtype)
        return (
            f"{name} was trained on {recorded.get('name', 'its base')} in {_precision(*before)}; "
            f"this base has the same weights in {_precision(base.quantization, dtype)}."
        )
    return f"{name} was trained with another chat template." if "chat_template" in differing else ""


def _precision(quantization: str, dtype: str) -> str:
    return dtype if quantization == "none" else f"{quantization} ({dtype})"
