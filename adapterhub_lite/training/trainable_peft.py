"""Adapters of PEFT's other methods while they are trained: PEFT's own layers in a copy of the base's module tree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

from ..adapters.injected import inject_fresh, saved_tensors
from ..adapters.lora import PREFIX
from ..adapters.sites import is_linear, matches
from ..errors import FormatError, Unsupported
from ..formats.injected import METHODS, REFUSED
from ..formats.peft_config import parse_adapter_config
from ..formats.specs import Spec
from ..recipe.readers import nearest

# Forms of ours whose training through PEFT's layers is no more than that.
_OTHERS = ("IA3", "LOHA", "LOKR")
_INSTEAD = {
    "LORA": "Use adapter.type: lora.",
    "PREFIX_TUNING": "Use adapter.type: prefix.",
    "ADALORA": "It is a schedule as well as layers; train LoRA.",
}
# Keys of PEFT's configurations that a recipe says elsewhere.
_NO_OPTIONS = {
    "target_modules": "Use adapter.targets.",
    "peft_type": "Use adapter.method.",
    **dict.fromkeys(
        ("task_type", "modules_to_save", "base_model_name_or_path", "revision", "inference_mode"),
        "It follows from the recipe's base and task.",
    ),
}
_ADAPTER = "default"


class TrainablePeft:
    """One adapter that PEFT computes.

    Attributes:
        spec: what its configuration says, as PEFT saves it.
    """

    head_prefix = PREFIX
    dropout = 0.0

    def __init__(
        self,
        method: str,
        options: Mapping[str, Any],
        sites: Mapping[str, nn.Module],
        modules: Mapping[str, nn.Module],
        suffixes: Sequence[str],
        common: Mapping[str, Any],
    ) -> None:
        """A fresh adapter; PEFT draws its first values from torch's generator.

        Args:
            sites: the modules it changes, of all `modules` of the base's class (that itself is "").
            suffixes: ends of names that name these sites and no others.
            common: task_type, base_model, revision and modules_to_save of its spec.

        Raises:
            FormatError: an option that this method has not, or a value that it cannot have.
            AdapterMismatch: the options do not fit the layers.
            Unsupported: PEFT has no such layer for a quantised one.
        """
        if method == "IA3":  # PEFT compares both lists by their words
            first = [name for name in sites if any(matches(name, t) for t in options.get("feedforward_modules") or ())]
            options, suffixes = {**options, "feedforward_modules": first}, list(sites)
        said = {**options, "peft_type": method, "target_modules": sorted(suffixes), "task_type": common["task_type"]}
        parse_adapter_config(json.dumps(said))
        drawn = torch.random.get_rng_state()
        self._wrapped, self._tree = inject_fresh(method, options, list(sites), modules, f"adapter.method: {method}")
        torch.random.set_rng_state(drawn)
        live = {id(t) for m in modules.values() for t in m.parameters(recurse=False)}
        self._parameters = [p for p in self._wrapped.parameters() if p.requires_grad and id(p) not in live]
        self.spec: Spec = parse_adapter_config(json.dumps(self._saved_config(suffixes, common), default=_plain))

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return self._parameters

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors under PEFT's keys."""
        return {key: tensor.detach() for key, tensor in saved_tensors(self._wrapped).items()}

    def model(self, live: nn.Module) -> nn.Module:
        """What computes as `live`, a model over the base's modules, but with the adapter."""
        return self._tree.of(live)

    def _saved_config(self, suffixes: Sequence[str], common: Mapping[str, Any]) -> dict[str, Any]:
        said: dict[str, Any] = dict(self._wrapped.peft_config[_ADAPTER].to_dict())
        said |= {
            "target_modules": sorted(suffixes),
            "task_type": common["task_type"],
            "base_model_name_or_path": common["base_model"],
            "revision": common["revision"],
            "modules_to_save": list(common["modules_to_save"]) or None,
            "inference_mode": True,
        }
        return said


def check_method(method: str) -> None:
    """Raise Unsupported for a method that is not trained so."""
    known = (*METHODS, *_OTHERS)
    if method in known:
        return
    why = REFUSED.get(method)
    hint = _INSTEAD.get(method) or f"{nearest(method, known)} There are {', '.join(sorted(known))}.".strip()
    raise Unsupported(f"{method} is not trained through PEFT's layers{f': {why}' if why else ''}.", hint)


def option_problems(method: str, options: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(option, what is wrong with it, a hint) of options that a method has not, or values that they cannot have."""
    found = [(key, "is no option.", instead) for key, instead in _NO_OPTIONS.items() if key in options]
    known = list(METHODS[method].options) if method in METHODS else []
    said = {key: value for key, value in options.items() if key not in _NO_OPTIONS}
    try:
        parse_adapter_config(json.dumps({**said, "peft_type": method, "target_modules": ["layer"]}))
    except FormatError as error:
        for line in error.message.splitlines()[1:]:
            key, _, told = line.strip().partition(": ")
            found.append((key, f"{told}.", nearest(key, known) if told == "unknown key" else ""))
    return found


def peft_sites(
    method: str, targets: str | Sequence[str], modules: Mapping[str, nn.Module], output: nn.Module | None
) -> dict[str, nn.Module]:
    """The modules that `targets` names, of the kind that a method changes.

    Raises:
        Unsupported: a method that is not trained so, or no such module.
    """
    check_method(method)
    kind = METHODS[method].layers if method in METHODS else "linear"
    fits = {name: m for name, m in modules.items() if name and _is(kind, m) and m is not output}
    if targets == "all-linear":
        embed = next((n for n, m in fits.items() if isinstance(m, nn.Embedding)), "")
        return {embed: fits[embed]} if kind == "embedding" else fits
    wanted = [targets] if isinstance(targets, str) else list(targets)
    missing = next((t for t in wanted if not any(matches(name, t) for name in fits)), None)
    if missing is not None:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in fits}))
        raise Unsupported(f"Target {missing!r} matches no {kind} layer of this base.", f"It has: {known}.")
    return {name: m for name, m in fits.items() if any(matches(name, t) for t in wanted)}


def _is(kind: str, module: nn.Module) -> bool:
    if kind == "linear":
        return is_linear(module)
    if kind == "embedding":
        return isinstance(module, nn.Embedding)
    weight = getattr(module, "weight", None)
    return not module._modules and isinstance(weight, torch.Tensor) and weight.dim() == 1


def _plain(value: Any) -> Any:
    """What JSON has no form for in a configuration of PEFT."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} in a configuration")
