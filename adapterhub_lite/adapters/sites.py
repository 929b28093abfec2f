"""Sites: the modules of a base that an adapter can change, by the names PEFT gives them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from ..errors import AdapterMismatch, Unsupported


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps the last dimension linearly: nn.Linear, its quantised forms, transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear site."""
    if is_conv1d(module):
        weight = module.weight
        return int(weight.shape[0]), int(weight.shape[1])  # type: ignore[index,union-attr]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def linear_sites(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All linear modules by name."""
    return {name: module for name, module in modules.items() if is_linear(module)}


def select_sites(
    modules: Mapping[str, nn.Module], targets: str | Sequence[str], output: nn.Module | None
) -> dict[str, nn.Module]:
    """The sites that `targets` names: "all-linear" (every linear layer but the output layer) or module-name suffixes.

    Raises:
        Unsupported: a suffix matches no linear module; the message lists those there are.
    """
    sites = linear_sites(modules)
    if targets == "all-linear":
        return {name: module for name, module in sites.items() if module is not output}
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen = {name: module for name, module in sites.items() if any(matches(name, t) for t in wanted)}
    unmatched = [t for t in wanted if not any(matches(name, t) for name in sites)]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in sites})
        raise Unsupported(
            f"Target {unmatched[0]!r} matches no linear layer of this base.",
            f"It has: {', '.join(known)}; or all-linear.",
        )
    return chosen


def matches(name: str, target: str) -> bool:
    """PEFT's rule for a list of targets: the whole module name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def matches_any(name: str, targets: Collection[str]) -> bool:
    """Whether one of many targets matches; `targets` is a set, and each end of the name is looked up in it."""
    while name not in targets:
        name = name.partition(".")[2]
        if not name:
            return False
    return True


def not_a_site(name: str, module: nn.Module | None) -> str | None:
    """Why a module cannot carry the tensors that a file has for `name`; None where it can."""
    if module is None:
        return f"{name} does not exist here"
    return None if is_linear(module) else f"{name} is {type(module).__name__}, not a linear layer"


def check_fit(problems: Sequence[str], count: int) -> None:
    """Raise AdapterMismatch if some of the `count` modules in a file do not fit a base."""
    if problems:
        raise AdapterMismatch(
            f"{len(problems)} of {count} modules do not fit this base: {'; '.join(problems[:3])}.",
            "It was made for another model.",
        )
