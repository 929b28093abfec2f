"""Birth certificates: what an adapter does to its base on fixed texts, measured wherever it is new and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..adapters.fit import Fitted
from ..bases.inputs import encoder_inputs, pad_rows
from ..bases.load import Base
from ..errors import NoEffect
from ..names import Ref
from .batch import BatchPlan, Composer
from .forward import class_logits, token_logits
from .prompting import check_lengths, position_limit
from .sites import SiteHooks
from .texts import tokenizer_lock

if TYPE_CHECKING:
    from .runtime import Runtime

PROBE_SET = 1
"""Number of the texts below: figures of one set compare only with figures of the same."""
PROBES = (
    "The ferry leaves at seven and the ticket office opens an hour before.",
    "Which of the two answers is correct, and why?",
    "List three things that you would take on a long walk.",
    "def area(width, height):",
)
_LONGEST, _DECODED = 64, 8  # tokens of a probe, and of those that a decoder is given


@dataclass(frozen=True)
class Bound:
    """How far two measurements of one figure may be apart: a share of the larger one, and an absolute amount."""

    relative: float
    absolute: float

    def holds(self, one: float, other: float) -> bool:
        """Whether they are within the bound."""
        return abs(one - other) <= self.relative * max(abs(one), abs(other)) + self.absolute


FIGURES = {
    "loss": "loss with the adapter",
    "base_loss": "loss of the bare base",
    "max_logit_change": "largest change of a logit",
    "mean_logit_change": "mean change of a logit",
    "layer_change": "mean change of a layer's output",
}
# Float32 on the same weights. Seen on SmolLM2-135M between one and two threads and between instruction sets: 1.3e-4 for
# the largest change of a logit, 8e-6 for the mean one, 1.3e-5 for the losses.
EXACT = {
    "loss": Bound(1e-3, 1e-3),
    "base_loss": Bound(1e-3, 1e-3),
    "max_logit_change": Bound(0.01, 1e-3),
    "mean_logit_change": Bound(0.01, 1e-4),
    "layer_change": Bound(0.01, 0.0),
}
# Another quantisation or dtype. Twice what was seen on SmolLM2-135M between none, nf4 and int8 in float32 and bfloat16
# fits in (docs/decisions.md); the largest change of a logit is decided by one logit and tells nothing there.
LOOSE = {
    "loss": Bound(0.05, 0.05),
    "base_loss": Bound(0.05, 0.05),
    "mean_logit_change": Bound(0.4, 0.3),
    "layer_change": Bound(0.05, 0.0),
}


def measure(runtime: Runtime, ref: str | Ref) -> dict[str, Any]:
    """The certificate of an adapter as this runtime serves it (see `measure_fitted`)."""
    with runtime.base.lock:
        return measure_fitted(runtime.base, runtime.fitted(ref))


def measure_fitted(base: Base, fitted: Fitted) -> dict[str, Any]:
    """Mean loss in nats on the probe texts, with the adapter and of the bare base, and how far the logits move.

    The loss is the cross-entropy of a language model's next tokens (an encoder-decoder's first decoder tokens). A
    classifier or tagger has no bare counterpart: its loss is the mean -log p of the likeliest label, and its change
    the spread of the labels' logits between the texts (of a tagger: between their tokens). The adapter need not be
    resident; whatever is stays as it was.

    Raises:
        NoEffect: no logit moves, or one moves to infinity.
        Unsupported: an adapter is being trained on this base.
    """
    base.check_free()
    rows = [_ids(base, fitted, text) for text in PROBES]
    adapted = _outputs(base, rows, fitted, fitted)
    figures: dict[str, Any] = {"probe_set": PROBE_SET, "probes": len(rows)}
    if fitted.head is not None:
        labels = torch.cat([one if one.dim() == 2 else one[None] for one in adapted]).float()
        change = (labels - labels.mean(0)).abs()
        figures["loss"] = -float(labels.log_softmax(-1).amax(-1).mean())
    else:
        bare = _outputs(base, rows, fitted, _bare(fitted))
        change = torch.cat([(a.float() - b.float()).abs().flatten() for a, b in zip(adapted, bare, strict=True)])
        targets = [row[:_DECODED] if base.kind == "seq2seq" else row[1:] for row in rows]
        if base.kind != "encoder" and any(targets):
            figures["loss"], figures["base_loss"] = (_loss(logits, targets) for logits in (adapted, bare))
    if any(len(site.down) for site in fitted.sites.values()):
        figures["layer_change"] = _layer_change(fitted)
    figures["max_logit_change"], figures["mean_logit_change"] = float(change.max()), float(change.mean())
    _check_moves(base, fitted, figures)
    return figures


def compare(recorded: Mapping[str, Any], found: Mapping[str, Any], exact: bool) -> list[str]:
    """What a certificate and a new measurement disagree in; only what both hold is compared.

    Args:
        exact: both were measured in float32 on the same weights in the same quantisation.
    """
    if recorded.get("probe_set", PROBE_SET) != found["probe_set"]:
        return []
    return [
        f"{FIGURES[name]} {found[name]:.4g}, recorded {recorded[name]:.4g}"
        for name, bound in (EXACT if exact else LOOSE).items()
        if name in recorded and name in found and not bound.holds(found[name], recorded[name])
    ]


def _bare(fitted: Fitted) -> Fitted | None:
    """What stands for the bare base: the way that the adapter's rows go, or the rounding of another is its effect."""
    return None if fitted.injected is None else replace(fitted, injected=fitted.injected.bare())


def _check_moves(base: Base, fitted: Fitted, figures: Mapping[str, Any]) -> None:
    if not all(math.isfinite(figures[name]) for name in FIGURES if name in figures):
        raise NoEffect(
            f"{fitted.name} makes logits of {base.name} that are not finite.",
            f"The training diverged, or {base.choices['dtype'].value} is too narrow for this base.",
        )
    if figures["max_logit_change"] == 0.0:
        raise NoEffect(f"{fitted.name} moves no logit of {base.name}: it does nothing.", "Train it longer, or anew.")


def _outputs(base: Base, rows: list[list[int]], like: Fitted, fitted: Fitted | None) -> list[torch.Tensor]:
    """Logits of every row with `fitted`, or bare; hidden states of an encoder that has no head."""
    hooks = SiteHooks()  # of this measurement alone: nothing stays at the base, and no running batch is touched
    hooks.cover(like.sites if fitted else ())
    try:
        plan = Composer().compose([fitted] * len(rows), base.device)
        check_lengths(base, plan, rows, 0)
        if like.head is not None:
            return class_logits(base, hooks, plan, rows)
        if base.kind == "encoder":
            return _hidden_states(base, hooks, plan, rows)
        return token_logits(base, hooks, plan, rows, _decoder_rows(rows))
    finally:
        hooks.remove()


def _hidden_states(base: Base, hooks: SiteHooks, plan: BatchPlan, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    ids, mask = (t.to(base.device) for t in pad_rows(list(rows), base.pad_id, left=False))
    with torch.inference_mode(), hooks.using(plan.sites):
        model = plan.model(base.view("FEATURE_EXTRACTION").model)
        hidden = model(**encoder_inputs(ids, mask, plan.prefix, base.config)).last_hidden_state
    # Virtual tokens of a prompt come right before the row's own.
    begins = [row.prompt.tokens if row and row.prompt else 0 for row in plan.rows]
    return [hidden[i, n : n + len(row)] for i, (n, row) in enumerate(zip(begins, rows, strict=True))]


def _loss(logits: Sequence[torch.Tensor], targets: Sequence[list[int]]) -> float:
    """Mean cross-entropy of the tokens that all but each row's last logits predict."""
    given = torch.cat([one[:-1].float() for one in logits])
    wanted = torch.tensor([token for row in targets for token in row], device=given.device)
    return float(F.cross_entropy(given, wanted))


def _layer_change(fitted: Fitted) -> float:
    """Mean over the layers of the mean absolute change of an output, for an input of ones and minus ones.

    It needs no base (but for DoRA's norms), so that a wrong scale shows in any precision.
    """
    changes = []
    for site in fitted.sites.values():
        signs = torch.where(torch.arange(site.down.shape[1], device=site.down.device) % 3 == 0, -1.0, 1.0)
        changes.append((site.up.float() @ (site.down.float() @ signs)).abs().mean())
    return float(torch.stack(changes).mean())


def _ids(base: Base, fitted: Fitted, text: str) -> list[int]:
    limit = position_limit(base)
    room = _LONGEST if limit is None else min(_LONGEST, limit - fitted.virtual_tokens)
    with tokenizer_lock(base):
        return list(base.tokenizer(text, truncation=True, max_length=max(room, 1))["input_ids"])


def _decoder_rows(rows: Sequence[list[int]]) -> list[list[int]]:
    return [row[:_DECODED] for row in rows]
