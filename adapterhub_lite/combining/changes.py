"""What an additive adapter adds to each weight, as thin factors with every scale folded in, without a base.

    LoRA, rsLoRA     s B A                                exact; lora_bias, times s, beside it
    AdaLoRA          s B diag(E) A                        exact
    LoHa, LoKr       products of their small matrices     exact, or brought to a wished rank
    DoRA             (g - 1) W + g s B A                  of full rank: needs W; kept so, or brought to low rank
    IA3              (l - 1) W, or W (l - 1)              as DoRA; on outputs also (l - 1) b for a layer with a bias b
Names are PEFT's, [out, in] the layer's own orientation whatever way its weight is stored (Conv1D). An embedding
(`lora_embedding_A`, `_B`) is a matrix [width, tokens], and written as one again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.adapter import Adapter, check_finite
from ..adapters.factored import factor_problem, fitted_factors, split_factors
from ..adapters.ia3 import split_ia3
from ..adapters.lora import PREFIX, split_tensors
from ..errors import AdapterMismatch, Unsupported
from ..formats.peft_config import MAX_RANK
from ..formats.specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec, PromptSpec, Spec
from .full_rank import FullRank, dora_rows, scaled_rows
from .low_rank import LowRank
from .streamed import Rows, Streamed, brought_to_rank

_EMBEDDING = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<part>[AB])")
_WHOLE = re.compile(r"(?!.*(?:lora_|hada_|lokr_|ia3_|trainable_tokens)).+\.(?:weight|bias)")
_IA3_RANK = 64
_DORA, _IA3 = "a DoRA adapter", "an IA3 adapter"

WeightOf = Callable[[str], torch.Tensor]
"""Module name -> its frozen weight [out, in], dense."""
BiasOf = Callable[[str], torch.Tensor | None]
"""Module name -> its frozen bias [out], None where it has none."""


@dataclass(frozen=True)
class Change:
    """What is added to one layer, with every scale folded in and nothing rounded.

    Attributes:
        matrix: added to the weight, [out, in]; for an embedding [width, tokens]. Zero beside `full`.
        bias: added to the output, [out], or None.
        error: of bringing the matrix to low rank, relative to its norm; 0 where nothing was lost.
        embedding: whether the layer is an embedding.
        full: what is added to the weight instead, where it is of full rank and was not brought to a low one.
    """

    matrix: LowRank
    bias: torch.Tensor | None = None
    error: float = 0.0
    embedding: bool = False
    full: FullRank | None = None

    @property
    def rank(self) -> int:
        """Of the matrix, or the usual one of what is of full rank."""
        return self.matrix.rank if self.full is None else min(self.full.usual, *self.full.shape)

    def streamed(self) -> Streamed:
        """What is added to the weight, by rows; of full rank, the frozen weight is in memory as long as this is."""
        return Streamed(self.matrix.shape, self.matrix.rows if self.full is None else self.full.read())


@dataclass(frozen=True)
class Changes:
    """All that an adapter adds.

    Attributes:
        modules: by module name as PEFT has it, without `base_model.model.`.
        head: whole tensors that came along (`modules_to_save`), by their names inside the base.
        digest: of the adapter, or "".
        base: the base as the adapter's card has it, or {}.
    """

    name: str
    modules: dict[str, Change]
    head: dict[str, torch.Tensor]
    spec: Spec
    digest: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wish:
    """To what a change of full rank is brought, and where its base's tensors are."""

    name: str
    weight_of: WeightOf | None
    bias_of: BiasOf | None
    rank: int | None
    error: float | None
    whole: bool = False

    def change(self, full: FullRank, bias: torch.Tensor | None = None) -> Change:
        if self.whole:
            return Change(LowRank.zero(full.shape), bias, full=full)
        matrix, error = self.brought(full.shape, full.read(), full.usual)
        return Change(matrix, bias, error)

    def brought(self, shape: tuple[int, int], rows: Rows, usual: int) -> tuple[LowRank, float]:
        rank = min(usual, MAX_RANK) if self.rank is None and self.error is None else self.rank
        found = brought_to_rank(Streamed(shape, rows), rank, self.error, MAX_RANK)
        return found.matrix, found.error

    def check(self, what: str) -> WeightOf:
        if self.weight_of is None:
            message = f"{self.name} is {what}, whose change of a layer depends on the layer's own weight."
            raise Unsupported(message, "Name its base with --base.")
        return self.weight_of

    def weight(self, module: str, what: str) -> torch.Tensor:
        return self.check(what)(module).detach()


def changes_of(
    adapter: Adapter,
    weight_of: WeightOf | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
    bias_of: BiasOf | None = None,
    whole: bool = False,
) -> Changes:
    """Bring an adapter into thin factors.

    Args:
        weight_of: only asked for DoRA and IA3.
        rank, error: of what has no low rank of its own: at most this rank, or the least rank within this relative
            error. With neither, DoRA gets four times its own rank and IA3 64; LoHa and LoKr are kept exactly.
        bias_of: only asked for IA3 on outputs.
        whole: DoRA and IA3 stay as they are, of full rank (`Change.full`), and `weight_of` is asked again when their
            rows are.

    Raises:
        Unsupported: DoRA or IA3 without a base; what is no sum with weights (prefix, prompt, methods that PEFT runs);
            convolutions; an error that no storable rank reaches.
        AdapterMismatch: tensors that do not belong together, or are not finite.
    """
    if not adapter.finite:
        check_finite(adapter.tensors, adapter.name, adapter.spec)
    wish, spec = _Wish(adapter.name, weight_of, bias_of, rank, error, whole), adapter.spec
    if isinstance(spec, LoraSpec):
        modules, others = _lora(adapter, spec, wish)
    elif isinstance(spec, FactoredSpec):
        modules, others = _factored(adapter, spec, wish)
    elif isinstance(spec, Ia3Spec):
        modules, others = _ia3(adapter, spec, wish)
    else:
        raise _not_a_sum(adapter.name, spec)
    if not modules:
        raise AdapterMismatch(f"{adapter.name}: the file holds no tensor of a layer.", "Import it again.")
    base = adapter.card.base if adapter.card else {}
    return Changes(adapter.name, modules, _head(adapter.name, others), spec, adapter.digest, base)


def check_additive(adapter: Adapter) -> None:
    """Raise Unsupported for what is no sum with weights: a prefix, a prompt, a method that only PEFT's layers know."""
    if not isinstance(adapter.spec, LoraSpec | FactoredSpec | Ia3Spec):
        raise _not_a_sum(adapter.name, adapter.spec)


def head_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The whole tensors of an adapter, by their names inside the base."""
    names = {key.removeprefix(PREFIX): tensor for key, tensor in adapter.tensors.items() if key.startswith(PREFIX)}
    return {name: tensor for name, tensor in names.items() if _WHOLE.fullmatch(name)}


def _not_a_sum(name: str, spec: PrefixSpec | PromptSpec | InjectedSpec) -> Unsupported:
    if isinstance(spec, InjectedSpec):
        what = f"of method {spec.method}, which PEFT's own layers compute: what it adds to a weight is not known here"
    elif isinstance(spec, PrefixSpec):
        what = "a prefix: keys and values before the text, not a change of weights, so it stays a prefix"
    else:
        what = "a prompt: tokens before the text, not a change of weights, so it stays a prompt"
    return Unsupported(f"{name} is {what}.", "Take a LoRA, DoRA, AdaLoRA, LoHa, LoKr or IA3 adapter.")


def _head(name: str, others: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, by their names inside the base."""
    for key in others:
        if not (key.startswith(PREFIX) and _WHOLE.fullmatch(key.removeprefix(PREFIX))):
            raise AdapterMismatch(f"{name}: tensor {key} has no meaning in an adapter of its type.", "Import it again.")
    return {key.removeprefix(PREFIX): tensor for key, tensor in others.items()}


def _lora(adapter: Adapter, spec: LoraSpec, wish: _Wish) -> tuple[dict[str, Change], dict[str, torch.Tensor]]:
    parts, others = split_tensors(adapter.tensors)
    modules = {module: _lora_change(spec, module, part, wish) for module, part in parts.items()}
    embedded: dict[str, dict[str, torch.Tensor]] = {}
    for key in list(others):
        match = _EMBEDDING.fullmatch(key)
        if match:
            embedded.setdefault(match["module"], {})[match["part"]] = others.pop(key)
    if spec.use_dora and embedded:
        raise Unsupported(f"{adapter.name} changes an embedding by DoRA.", "Train it without the embedding.")
    for module, part in embedded.items():
        modules[module] = Change(_product(adapter.name, spec, module, part), embedding=True)
    return modules, others


def _product(name: str, spec: LoraSpec, module: str, part: Mapping[str, torch.Tensor]) -> LowRank:
    down, up = part.get("A"), part.get("B")
    if down is None or up is None:
        raise AdapterMismatch(f"{name}: {module} has only one of lora_A and lora_B.", "Import it again.")
    if down.dim() != 2 or up.dim() != 2:
        raise Unsupported(f"{name}: {module} is a convolution.", "Train the adapter on linear layers alone.")
    rank = down.shape[0]
    if not rank or up.shape[1] != rank:
        found = f"A {list(down.shape)} and B {list(up.shape)}"
        raise AdapterMismatch(f"{name}: {module} has {found}, which share no rank.", "Import it again.")
    return _scaled(down, up, spec.scaling(module, rank))


def _scaled(down: torch.Tensor, up: torch.Tensor, scaling: float) -> LowRank:
    """In float32 where that rounds nothing: half the memory, and alpha is mostly a power of two times the rank."""
    exact = math.frexp(scaling)[0] == 0.5 and torch.float64 not in (down.dtype, up.dtype)
    dtype = torch.float32 if exact else torch.float64
    return LowRank(down.to(dtype), up.to(dtype) * scaling if scaling != 1 else up.to(dtype))


def _lora_change(spec: LoraSpec, module: str, part: Mapping[str, torch.Tensor], wish: _Wish) -> Change:
    matrix = _product(wish.name, spec, module, part)
    if spec.use_dora != ("magnitude" in part):
        wrong = "lacks" if spec.use_dora else "has"
        raise AdapterMismatch(f"{wish.name}: {module} {wrong} a magnitude vector.", "Import it again.")
    bias = part.get("bias")
    if not spec.use_dora:
        return Change(matrix, None if bias is None else bias.double() * spec.scaling(module, matrix.rank))
    if bias is not None:
        raise Unsupported(f"{module}: DoRA with lora_bias has no defined meaning.", "Train it without lora_bias.")
    magnitude = part["magnitude"].double().flatten()
    if magnitude.numel() != matrix.shape[0]:
        raise AdapterMismatch(f"{wish.name}: {module} has a magnitude of {magnitude.numel()}.", "Import it again.")
    wish.check(_DORA)

    def read() -> Rows:
        return dora_rows(_fitting(wish, module, wish.weight(module, _DORA), matrix.shape), matrix, magnitude)

    return wish.change(FullRank(matrix.shape, 4 * matrix.rank, read))


def _fitting(wish: _Wish, module: str, weight: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if tuple(weight.shape) != shape:
        found = f"{module} changes {list(shape)}, this base's layer is {list(weight.shape)}"
        raise AdapterMismatch(f"{wish.name}: {found}.", "It was made for another model.")
    return weight


def _factored(adapter: Adapter, spec: FactoredSpec, wish: _Wish) -> tuple[dict[str, Change], dict[str, torch.Tensor]]:
    parts, others = split_factors(adapter.tensors)
    if spec.method == "ADALORA" or wish.rank is None:
        sites = fitted_factors(spec, parts)
        return {name: Change(LowRank(s.down, s.up)) for name, s in sites.items()}, others
    for name, part in parts.items():
        problem = factor_problem(spec, name, {key: tuple(tensor.shape) for key, tensor in part.items()})
        if problem:
            raise AdapterMismatch(f"{adapter.name}: {problem}.", "Import it again.")
    return {name: _of_rank(spec, name, part, wish) for name, part in parts.items()}, others


def _of_rank(spec: FactoredSpec, module: str, part: Mapping[str, torch.Tensor], wish: _Wish) -> Change:
    """LoHa or LoKr brought to a rank, without the product of their ranks between."""
    stem = "hada_w" if spec.method == "LOHA" else "lokr_w"
    tensors = {key: tensor.double() for key, tensor in part.items()}
    one, two = (_half(tensors, f"{stem}{i}") for i in (1, 2))
    scale = spec.alpha_of(module) / spec.rank_of(module)
    if spec.method == "LOHA":
        shape = one.shape

        def rows(start: int, stop: int) -> torch.Tensor:
            return scale * one.rows(start, stop) * two.rows(start, stop)

    else:
        small, large = one.rows(0, one.shape[0]), two.shape[0]
        shape = one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]

        def rows(start: int, stop: int) -> torch.Tensor:
            found = torch.arange(start, stop)
            left, right = small[found // large], two.rows(0, large)[found % large]
            return scale * (left[:, :, None] * right[:, None, :]).flatten(1)

    matrix, error = wish.brought(shape, rows, min(shape))
    return Change(matrix, None, error)


def _half(tensors: Mapping[str, torch.Tensor], stem: str) -> LowRank:
    """One of the two matrices; a whole one times an identity."""
    if stem not in tensors:
        return LowRank(tensors[f"{stem}_b"], tensors[f"{stem}_a"])
    whole = tensors[stem]
    return LowRank(whole, torch.eye(whole.shape[0], dtype=whole.dtype))


def _ia3(adapter: Adapter, spec: Ia3Spec, wish: _Wish) -> tuple[dict[str, Change], dict[str, torch.Tensor]]:
    vectors, others = split_ia3(adapter.tensors)
    return {module: _ia3_change(spec, module, vector, wish) for module, vector in vectors.items()}, others


def _ia3_change(spec: Ia3Spec, module: str, vector: torch.Tensor, wish: _Wish) -> Change:
    if vector.dim() != 2:
        raise Unsupported(f"{wish.name}: {module} is a convolution.", "Train the adapter on linear layers alone.")
    n_out, n_in = shape = _two(wish.weight(module, _IA3))
    gain = vector.double().flatten() - 1
    inputs = tuple(vector.shape) == (1, n_in) and spec.scales_input(module) is not False
    if not inputs and tuple(vector.shape) != (n_out, 1):
        found = f"{module} has ia3_l {list(vector.shape)}, this base's layer is {[n_out, n_in]}"
        raise AdapterMismatch(f"{wish.name}: {found}.", "It was made for another model.")

    def read() -> Rows:
        return scaled_rows(wish.weight(module, _IA3), gain if inputs else gain[:, None])

    full = FullRank(shape, _IA3_RANK, read)
    if inputs:
        return wish.change(full)
    if wish.bias_of is None:
        message = f"{wish.name} (IA3) scales the outputs of {module}, and nothing says whether the layer has a bias."
        raise Unsupported(message, "Name its base with --base.")
    own = wish.bias_of(module)
    return wish.change(full, None if own is None else gain * own.detach().double())


def _two(weight: torch.Tensor) -> tuple[int, int]:
    n_out, n_in = weight.shape
    return n_out, n_in
