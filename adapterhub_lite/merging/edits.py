"""From an adapter to the edits of a checkpoint: which weights and biases it changes, and how.

Nothing of the base is read for it, and no change is formed: both wait until the weight's turn to be written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..adapters.adapter import Adapter, check_finite
from ..adapters.factored import factor_mismatches, split_factors
from ..adapters.fit import LEAST_STRENGTH
from ..adapters.ia3 import ia3_mismatches, split_ia3
from ..adapters.lora import PREFIX, mismatches, split_tensors
from ..adapters.sites import check_fit, features, is_conv1d
from ..bases.heads import HEAD_NAMES, check_heads
from ..bases.views import View
from ..errors import AdapterMismatch, NoEffect, Unsupported
from ..formats.specs import FactoredSpec, Ia3Spec, LoraSpec
from .dense import Delta, Hadamard, Kronecker, Product, Term, moves

_EMBEDDING = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<part>[AB])")
_Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class BiasTerm:
    """What one adapter does to one bias: `added` [out] is (lora_bias), or it is multiplied by `factors` [out] (IA3)."""

    added: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    weight: float = 1.0


def changed_bias(own: torch.Tensor, terms: Sequence[BiasTerm]) -> torch.Tensor:
    """A frozen bias [out] in float32 with what adapters do to it."""
    if len(terms) == 1 and terms[0].factors is not None and terms[0].weight == 1.0:
        return own * terms[0].factors
    total = own
    for term in terms:
        if term.added is not None:
            total = total + term.added * term.weight
        else:
            assert term.factors is not None
            total = total + term.weight * (own * term.factors - own)
    return total


@dataclass
class Edits:
    """What one adapter changes, by the names of the model's modules; `head` are tensors below the head's name."""

    weights: dict[str, Term] = field(default_factory=dict)
    biases: dict[str, BiasTerm] = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)


def edits_of(adapter: Adapter, weight: float, view: View) -> Edits:
    """Check an adapter against the modules of a base, exactly, and say what it changes.

    Args:
        weight: the factor on all its changes; a head is taken as it is.
        view: the base as the adapter's PEFT class sees it; meta tensors do.

    Raises:
        Unsupported: a method that does not change weights, or a part that is no layer's change.
        AdapterMismatch: it does not fit.
        NoEffect: its changes are zero.
    """
    if not adapter.finite:
        check_finite(adapter.tensors, adapter.name, adapter.spec)
    spec, made = adapter.spec, Edits()
    if isinstance(spec, LoraSpec):
        rest = _lora(adapter, spec, weight, view, made)
    elif isinstance(spec, FactoredSpec):
        rest = _factored(adapter, spec, weight, view, made)
    elif isinstance(spec, Ia3Spec):
        rest = _ia3(adapter, spec, weight, view, made)
    else:
        raise _no_change_of_weights(adapter)
    made.head = _head(adapter, rest, view)
    if not made.head:
        _check_effect(adapter, made, view)
    if weight == 0.0:
        made.weights, made.biases = {}, {}
    return made


def _no_change_of_weights(adapter: Adapter) -> Unsupported:
    what = {
        "PrefixSpec": "a prefix: keys and values before the text, not a change of weights",
        "PromptSpec": "a prompt: virtual tokens before the text, not a change of weights",
    }.get(
        type(adapter.spec).__name__,
        "of a method that PEFT's own layers compute: merging does not know what they do to weights",
    )
    return Unsupported(f"{adapter.name} is {what}.", "Serve it with its base, or train a LoRA adapter to merge.")


def _lora(adapter: Adapter, spec: LoraSpec, weight: float, view: View, made: Edits) -> dict[str, torch.Tensor]:
    embeddings: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        match = _EMBEDDING.fullmatch(key)
        if match:
            embeddings.setdefault(match["module"], {})[match["part"]] = tensor
    parts, others = split_tensors({k: t for k, t in adapter.tensors.items() if not _EMBEDDING.fullmatch(k)})
    if embeddings and spec.use_dora:
        raise Unsupported(f"{adapter.name}: DoRA on embeddings is not merged.", "Serve the adapter with PEFT.")
    problems = mismatches(spec, parts, view.modules) if parts or not embeddings else []
    problems += [p for name, part in embeddings.items() if (p := _embedding_problem(name, part, view.modules))]
    check_fit(problems, len(parts) + len(embeddings))
    for name, part in parts.items():
        turned, factor = is_conv1d(view.modules[name]), spec.scaling(name, part["A"].shape[0])
        magnitude = part["magnitude"].float().flatten() if "magnitude" in part else None
        make = partial(_product, part["B"], part["A"], factor, 1.0, turned)
        made.weights[name] = Term(make, weight, magnitude, turned=turned)
        if "bias" in part:
            made.biases[name] = BiasTerm(part["bias"].float(), weight=factor * weight)
    for name, part in embeddings.items():
        factor = spec.scaling(name, part["A"].shape[0])
        made.weights[name] = Term(partial(_product, part["B"], part["A"], factor, 1.0, True), weight)
    return others


def _embedding_problem(name: str, part: _Parts, modules: Mapping[str, nn.Module]) -> str | None:
    module = modules.get(name)
    if not isinstance(module, nn.Embedding):
        return f"{name} is no embedding here"
    if set(part) != {"A", "B"}:
        return f"{name} has only one of lora_embedding_A and lora_embedding_B"
    rank, shape = part["A"].shape[0], (module.num_embeddings, module.embedding_dim)
    if tuple(part["A"].shape) != (rank, shape[0]) or tuple(part["B"].shape) != (shape[1], rank):
        found = f"A {list(part['A'].shape)} and B {list(part['B'].shape)}"
        return f"{name} has {found}, this embedding is {list(shape)}"
    return None


def _product(up: torch.Tensor, down: torch.Tensor, factor: float, divisor: float, turned: bool) -> Product:
    """up [out, rank] down [rank, in]; `turned` for a weight [in, out]."""
    left, right = (down.t(), up.t()) if turned else (up, down)
    return Product(left.float().contiguous(), right.float().contiguous(), factor, divisor)


def _factored(adapter: Adapter, spec: FactoredSpec, weight: float, view: View, made: Edits) -> dict[str, torch.Tensor]:
    parts, others = split_factors(adapter.tensors)
    check_fit(factor_mismatches(spec, parts, view.modules), len(parts))
    for name, part in parts.items():
        turned = is_conv1d(view.modules[name])
        made.weights[name] = Term(partial(_formed, spec, name, part, turned), weight, turned=turned)
    return others


def _formed(spec: FactoredSpec, name: str, parts: _Parts, turned: bool) -> Delta:
    """The matrix that AdaLoRA, LoHa or LoKr adds; sources: `peft.tuners.{adalora,loha,lokr}.layer`."""
    if spec.method == "ADALORA":
        # PEFT divides by r + 1e-5, where r is the rank before anything was masked.
        down = parts["lora_A"].float() * parts["lora_E"].float()
        return _product(parts["lora_B"], down, spec.alpha, spec.rank + 1e-5, turned)
    factor = spec.alpha_of(name) / spec.rank_of(name)
    if spec.method == "LOHA":
        one, two = (_product(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], 1.0, 1.0, turned) for i in (1, 2))
        return Hadamard(one, two, factor)
    whole = [
        (parts[stem] if stem in parts else parts[f"{stem}_a"].float() @ parts[f"{stem}_b"].float()).float()
        for stem in ("lokr_w1", "lokr_w2")
    ]
    first, second = (matrix.t() for matrix in whole) if turned else whole
    return Kronecker(first, second, factor)


def _ia3(adapter: Adapter, spec: Ia3Spec, weight: float, view: View, made: Edits) -> dict[str, torch.Tensor]:
    vectors, others = split_ia3(adapter.tensors)
    check_fit(ia3_mismatches(spec, vectors, view.modules), len(vectors))
    for name, vector in vectors.items():
        module = view.modules[name]
        n_in, n_out = features(module)
        # Square layers: [1, n] is a factor on the input, [n, 1] one on the output.
        of_input = tuple(vector.shape) == (1, n_in) and spec.scales_input(name) is not False
        factors = vector.float().reshape((1, n_in) if of_input else (n_out, 1))
        if is_conv1d(module):
            factors = factors.t().contiguous()
        made.weights[name] = Term(None, weight, factors=factors)
        if not of_input and getattr(module, "bias", None) is not None:
            made.biases[name] = BiasTerm(factors=factors.flatten(), weight=weight)
    return others


def _head(adapter: Adapter, rest: dict[str, torch.Tensor], view: View) -> dict[str, torch.Tensor]:
    """What is left, which must be the head's.

    Raises:
        Unsupported: a copy of a part of the base (modules_to_save). AdapterMismatch: it has no place.
    """
    start = f"{PREFIX}{view.head_name}."
    if view.head is None or not all(key.startswith(start) for key in rest):
        known = [k.removeprefix(PREFIX) for k in rest if k.removeprefix(PREFIX).rpartition(".")[0] in view.modules]
        check_heads(adapter.spec.task_type, [k for k in known if k.split(".")[0] not in HEAD_NAMES])
        if rest:
            raise AdapterMismatch(
                f"{adapter.name}: {len(rest)} of {len(adapter.tensors)} tensors have no place in this base: "
                f"{', '.join(sorted(rest)[:3])}.",
                "It was made for another model or task.",
            )
        return {}
    return {key.removeprefix(start): tensor.float() for key, tensor in rest.items()}


def _check_effect(adapter: Adapter, made: Edits, view: View) -> None:
    """Refuse changes that change nothing: the product of B and A is zero, or lost in float32's rounding."""
    strongest = max(_first_strong(_strengths(made, view)), default=0.0)
    if strongest < LEAST_STRENGTH:
        raise NoEffect(
            f"{adapter.name} moves no logit (the largest change of a layer is {strongest:.1g}): it does nothing.",
            "It was not trained, or its alpha is wrong.",
        )


def _first_strong(strengths: Iterator[float]) -> Iterator[float]:
    for strength in strengths:
        yield strength
        if strength >= LEAST_STRENGTH:
            return


def _strengths(made: Edits, view: View) -> Iterator[float]:
    for name, term in made.weights.items():
        if term.magnitude is not None:
            yield LEAST_STRENGTH  # only its weight can tell
        elif term.factors is not None:
            yield float((term.factors - 1).abs().max())
        elif term.make is not None:
            weight: torch.Tensor = view.modules[name].weight  # type: ignore[assignment]
            yield from moves(term.make(), weight.shape[0], weight[0].numel())
    for bias in made.biases.values():
        yield 0.0 if bias.added is None else float(bias.added.abs().max())
