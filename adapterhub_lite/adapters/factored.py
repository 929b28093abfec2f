"""Changes that other methods write as products of small matrices, brought into the form of LoRA, exactly.

    ADALORA  (alpha / r) B diag(E) A                  rank r, of which training leaves a part
    LOHA     (alpha / r) (A1 B1) * (A2 B2)            value by value; rank r^2: row-wise products of the columns
    LOKR     (alpha / r) kron(W1, W2)                 W1 and W2 whole, or products; rank: that of W1 times that of W2
With kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2), and a whole matrix being itself times an identity. Where the rank
comes out larger than the layer is wide, the change is kept whole beside an identity: it never takes more than twice the
memory of the layer. Sources: PEFT 0.21, `peft.tuners.{adalora,loha,lokr}.layer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import AdapterMismatch
from ..formats.specs import FactoredSpec
from .lora import LoraSite
from .sites import check_fit, features, is_linear, not_a_site

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[ABE]|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)", re.ASCII
)
_Parts = Mapping[str, torch.Tensor]
_Pair = tuple[torch.Tensor, torch.Tensor]  # left [m, k] and right [k, n] of a matrix [m, n]


def split_factors(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Sort PEFT's keys into factors by module, {module: {"lora_A", ...}}, and all other tensors."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
    return parts, others


def fit_factored(
    spec: FactoredSpec, parts: Mapping[str, _Parts], modules: Mapping[str, nn.Module]
) -> dict[str, LoraSite]:
    """Check the factors against the modules of a base, exactly, and multiply them out as far as needed (float32).

    Raises:
        AdapterMismatch: a module that is missing here, misses in the file, or has another shape.
    """
    check_fit(factor_mismatches(spec, parts, modules), len(parts))
    return {name: _fit_site(spec, name, part) for name, part in parts.items()}


def fitted_factors(spec: FactoredSpec, parts: Mapping[str, _Parts]) -> dict[str, LoraSite]:
    """As `fit_factored`, without a base to compare with.

    Raises:
        AdapterMismatch: factors that do not belong together.
    """
    shapes = {name: {key: tuple(t.shape) for key, t in part.items()} for name, part in parts.items()}
    problems = [p for name, found in shapes.items() if (p := factor_problem(spec, name, found))]
    if problems:
        raise AdapterMismatch(f"{problems[0]}.", "Import it again.")
    return {name: _fit_site(spec, name, part) for name, part in parts.items()}


def factor_mismatches(spec: FactoredSpec, parts: Mapping[str, _Parts], modules: Mapping[str, nn.Module]) -> list[str]:
    """What keeps the factors from fitting these modules, one line a module; only shapes are looked at."""
    problems = [p for name, part in parts.items() if (p := _site_problem(spec, name, part, modules.get(name)))]
    expected = [n for n, m in modules.items() if is_linear(m) and spec.targets(n)]
    problems += [f"{name} is targeted but has no tensors" for name in expected if name not in parts]
    if not parts:
        problems.append("the file holds no tensor of a layer")
    return problems


def factor_problem(spec: FactoredSpec, name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with the factors of one module among themselves."""
    wanted = _wanted(spec, shapes)
    if set(shapes) != wanted:
        return f"{name} has {', '.join(sorted(shapes))}, not {', '.join(sorted(wanted))}"
    if any(len(shape) != 2 for shape in shapes.values()):
        return f"{name} is a convolution"
    rank = spec.rank_of(name)
    inner = [shape[0 if part.endswith(("_b", "lora_E", "lora_A")) else 1] for part, shape in _inner(shapes)]
    if any(n != rank for n in inner) or shapes.get("lora_E", (0, 1))[1] != 1:
        found = ", ".join(f"{part} {list(shape)}" for part, shape in sorted(shapes.items()))
        return f"{name} has {found}, which do not share the rank {rank}"
    return None


def _inner(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(part, shape) for part, shape in shapes.items() if part not in ("lokr_w1", "lokr_w2")]


def _wanted(spec: FactoredSpec, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    if spec.method == "ADALORA":
        return {"lora_A", "lora_B", "lora_E"}
    if spec.method == "LOHA":
        return {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    wholes = {whole for whole in ("lokr_w1", "lokr_w2") if whole in shapes}
    halves = {whole + end for whole in ("lokr_w1", "lokr_w2") if whole not in shapes for end in ("_a", "_b")}
    return wholes | halves


def _site_problem(spec: FactoredSpec, name: str, part: _Parts, module: nn.Module | None) -> str | None:
    wrong = not_a_site(name, module)
    if module is None or wrong:
        return wrong
    if spec.target_modules and not spec.targets(name):
        return f"{name} is not targeted"
    shapes = {key: tuple(tensor.shape) for key, tensor in part.items()}
    problem = factor_problem(spec, name, shapes)
    if problem is not None:
        return problem
    n_in, n_out = features(module)
    found = _shape(spec, shapes)
    return None if found == (n_out, n_in) else f"{name} changes {list(found)}, this layer is {[n_out, n_in]}"


def _shape(spec: FactoredSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """[out, in] of the change that factors of these shapes make."""
    if spec.method == "ADALORA":
        return shapes["lora_B"][0], shapes["lora_A"][1]
    stem = "hada_w" if spec.method == "LOHA" else "lokr_w"
    one, two = (shapes.get(f"{stem}{i}") or (shapes[f"{stem}{i}_a"][0], shapes[f"{stem}{i}_b"][1]) for i in (1, 2))
    if spec.method == "LOKR":
        return one[0] * two[0], one[1] * two[1]
    return (one[0], one[1]) if one == two else (0, 0)


def _fit_site(spec: FactoredSpec, name: str, part: _Parts) -> LoraSite:
    parts = {key: tensor.float() for key, tensor in part.items()}
    if spec.method == "ADALORA":
        # PEFT divides by r + 1e-5, where r is the rank before anything was masked.
        up, down = parts["lora_B"] * (spec.alpha / (spec.rank + 1e-5)), parts["lora_E"] * parts["lora_A"]
    else:
        pairs = [_pair(parts, f"{'hada' if spec.method == 'LOHA' else 'lokr'}_w{i}") for i in (1, 2)]
        up, down = _hadamard(*pairs) if spec.method == "LOHA" else _kronecker(*pairs)
        up = up * (spec.alpha_of(name) / spec.rank_of(name))
    n_out, rank = up.shape
    if rank <= min(n_out, down.shape[1]):
        return LoraSite(down.contiguous(), up.contiguous())
    whole = up @ down
    eye = torch.eye(min(whole.shape))
    return LoraSite(eye, whole) if whole.shape[1] <= n_out else LoraSite(whole, eye)


def _pair(parts: _Parts, stem: str) -> _Pair:
    """A matrix as a product of two; a whole one times an identity, on its shorter side."""
    if stem not in parts:
        return parts[f"{stem}_a"], parts[f"{stem}_b"]
    return _whole(parts[stem])


def _hadamard(one: _Pair, two: _Pair) -> _Pair:
    if one[0].shape[1] * two[0].shape[1] >= min(one[0].shape[0], one[1].shape[1]):
        return _whole((one[0] @ one[1]) * (two[0] @ two[1]))
    left = (one[0][:, :, None] * two[0][:, None, :]).flatten(1)
    return left, (one[1][:, None, :] * two[1][None, :, :]).flatten(0, 1)


def _kronecker(one: _Pair, two: _Pair) -> _Pair:
    n_out, n_in = one[0].shape[0] * two[0].shape[0], one[1].shape[1] * two[1].shape[1]
    if one[0].shape[1] * two[0].shape[1] >= min(n_out, n_in):
        return _whole(torch.kron((one[0] @ one[1]).contiguous(), (two[0] @ two[1]).contiguous()))
    return torch.kron(one[0].contiguous(), two[0].contiguous()), torch.kron(one[1].contiguous(), two[1].contiguous())


def _whole(change: torch.Tensor) -> _Pair:
    """A change itself beside an identity: its factors, of rank r^2, would be larger than it."""
    eye = torch.eye(min(change.shape))
    return (eye, change) if change.shape[0] <= change.shape[1] else (change, eye)
