"""Whether the tensors of an adapter fit its configuration exactly, judged from the header alone.

Tensor names are those PEFT 0.21 writes (`peft.utils.save_and_load`): `base_model.model.<module>.lora_A.weight` [rank,
in], `.lora_B.weight` [out, rank], `.lora_B.bias` [out], `.lora_embedding_A` [rank, rows], `.lora_embedding_B` [width,
rank], `.lora_magnitude_vector` [out]; for IA3 `.ia3_l` [out, 1], or [1, in] where the input is scaled; heads of
`modules_to_save` under the same prefix; for prefix and prompt tuning `prompt_embeddings`, and heads under `base_model.`
alone; for methods that PEFT runs see `formats.injected`.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import AdapterMismatch, Unsupported
from .finite import FLOAT_DTYPES
from .injected import INDEX_DTYPES, METHODS, is_index, module_of, unsized
from .safetensors_header import Header, TensorInfo
from .specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec, PromptSpec, Spec

LORA_PREFIX = "base_model.model."
PREFIX_HEAD_PREFIX = "base_model."
PROMPT = "prompt_embeddings"

Kind = Literal["linear", "embedding"]
A_SUFFIX: dict[Kind, str] = {"linear": ".lora_A.weight", "embedding": ".lora_embedding_A"}
B_SUFFIX: dict[Kind, str] = {"linear": ".lora_B.weight", "embedding": ".lora_embedding_B"}
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
BIAS_SUFFIX = ".lora_B.bias"
IA3_SUFFIX = ".ia3_l"
# Of AdaLoRA, LoHa and LoKr. A matrix of LoKr is there whole, or as two.
FACTORS = {
    "ADALORA": (("lora_A",), ("lora_B",), ("lora_E",)),
    "LOHA": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "LOKR": (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
}
_FACTOR_SUFFIXES = tuple("." + name for kind in FACTORS.values() for names in kind for name in names)
_SUFFIXES = (
    *A_SUFFIX.values(),
    *B_SUFFIX.values(),
    MAGNITUDE_SUFFIX,
    BIAS_SUFFIX,
    IA3_SUFFIX,
    *_FACTOR_SUFFIXES,
)


@dataclass(frozen=True, slots=True)
class ModuleRanks:
    """One adapted module: A is [rank, in_features], B is [out_features, rank]."""

    rank: int
    in_features: int
    out_features: int
    dora: bool
    bias: bool
    kind: Kind


@dataclass(frozen=True, slots=True)
class LoraInventory:
    """What a LoRA file holds, by module path inside the base; `heads` are whole tensors of `modules_to_save`."""

    modules: dict[str, ModuleRanks]
    heads: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class PrefixInventory:
    """What a file of prefix or prompt tuning holds: `prompt` of the spec's `shape`, and heads as for LoRA."""

    prompt: TensorInfo
    heads: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Ia3Inventory:
    """What an IA3 file holds: the vectors by module path inside the base, and heads as for LoRA."""

    vectors: dict[str, TensorInfo]
    heads: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class FactoredInventory:
    """What a file of AdaLoRA, LoHa or LoKr holds: factors by module path inside the base, and heads as for LoRA."""

    factors: dict[str, dict[str, TensorInfo]]
    heads: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class InjectedInventory:
    """What the file of a method that PEFT runs holds: the changed modules, and heads as for LoRA."""

    modules: tuple[str, ...]
    heads: dict[str, TensorInfo]


Inventory = LoraInventory | PrefixInventory | Ia3Inventory | FactoredInventory | InjectedInventory


def inventory(spec: Spec, header: Header) -> Inventory:
    """Check that the tensors are exactly those `spec` calls for.

    Raises:
        AdapterMismatch: with the counts of expected, found, missing and unexpected tensors and three examples.
        Unsupported: adapters of convolutions.
    """
    if isinstance(spec, LoraSpec):
        return lora_inventory(spec, header)
    if isinstance(spec, FactoredSpec):
        return factored_inventory(spec, header)
    if isinstance(spec, InjectedSpec):
        return injected_inventory(spec, header)
    return ia3_inventory(spec, header) if isinstance(spec, Ia3Spec) else prefix_inventory(spec, header)


def lora_inventory(spec: LoraSpec, header: Header) -> LoraInventory:
    """`inventory` for LoRA and DoRA."""
    kinds = _kinds(spec, header)
    expected = {name for module, kind in kinds.items() for name in lora_names(module, kind, spec)}
    heads = _heads(spec.modules_to_save, header, LORA_PREFIX)
    _check_names(expected, set(header.tensors) - {LORA_PREFIX + head for head in heads}, len(header.tensors))
    modules = {module: _ranks(module, kind, spec, header) for module, kind in sorted(kinds.items())}
    _check_values(_rank_problems(modules, spec), header)
    return LoraInventory(modules, heads)


def ia3_inventory(spec: Ia3Spec, header: Header) -> Ia3Inventory:
    """`inventory` for IA3."""
    found = {name.removeprefix(LORA_PREFIX).removesuffix(IA3_SUFFIX) for name in header.tensors if _is_ia3(name)}
    modules = sorted(module for module in found if not spec.target_modules or spec.targets(module))
    heads = _heads(spec.modules_to_save, header, LORA_PREFIX)
    expected = {LORA_PREFIX + module + IA3_SUFFIX for module in modules}
    _check_names(expected, set(header.tensors) - {LORA_PREFIX + head for head in heads}, len(header.tensors))
    vectors = {module: header.tensors[LORA_PREFIX + module + IA3_SUFFIX] for module in modules}
    _check_values([p for module, info in vectors.items() if (p := _ia3_problem(spec, module, info))], header)
    return Ia3Inventory(vectors, heads)


def factored_inventory(spec: FactoredSpec, header: Header) -> FactoredInventory:
    """`inventory` for AdaLoRA, LoHa and LoKr."""
    known = {name for names in FACTORS[spec.method] for name in names}
    factors: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        module, _, factor = name.removeprefix(LORA_PREFIX).rpartition(".")
        targeted = not spec.target_modules or spec.targets(module)
        if name.startswith(LORA_PREFIX) and factor in known and targeted:
            factors.setdefault(module, {})[factor] = info
    expected = {f"{LORA_PREFIX}{m}.{name}" for m, found in factors.items() for name in _factor_names(spec, set(found))}
    heads = _heads(spec.modules_to_save, header, LORA_PREFIX)
    _check_names(expected, set(header.tensors) - {LORA_PREFIX + head for head in heads}, len(header.tensors))
    every = [(f"{m}.{factor}", info.shape) for m, found in factors.items() for factor, info in found.items()]
    wrong = [f"{name} is {list(shape)}, not two-dimensional" for name, shape in every if len(shape) != 2]
    _check_values(wrong, header)
    return FactoredInventory(dict(sorted(factors.items())), heads)


def _factor_names(spec: FactoredSpec, found: set[str]) -> set[str]:
    """The tensors that one module must have."""
    names: set[str] = set()
    for group in FACTORS[spec.method]:
        names |= set(group) if len(group) == 1 else {group[0]} if group[0] in found else set(group[1:])
    return names


def prefix_inventory(spec: PrefixSpec | PromptSpec, header: Header) -> PrefixInventory:
    """`inventory` for prefix tuning, prompt tuning and P-tuning."""
    heads = _heads(spec.modules_to_save, header, PREFIX_HEAD_PREFIX)
    _check_names({PROMPT}, set(header.tensors) - {PREFIX_HEAD_PREFIX + head for head in heads}, len(header.tensors))
    prompt = header.tensors[PROMPT]
    wrong = [] if prompt.shape == spec.shape else [f"{PROMPT} is {list(prompt.shape)}, not {list(spec.shape)}"]
    _check_values(wrong, header)
    return PrefixInventory(prompt, heads)


def injected_inventory(spec: InjectedSpec, header: Header) -> InjectedInventory:
    """`inventory` for a method that PEFT runs; which tensors a module must have is known where PEFT has made it."""
    heads = _heads(spec.modules_to_save, header, LORA_PREFIX)
    found = set(header.tensors) - {LORA_PREFIX + head for head in heads}
    modules = {name: module_of(spec.method, name) for name in found}
    # PEFT would drop tensors of other modules silently; those tied to an embedding are its own once more.
    named = bool(spec.target_modules) and METHODS[spec.method].layers != "embedding"
    strange = {m for m in modules.values() if m and named and not spec.targets(m)}
    own = {name for name, module in modules.items() if module is not None and module not in strange}
    _check_names(own, found, len(header.tensors))
    changed = tuple(sorted({module for module in modules.values() if module}))
    problems = [] if changed or spec.target_modules else ["nothing says which modules they are for"]
    wrong = unsized(spec, (header.tensors[name].shape for name in own))
    _check_values([*problems, *([wrong] if wrong else [])], header, {n for n in own if is_index(spec.method, n)})
    return InjectedInventory(changed, heads)


def lora_names(module: str, kind: Kind, spec: LoraSpec) -> tuple[str, ...]:
    """The tensor names that one adapted module has on disk: A, B, and what DoRA and lora_bias add."""
    stem = LORA_PREFIX + module
    extra = [MAGNITUDE_SUFFIX] * spec.use_dora + [BIAS_SUFFIX] * (spec.lora_bias and kind == "linear")
    return tuple(stem + suffix for suffix in (A_SUFFIX[kind], B_SUFFIX[kind], *extra))


def with_targets(spec: Spec, found: Inventory) -> Spec:
    """`spec` with `target_modules` spelled out as whole module paths, where only the tensors said which."""
    if isinstance(spec, LoraSpec) and isinstance(found, LoraInventory) and not spec.target_modules:
        return replace(spec, target_modules=tuple(sorted(found.modules)))
    if isinstance(spec, FactoredSpec) and isinstance(found, FactoredInventory) and not spec.target_modules:
        return replace(spec, target_modules=tuple(found.factors))
    if isinstance(spec, InjectedSpec) and isinstance(found, InjectedInventory) and not spec.target_modules:
        return replace(spec, target_modules=found.modules)
    if isinstance(spec, Ia3Spec) and isinstance(found, Ia3Inventory):
        scaling = tuple(sorted(m for m, info in found.vectors.items() if info.shape[0] == 1 != info.shape[1]))
        if not spec.target_modules or (scaling and not spec.feedforward_modules):
            # Both by whole paths: PEFT insists that the one list is a part of the other.
            return replace(spec, target_modules=tuple(sorted(found.vectors)), feedforward_modules=scaling)
    return spec


def facts(spec: Spec, header: Header) -> dict[str, Any]:
    """What a card says of an adapter's files: type, rank and alpha or tokens, and counts (bytes of tensor bodies)."""
    infos = header.tensors.values()
    counts = {
        "tensors": len(infos),
        "parameters": sum(info.elements for info in infos),
        "bytes": sum(info.end - info.begin for info in infos),
    }
    if isinstance(spec, PrefixSpec):
        return {"type": "prefix", "tokens": spec.num_virtual_tokens, **counts}
    if isinstance(spec, PromptSpec):
        return {"type": "prompt", "tokens": spec.num_virtual_tokens, **counts}
    if isinstance(spec, Ia3Spec):
        return {"type": "ia3", **counts}
    if isinstance(spec, FactoredSpec):
        return {"type": spec.method.lower(), "rank": spec.rank, "alpha": spec.alpha, **counts}
    if isinstance(spec, InjectedSpec):
        return {"type": spec.method.lower(), **counts}
    return {"type": "dora" if spec.use_dora else "lora", "rank": spec.rank, "alpha": spec.alpha, **counts}


def _kinds(spec: LoraSpec, header: Header) -> dict[str, Kind]:
    """The adapted modules that the tensor names show, without those that the configuration does not target.

    PEFT would drop the tensors of the latter silently; so they count as unexpected.
    """
    kinds: dict[str, Kind] = {}
    for name in header.tensors:
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(LORA_PREFIX):
            continue
        module = name[len(LORA_PREFIX) : -len(suffix)]
        if not spec.target_modules or spec.targets(module):
            embedding = suffix in (A_SUFFIX["embedding"], B_SUFFIX["embedding"])
            kinds[module] = "embedding" if embedding else kinds.get(module, "linear")
    return kinds


def _heads(modules_to_save: tuple[str, ...], header: Header, prefix: str) -> dict[str, TensorInfo]:
    """Tensors inside a module that `modules_to_save` names, by their name inside the base."""
    heads = {}
    for name, info in header.tensors.items():
        inner = name.removeprefix(prefix)
        if inner != name and not name.endswith(_SUFFIXES) and _inside(inner, modules_to_save):
            heads[inner] = info
    if modules_to_save and not heads:
        # PEFT would start with a random head and say nothing.
        raise AdapterMismatch(
            f"modules_to_save names {', '.join(modules_to_save[:3])}, but no tensor of them is there."
        )
    return heads


def _inside(tensor: str, modules: tuple[str, ...]) -> bool:
    return any(f".{module}." in f".{tensor}" for module in modules)


def _check_names(expected: set[str], found: set[str], total: int) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if expected and not missing and not unexpected:
        return
    heads = total - len(found)
    counts = f"expected {len(expected) + heads} tensors, found {total}, missing {len(missing)}"
    message = f"The tensors do not fit the configuration: {counts}, unexpected {len(unexpected)}."
    kinds = (("Missing", missing), ("Unexpected", unexpected))
    examples = "".join(f" {kind}: {', '.join(names[:3])}." for kind, names in kinds if names)
    raise AdapterMismatch(message + examples, "Export the adapter again with PEFT's save_pretrained.")


def _is_ia3(name: str) -> bool:
    return name.startswith(LORA_PREFIX) and name.endswith(IA3_SUFFIX)


def _ia3_problem(spec: Ia3Spec, module: str, info: TensorInfo) -> str | None:
    if len(info.shape) != 2 or 1 not in info.shape:
        return f"{module}{IA3_SUFFIX} is {list(info.shape)}, not [out, 1] or [1, in]"
    scales_input = spec.scales_input(module)
    if scales_input is not None and info.shape[0 if scales_input else 1] != 1:
        return f"{module}{IA3_SUFFIX} is {list(info.shape)}, not {'[1, in]' if scales_input else '[out, 1]'}"
    return None


def _ranks(module: str, kind: Kind, spec: LoraSpec, header: Header) -> ModuleRanks:
    stem = LORA_PREFIX + module
    a, b = header.tensors[stem + A_SUFFIX[kind]].shape, header.tensors[stem + B_SUFFIX[kind]].shape
    if len(a) > 2 or len(b) > 2:
        raise Unsupported(
            f"{module} is a convolution: its A is {list(a)}.", "Linear and embedding layers are supported."
        )
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise AdapterMismatch(f"{module}: A {list(a)} and B {list(b)} do not share a rank.")
    for suffix in (MAGNITUDE_SUFFIX, BIAS_SUFFIX):
        info = header.tensors.get(stem + suffix)
        if info is not None and info.shape != (b[0],):
            raise AdapterMismatch(f"{module}{suffix} is {list(info.shape)}, not [{b[0]}].")
    return ModuleRanks(a[0], a[1], b[0], spec.use_dora, spec.lora_bias and kind == "linear", kind)


def _rank_problems(modules: dict[str, ModuleRanks], spec: LoraSpec) -> list[str]:
    return [
        f"{name} has rank {ranks.rank} in its tensors and {spec.rank_of(name)} in the configuration"
        for name, ranks in modules.items()
        if ranks.rank != spec.rank_of(name)
    ]


def _check_values(problems: list[str], header: Header, indices: Set[str] = frozenset()) -> None:
    """Shapes that disagree, and dtypes that are not floating point, or, of `indices`, not whole numbers."""
    problems = problems + [
        f"{name} has dtype {info.dtype}"
        for name, info in header.tensors.items()
        if info.dtype not in (INDEX_DTYPES if name in indices else FLOAT_DTYPES)
    ]
    if problems:
        more = f" ({len(problems)} in all)" if len(problems) > 3 else ""
        raise AdapterMismatch(f"The tensors do not fit the configuration: {'; '.join(problems[:3])}{more}.")
