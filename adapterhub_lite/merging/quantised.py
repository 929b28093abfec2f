"""A merged checkpoint in NF4 or int8 as bitsandbytes stores them, so that plain transformers loads it.

Each linear layer that transformers would quantise is made, rounded once and written as several tensors, one layer in
memory at a time. Where rounding should lose less, it is told what the layers read (`inputs`), and what is lost all the
same can go into a small adapter beside the weights (`residual_rank`).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..bases.quantization import NF4_BLOCK_SIZE, NOT_QUANTISED, quantization_config
from ..bases.quantization import linear_layers as linear_layers
from ..bases.quiet import quiet
from ..errors import AdapterMismatch, Unsupported
from .checkpoint import Planned
from .dense import Product
from .inputs import Inputs
from .int8 import Int8
from .nf4 import Nf4
from .plan import MergePlan
from .residual import Factors, directions_of, low_rank, metric_of, residual_adapter_of

KINDS = ("nf4", "int8")
_WORTH_SAYING = 0.1  # share of the bytes
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rounding:
    """What storing one layer lost, relative to its merged weight (Frobenius norm).

    Attributes:
        plain: by bitsandbytes' own rounding; error: as it is stored; repaired: with the residual adapter.
    """

    plain: float
    error: float
    repaired: float | None = None


@dataclass(frozen=True)
class QuantisedPlan(MergePlan):
    """A merge plan whose linear layers are quantised.

    Attributes:
        kind: nf4 or int8.
        residual_rank: of the adapter of what was lost; 0 for none.
        roundings: by module, of the layers that were made so far.
    """

    kind: str = ""
    residual_rank: int = 0
    roundings: dict[str, Rounding] = field(default_factory=dict)
    layers: dict[str, _Layer] = field(default_factory=dict, repr=False)


def quantised_plan(
    plan: MergePlan,
    kind: str,
    *,
    search: bool = True,
    residual_rank: int = 0,
    inputs: Mapping[str, Inputs] | None = None,
    changes: Mapping[str, Factors] | None = None,
    double_quant: bool = False,
) -> QuantisedPlan:
    """The same checkpoint with its linear layers stored in 4 or 8 bits; output layers and heads stay as they are.

    Args:
        kind: nf4 or int8.
        search: try scales other than the largest magnitude of a block (nf4) or row (int8), and pass losses on to where
            they do least: to inputs that the adapters do not look at, or by `inputs`. Else round as bitsandbytes does.
        residual_rank: keep what is lost as an adapter of this rank (`residual_adapter`).
        inputs: module name -> what it reads (`inputs_of`); rounding then keeps the layers' outputs rather than weights.
        changes: module name -> what the adapters add to its weight, where the plan is not to be asked.
        double_quant: nf4: quantise the scales too.

    Raises:
        Unsupported: another kind, no layer to quantise, or one whose tensor has another name.
    """
    form = _form(kind, search, double_quant)
    model = _skeleton(plan.config)
    tensors = {planned.name: planned for shard in plan.shards.values() for planned in shard}
    skip = _skipped(model)
    linear = linear_layers(model, skip)
    every = {name: _tensor_of(name, model, tensors) for name in linear}
    odd = [name for name, turned in linear.items() if not form.takes(tensors[every[name]].shape[0 if turned else 1])]
    skip += odd
    modules = linear_layers(model, skip)
    dtype = _dtype_of([tensors[every[name]].dtype for name in modules])
    given = {f.name: getattr(plan, f.name) for f in fields(plan)}
    how = (kind, search, residual_rank, double_quant, _digest(inputs), sorted(changes or ()))
    given |= {"shards": {}, "config": {**plan.config, "quantization_config": _said(kind, dtype, skip, double_quant)}}
    given |= {"identity": plan.varied(repr(how)).identity, "notes": [*plan.notes, *_told(odd)]}
    made = QuantisedPlan(**given, kind=kind, residual_rank=residual_rank)
    for name, turned in modules.items():
        made.layers[name] = _Layer(
            name, tensors[every[name]], form, turned, dtype, residual_rank,
            (inputs or {}).get(name), (changes or {}).get(name), made.roundings,
        )  # fmt: skip
    made.notes.extend(_left(model, tensors, {every[name] for name in linear}))
    parts = {every[name]: layer.planned() for name, layer in made.layers.items()}
    for file, shard in plan.shards.items():
        made.shards[file] = [part for planned in shard for part in parts.get(planned.name, [planned])]
    return made


def residual_adapter(plan: QuantisedPlan) -> Adapter:
    """The adapter of what rounding lost, of rank `plan.residual_rank`; layers that were not made yet are made now.

    Raises:
        Unsupported: the plan keeps none.
    """
    if plan.residual_rank < 1:
        raise Unsupported("This merge keeps no residual adapter.", "Ask for one with a rank of at least 1.")
    factors = {module: layer.factors() for module, layer in plan.layers.items()}
    dtype = next(iter(plan.layers.values())).dtype
    model = _skeleton(plan.config)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    return residual_adapter_of(factors, plan.residual_rank, linear, _task_of(plan.config), dtype)


def change_of(planned: Planned, turned: bool) -> Factors | None:
    """The low-rank matrices [out, in] that adapters add to a weight; DoRA scales the sum after that.

    Args:
        turned: the weight is stored [in, out].
    """
    terms = planned.edit.terms if planned.edit is not None else ()
    found = [(term, term.make()) for term in terms if term.make is not None]
    products = [(term, made) for term, made in found if isinstance(made, Product)]
    if not products:
        return None
    left = torch.cat([made.left * (made.factor * term.weight / made.divisor) for term, made in products], 1)
    right = torch.cat([made.right for _, made in products])
    return Factors(left.T, right.T) if turned else Factors(right, left)


class _Layer:
    """A weight that is rounded once for all tensors that it becomes; they are let go of as they are taken."""

    def __init__(
        self,
        module: str,
        source: Planned,
        form: Nf4 | Int8,
        turned: bool,
        dtype: torch.dtype,
        rank: int,
        inputs: Inputs | None,
        change: Factors | None,
        roundings: dict[str, Rounding],
    ) -> None:
        self.search = form.search
        self.module, self.source, self.form, self.turned, self.dtype, self.rank = (
            module, source, form, turned, dtype, rank,
        )  # fmt: skip
        self._given, self._change, self._roundings = inputs, change, roundings
        self._parts: dict[str, torch.Tensor] = {}
        self._factors: Factors | None = None
        self._lock = threading.Lock()

    def planned(self) -> list[Planned]:
        """The tensors to write, by the names that they have in a checkpoint."""
        shape = self.source.shape[::-1] if self.turned else self.source.shape
        stem = self.source.name.removesuffix("weight")
        return [
            Planned(f"{stem}{part}", dtype, size, partial(self._take, part))
            for part, (dtype, size) in self.form.layout(shape, self.dtype).items()
        ]

    def factors(self) -> Factors:
        """What the residual adapter adds to this layer."""
        with self._lock:
            if self._factors is None:
                self._make()
            assert self._factors is not None
            return self._factors

    def _take(self, part: str) -> torch.Tensor:
        with self._lock:
            if part not in self._parts:
                self._parts = self._make()
            return self._parts.pop(part)

    def _known(self) -> Inputs | None:
        """What the layer reads, or else what the adapters look at in it, as far as it is known."""
        if self._given is not None or not self.search:
            return self._given
        change = self._change or change_of(self.source, self.turned)
        return None if change is None else directions_of(change)

    def _make(self) -> dict[str, torch.Tensor]:
        weight = self.source.make().float()
        weight = weight.T.contiguous() if self.turned else weight.contiguous()
        if not bool(torch.isfinite(weight).all()):
            raise AdapterMismatch(f"{self.source.name} holds values that are not finite.", "Get the checkpoint anew.")
        inputs = self._known()
        parts, plain = self.form.quantise(weight, self.dtype, inputs)
        size = _norm(weight) or 1.0
        loss = weight - self.form.dense(parts)
        error, left = _norm(loss) / size, None
        if self.rank:
            self._factors = low_rank(loss, self.rank, metric_of(inputs))
            left = _norm(loss - self._factors.dense()) / size
        self._roundings[self.module] = Rounding(math.sqrt(plain) / size, error, left)
        return parts


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _form(kind: str, search: bool, double_quant: bool) -> Nf4 | Int8:
    if kind not in KINDS:
        raise Unsupported(f"{kind!r} is not a way to quantise a merged checkpoint.", f"Use {' or '.join(KINDS)}.")
    if double_quant and kind != "nf4":
        raise Unsupported("Only scales of nf4 are quantised twice.", "Leave double_quant out.")
    return Nf4(search, double_quant) if kind == "nf4" else Int8(search)


def _skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration without its weights, as the class that the configuration names."""
    import transformers

    name = str((config.get("architectures") or ["none"])[0])
    plain = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise Unsupported(f"transformers has no model class {name}.", "Merge to float weights.")
    with quiet(), torch.device("meta"):
        model: nn.Module = found(transformers.AutoConfig.for_model(config["model_type"], **plain))
        return model


def _skipped(model: Any) -> list[str]:
    """What stays as it is: heads and output layers by their usual names, and by what the model says is its own."""
    output = model.get_output_embeddings()
    own = [name for name, module in model.named_modules() if output is not None and module is output]
    return list(dict.fromkeys([*NOT_QUANTISED, *own]))


def _tensor_of(module: str, model: Any, tensors: Mapping[str, Planned]) -> str:
    """The checkpoint's name of a module's weight: with or without the backbone's prefix."""
    name, prefix = f"{module}.weight", f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        if candidate in tensors:
            return candidate
    raise Unsupported(
        f"The merged checkpoint has no tensor {name}, which {type(model).__name__} would quantise.",
        "Merge to float weights.",
    )


def _dtype_of(dtypes: list[torch.dtype]) -> torch.dtype:
    """What weights are dequantised to: what they would have been stored in."""
    if not dtypes:
        raise Unsupported("This model has no linear layer to quantise.", "Merge to float weights.")
    return dtypes[0] if dtypes[0] in _FLOATS else torch.float32


def _told(odd: list[str]) -> list[str]:
    """What to say of layers that stay as they are."""
    if not odd:
        return []
    return [
        f"{len(odd)} layers ({odd[0]}, ...) have rows that are no whole blocks of {NF4_BLOCK_SIZE}, which bitsandbytes "
        "does not read rightly on every processor: they are not quantised."
    ]


def _left(model: Any, tensors: Mapping[str, Planned], linear: set[str]) -> list[str]:
    """What to say of matrices in no linear layer, as experts may be that a class computes together."""
    ends = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    known = {_plain_name(f"{name}.weight", model) for name, module in model.named_modules() if module in ends}
    left = [
        one
        for name, one in tensors.items()
        if len(one.shape) > 1 and name not in linear and _plain_name(name, model) not in known
    ]
    share = sum(one.nbytes for one in left) / max(1, sum(one.nbytes for one in tensors.values()))
    if share < _WORTH_SAYING:
        return []
    return [
        f"{len(left)} matrices ({left[0].name}, ...), {share:.0%} of the weights, are no linear layers of "
        f"{type(model).__name__}: they are not quantised."
    ]


def _plain_name(name: str, model: Any) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def _said(kind: str, dtype: torch.dtype, skip: list[str], double_quant: bool) -> dict[str, Any]:
    """quantization_config of config.json."""
    config: Any = quantization_config(kind, dtype, skip)
    config.bnb_4bit_use_double_quant = double_quant
    said: dict[str, Any] = config.to_dict()
    return said


def _task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type for an adapter without a head of its own."""
    name = str((config.get("architectures") or [""])[0])
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None


def _digest(inputs: Mapping[str, Inputs] | None) -> str:
    """Digest of what layers read: with other moments the same plan has other values."""
    whole = hashlib.sha256()
    for name, one in sorted((inputs or {}).items()):
        whole.update(f"{name} {one.digest()}\n".encode())
    return whole.hexdigest()
