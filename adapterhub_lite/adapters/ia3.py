"""IA3 fitted to the linear layers of a base (arXiv 2205.05638): a learned factor on each output, or on each input.

Fitted form of one site, with W [out, in] and b frozen and l the learned vector:
    output:  y = l * (W x + b)   `gain` = l - 1 [out], and `bias` = (l - 1) * b
    input:   y = W (l * x) + b   `scale` = l [in]
PEFT keeps l as [out, 1] and [1, in]; layers whose weight is stored [in, out] (Conv1D) are scaled alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..formats.specs import Ia3Spec
from .lora import LoraSite
from .sites import check_fit, features, is_linear, not_a_site

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.ia3_l")


def split_ia3(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sort PEFT's keys into the vectors by module, and all other tensors."""
    vectors: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            vectors[match["module"]] = tensor
    return vectors, others


def fit_ia3(
    spec: Ia3Spec, vectors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, LoraSite]:
    """Check the vectors against the modules of a base, exactly, and bring them into the form of sites (float32).

    Raises:
        AdapterMismatch: a module that is missing here, misses in the file, or has another shape.
    """
    check_fit(ia3_mismatches(spec, vectors, modules), len(vectors))
    return {name: _fit_site(spec, name, vector, modules[name]) for name, vector in vectors.items()}


def ia3_mismatches(spec: Ia3Spec, vectors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]) -> list[str]:
    """What keeps the vectors from fitting these modules, one line a module; only shapes are looked at."""
    problems = [p for name, v in vectors.items() if (p := _site_problem(spec, name, v, modules.get(name)))]
    expected = [n for n, m in modules.items() if is_linear(m) and spec.targets(n)]
    problems += [f"{name} is targeted but has no tensors" for name in expected if name not in vectors]
    if not vectors:
        problems.append("the file holds no IA3 tensor")
    return problems


def _site_problem(spec: Ia3Spec, name: str, vector: torch.Tensor, module: nn.Module | None) -> str | None:
    wrong = not_a_site(name, module)
    if module is None or wrong:
        return wrong
    if spec.target_modules and not spec.targets(name):
        return f"{name} is not targeted"
    allowed = _shapes(spec, name, module)
    if tuple(vector.shape) not in allowed:
        return f"{name} has ia3_l {list(vector.shape)}, this layer needs {' or '.join(str(list(s)) for s in allowed)}"
    return None


def _shapes(spec: Ia3Spec, name: str, module: nn.Module) -> list[tuple[int, int]]:
    """What a vector may look like: for the output and for the input, where the configuration does not say which."""
    n_in, n_out = features(module)
    scales_input = spec.scales_input(name)
    return [(n_out, 1)] * (scales_input is not True) + [(1, n_in)] * (scales_input is not False)


def _fit_site(spec: Ia3Spec, name: str, vector: torch.Tensor, module: nn.Module) -> LoraSite:
    n_in, n_out = features(module)
    factors = vector.float().flatten()
    nothing = factors.new_zeros((0, n_in)), factors.new_zeros((n_out, 0))
    if tuple(vector.shape) == (1, n_in) and spec.scales_input(name) is not False:
        return LoraSite(*nothing, scale=factors)
    own = getattr(module, "bias", None)
    gain = factors - 1
    if own is not None and own.is_meta:  # a base without its weights: that there is a bias is all that is known
        return LoraSite(*nothing, gain, gain.to("meta"))
    return LoraSite(*nothing, gain, None if own is None else gain * own.detach().float().cpu())
