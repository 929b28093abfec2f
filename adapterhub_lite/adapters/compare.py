"""How far the changes that two adapters make agree, module by module.

The change of a LoRA module is D = s B A [out, in]. Norms and cosines are the Frobenius ones,
    <D1, D2> = s1 s2 sum((B1^T B2) * (A1 A2^T)),
so that only products of the size rank x rank are formed, in float64. DoRA's direction is compared as LoRA is, and its
magnitudes beside it; prefixes by their keys and values in each layer; prompts by their tokens; IA3 by how far its
factors are from 1; heads as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import AdapterMismatch, Unsupported
from ..formats.adapter_files import A_SUFFIX, B_SUFFIX, LORA_PREFIX, PREFIX_HEAD_PREFIX, PROMPT
from ..formats.specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec, PromptSpec
from .adapter import Adapter
from .factored import fitted_factors, split_factors
from .ia3 import split_ia3
from .lora import split_tensors
from .prefix import PrefixShape, layer_rows

Part = Literal["delta", "bias", "magnitude", "factor", "prefix", "head"]
PARTS: tuple[Part, ...] = ("delta", "bias", "magnitude", "factor", "prefix", "head")
_EMBEDDING = {A_SUFFIX["embedding"]: "A", B_SUFFIX["embedding"]: "B"}
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Overlap:
    """What two adapters do to one thing: a module, a layer or the whole.

    Attributes:
        part: delta (s B A), bias (of lora_B, scaled), magnitude (DoRA's), factor (IA3's, less 1), prefix (also the
            tokens of a prompt) or head.
        norm_a, norm_b: Frobenius norms; None where the adapter does not change it.
        dot: Frobenius inner product, 0 where only one changes it; None where the shapes differ.
    """

    name: str
    part: Part
    norm_a: float | None
    norm_b: float | None
    dot: float | None

    @property
    def cosine(self) -> float | None:
        """From -1 to 1; None where one does nothing, or the shapes differ."""
        if not self.norm_a or not self.norm_b or self.dot is None:
            return None
        return max(-1.0, min(1.0, self.dot / self.norm_a / self.norm_b))

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        norms = {"norm_a": self.norm_a, "norm_b": self.norm_b}
        return {"name": self.name, "part": self.part, **norms, "cosine": self.cosine}


@dataclass(frozen=True)
class Comparison:
    """Every module, the layers they belong to, and the whole: one `Overlap` for each part there is.

    Attributes:
        kind: lora, dora, adalora, loha, lokr, ia3, prefix or prompt.
    """

    kind: str
    modules: tuple[Overlap, ...]
    layers: tuple[Overlap, ...]
    whole: tuple[Overlap, ...]

    def only_in(self, side: Literal["a", "b"]) -> tuple[Overlap, ...]:
        """What this adapter changes and the other does not."""
        return tuple(one for one in self.modules if (one.norm_b if side == "a" else one.norm_a) is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        parts = {"whole": self.whole, "layers": self.layers, "modules": self.modules}
        return {"kind": self.kind, **{name: [one.to_dict() for one in rows] for name, rows in parts.items()}}


@dataclass(frozen=True)
class _Change:
    """scale * up @ down, with up [out, r] and down [r, in]; a dense tensor is a column times a single 1."""

    shape: tuple[int, ...]
    up: torch.Tensor
    down: torch.Tensor
    scale: float = 1.0

    def exact(self) -> _Change:
        """In float64, the scale folded in."""
        return _Change(self.shape, self.up.to(torch.float64) * self.scale, self.down.to(torch.float64))

    def dot(self, other: _Change) -> float:
        """Frobenius inner product of two exact changes of one shape."""
        return float(((self.up.T @ other.up) * (self.down @ other.down.T)).sum())

    def norm(self) -> float:
        """Frobenius norm of an exact change; rounding may bring the square of a vanishing one below zero."""
        return math.sqrt(max(self.dot(self), 0.0))


_Changes = dict[tuple[Part, str], _Change]


def kind_of(adapter: Adapter) -> str:
    """lora, dora, adalora, loha, lokr, ia3, prefix or prompt; of what PEFT runs its method, as vera."""
    if isinstance(adapter.spec, FactoredSpec | InjectedSpec):
        return adapter.spec.method.lower()
    if not isinstance(adapter.spec, LoraSpec):
        return {Ia3Spec: "ia3", PrefixSpec: "prefix", PromptSpec: "prompt"}[type(adapter.spec)]
    return "dora" if adapter.spec.use_dora else "lora"


def compare(a: Adapter, b: Adapter) -> Comparison:
    """Compare the changes of two adapters of one kind, on the device of their tensors.

    Raises:
        Unsupported: they are of different kinds, whose tensors mean different things; or only PEFT knows their kind.
        AdapterMismatch: tensors that do not belong together, or values beyond what can be squared.
    """
    if kind_of(a) != kind_of(b):
        raise Unsupported(
            f"{a.name} is {kind_of(a)}, {b.name} is {kind_of(b)}: their tensors mean different things.",
            "Compare their answers.",
        )
    if isinstance(a.spec, InjectedSpec):
        message = f"{a.name} and {b.name} are {kind_of(a)}: what their tensors do to a weight only PEFT's layers know."
        raise Unsupported(message, "Compare their answers.")
    ours, theirs = _changes(a), _changes(b)
    keys = sorted({**ours, **theirs}, key=lambda key: (PARTS.index(key[0]), natural(key[1])))
    modules = tuple(_overlap(key, ours.get(key), theirs.get(key)) for key in keys)
    layers = _sums((layer_of(one.name), one) for one in modules)
    return Comparison(kind_of(a), modules, layers, _sums(("whole", one) for one in modules))


def layer_of(name: str) -> str:
    """The layer that a module is in: its path up to the first number, as in `model.layers.3`; else its own name."""
    found = _LAYER.match(name)
    return found[0] if found else name


def natural(name: str) -> list[tuple[int, int | str]]:
    """A sorting key under which layer 10 comes after layer 9."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _overlap(key: tuple[Part, str], a: _Change | None, b: _Change | None) -> Overlap:
    part, name = key
    a, b = a and a.exact(), b and b.exact()
    dot: float | None = 0.0
    if a and b:
        dot = a.dot(b) if a.shape == b.shape else None
    found = Overlap(name, part, a.norm() if a else None, b.norm() if b else None, dot)
    if not all(math.isfinite(value) for value in (found.norm_a, found.norm_b, found.dot) if value is not None):
        raise AdapterMismatch(f"The values at {name} are too large to compare.", "The training diverged.")
    return found


def _sums(grouped: Iterable[tuple[str, Overlap]]) -> tuple[Overlap, ...]:
    """One overlap for each group and part, as if the modules' changes were one long vector."""
    groups: dict[tuple[str, Part], list[Overlap]] = {}
    for name, one in grouped:
        groups.setdefault((name, one.part), []).append(one)
    return tuple(
        Overlap(name, part, _length(x.norm_a for x in rows), _length(x.norm_b for x in rows), _total(rows))
        for (name, part), rows in groups.items()
    )


def _length(norms: Iterable[float | None]) -> float | None:
    present = [norm for norm in norms if norm is not None]
    return math.hypot(*present) if present else None


def _total(rows: list[Overlap]) -> float | None:
    dots = [one.dot for one in rows if one.dot is not None]
    return math.fsum(dots) if len(dots) == len(rows) else None


def _changes(adapter: Adapter) -> _Changes:
    spec = adapter.spec
    if isinstance(spec, LoraSpec):
        return _lora_changes(adapter, spec)
    if isinstance(spec, FactoredSpec):
        parts, others = split_factors(adapter.tensors)
        sites = fitted_factors(spec, parts)
        deltas: _Changes = {
            ("delta", name): _Change((site.up.shape[0], site.down.shape[1]), site.up, site.down)
            for name, site in sites.items()
        }
        return {**deltas, **_heads(others, LORA_PREFIX)}
    assert not isinstance(spec, InjectedSpec)
    if isinstance(spec, Ia3Spec):
        vectors, others = split_ia3(adapter.tensors)
        found: _Changes = {("factor", name): _dense(vector - 1) for name, vector in vectors.items()}
        return {**found, **_heads(others, LORA_PREFIX)}
    if isinstance(spec, PromptSpec):
        return {("prefix", "tokens"): _dense(_prompt(adapter, spec)), **_heads(adapter.tensors, PREFIX_HEAD_PREFIX)}
    return _prefix_changes(adapter, spec)


def _lora_changes(adapter: Adapter, spec: LoraSpec) -> _Changes:
    parts, others = split_tensors(adapter.tensors)
    heads: dict[str, torch.Tensor] = {}
    for key, tensor in others.items():
        name = key.removeprefix(LORA_PREFIX)
        suffix = next((suffix for suffix in _EMBEDDING if key.endswith(suffix)), None)
        if suffix is None:
            heads[name] = tensor
        else:
            parts.setdefault(name.removesuffix(suffix), {})[_EMBEDDING[suffix]] = tensor
    found: _Changes = {("head", name): _dense(tensor) for name, tensor in heads.items()}
    for module, part in parts.items():
        down, up = part.get("A"), part.get("B")
        if down is None or up is None or down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise AdapterMismatch(f"{adapter.name}: {module} has no A and B that belong together.", "Import it again.")
        scale = spec.scaling(module, down.shape[0])
        found["delta", module] = _Change((up.shape[0], down.shape[1]), up, down, scale)
        if "bias" in part:
            found["bias", module] = _dense(part["bias"], scale)
        if "magnitude" in part:
            found["magnitude", module] = _dense(part["magnitude"])
    return found


def _prefix_changes(adapter: Adapter, spec: PrefixSpec) -> _Changes:
    rows = _prompt(adapter, spec).view(spec.num_virtual_tokens, 2 * spec.num_layers, spec.token_dim)
    shape = PrefixShape(spec.num_layers, 1, spec.token_dim)
    keys, values = layer_rows(shape, spec.num_transformer_submodules)
    found: _Changes = {}
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        found["prefix", f"layers.{layer}.keys"] = _dense(rows[:, key])
        found["prefix", f"layers.{layer}.values"] = _dense(rows[:, value])
    return {**found, **_heads(adapter.tensors, PREFIX_HEAD_PREFIX)}


def _prompt(adapter: Adapter, spec: PrefixSpec | PromptSpec) -> torch.Tensor:
    prompt = adapter.tensors.get(PROMPT)
    if prompt is None or tuple(prompt.shape) != spec.shape:
        raise AdapterMismatch(f"{adapter.name}: no {PROMPT} of shape {list(spec.shape)}.", "Import it again.")
    return prompt


def _heads(tensors: Mapping[str, torch.Tensor], stem: str) -> _Changes:
    return {("head", key.removeprefix(stem)): _dense(t) for key, t in tensors.items() if key != PROMPT}


def _dense(tensor: torch.Tensor, scale: float = 1.0) -> _Change:
    return _Change(tuple(tensor.shape), tensor.reshape(-1, 1), tensor.new_ones(1, 1), scale)
