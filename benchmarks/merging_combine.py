"""How fast adapters are combined beside PEFT's `add_weighted_adapter`, and how far both are from the best there is.

Ours goes from the adapters' tensors to those of the result, without a base; PEFT's adapters are loaded in its model
before the clock runs. Both bring the weighted sum of the same adapters to the same rank, in turn in one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import Base
from adapterhub_lite.bases.quiet import quiet
from adapterhub_lite.combining.changes import Changes, changes_of
from adapterhub_lite.combining.combine import Options, combine

from .common import random_lora
from .rows import Row, Sample, faster, in_turn, timed, within

PART = "combine"
WEIGHTS = (0.7, -0.4, 1.0, 0.5)
_PEFT = {"PEFT": {}, "PEFT thin": {"svd_full_matrices": False}}


def rows(base: Base, rounds: int = 3, rank: int = 16, looked_at: int = 14) -> Iterator[Row]:
    """Speed and error of the best approximation of a sum of four adapters, and the time of the other rules.

    Args:
        looked_at: so many layers, evenly over all, are compared with the SVD of their dense sum in float64.
    """
    adapters = [random_lora(base, rank, seed) for seed in range(len(WEIGHTS))]
    with TemporaryDirectory() as folder, quiet():
        peer = _Peer(base, adapters, Path(folder), rank)
        made: dict[str, dict[str, torch.Tensor]] = {}
        works: dict[str, Callable[[int], list[float]]] = {
            "ours": lambda _: [timed(lambda: _ours(adapters, rank, made))]
        }
        for name, given in _PEFT.items():
            works[name] = lambda _, name=name, given=given: [peer.svd(name, given, made)]  # type: ignore[misc]
        samples = in_turn(works, rounds, warmups=0)
    what = f"SVD of {len(adapters)} rank-{rank} adapters to rank {rank}, {base.name}"
    for name in _PEFT:
        yield faster(PART, what, samples["ours"], name, samples[name], 20.0 if name == "PEFT" else None)
    yield from _errors(adapters, made, rank, looked_at)
    yield from _other_rules(adapters, rank)


def _ours(adapters: Sequence[Adapter], rank: int, made: dict[str, dict[str, torch.Tensor]]) -> None:
    made["ours"] = combine(_members(adapters), "svd", Options(rank=rank)).adapter.tensors


def _members(adapters: Sequence[Adapter]) -> list[tuple[Changes, float]]:
    return [(changes_of(adapter), weight) for adapter, weight in zip(adapters, WEIGHTS, strict=True)]


class _Peer:
    """A PEFT model that holds the adapters."""

    def __init__(self, base: Base, adapters: Sequence[Adapter], folder: Path, rank: int) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        self.rank, self.names = rank, [f"one{i}" for i in range(len(adapters))]
        model: Any = AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=torch.float32)
        for name, adapter in zip(self.names, adapters, strict=True):
            (folder / name).mkdir()
            for file, data in adapter.files().items():
                (folder / name / file).write_bytes(data)
        self.model: Any = peft.PeftModel.from_pretrained(model, str(folder / self.names[0]), self.names[0])
        for name in self.names[1:]:
            self.model.load_adapter(str(folder / name), name)

    def svd(self, key: str, given: Mapping[str, Any], made: dict[str, dict[str, torch.Tensor]]) -> float:
        """Seconds of one combination, which is kept by PEFT's keys on disk."""
        from peft import get_peft_model_state_dict

        def work() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model.add_weighted_adapter(
                    self.names, list(WEIGHTS), "mixed", combination_type="svd", svd_rank=self.rank, **given
                )

        seconds = timed(work)
        found = get_peft_model_state_dict(self.model, adapter_name="mixed")
        made[key] = {name: tensor.detach().clone() for name, tensor in found.items()}
        self.model.delete_adapter("mixed")
        return seconds


def _errors(
    adapters: Sequence[Adapter], made: Mapping[str, Mapping[str, torch.Tensor]], rank: int, looked_at: int
) -> Iterator[Row]:
    """By how much the error of each side is above that of the best approximation, at the worst layer looked at."""
    keys = sorted(key for key in adapters[0].tensors if key.endswith("lora_A.weight"))
    some = keys[:: max(1, len(keys) // looked_at)]
    worst = dict.fromkeys(made, 0.0)
    for key in some:
        dense = _dense(adapters, key)
        values = torch.linalg.svdvals(dense)
        best = float(values[rank:].norm())
        for side, tensors in made.items():
            found = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
            worst[side] = max(worst[side], float((found - dense).norm()) / best - 1)
    what = f"error above the best of rank {rank}, worst of {len(some)} layers, against float64"
    for side, excess in worst.items():
        goal, met = ("<= 1e-04", excess <= 1e-4) if side == "ours" else ("", None)
        yield Row(PART, f"{what}, {side}", figure=excess, told=f"{excess:.1e}", goal=goal, met=met)


def _dense(adapters: Sequence[Adapter], key: str) -> torch.Tensor:
    """The true weighted sum in one layer, dense in float64."""
    total: Any = 0.0
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        down, up = adapter.tensors[key].double(), adapter.tensors[key.replace("lora_A", "lora_B")].double()
        scaling = adapter.spec.alpha / adapter.spec.rank  # type: ignore[union-attr]
        total = total + weight * scaling * (up @ down)
    return torch.as_tensor(total)


def _other_rules(adapters: Sequence[Adapter], rank: int) -> Iterator[Row]:
    """One round of each: no peer computes the same. Rules on values get a part of the layers."""
    modules = sorted(changes_of(adapters[0]).modules)
    for method, every in (("linear", 1), ("cat", 1), ("ties", 10), ("dare_linear", 10)):
        some = [_part(adapter, modules[::every]) for adapter in adapters]
        wish = Options() if every == 1 else Options(rank=rank)
        seconds = timed(partial(combine, _members(some), method, wish))
        what = f"{method} of {len(some)} rank-{rank} adapters, {len(modules[::every])} layers"
        yield within(PART, what, Sample.of([seconds]))


def _part(adapter: Adapter, modules: Sequence[str]) -> Adapter:
    """Some layers of an adapter."""
    stems = tuple(f"base_model.model.{module}." for module in modules)
    spec = replace(adapter.spec, target_modules=tuple(modules))
    return replace(adapter, spec=spec, tensors={k: t for k, t in adapter.tensors.items() if k.startswith(stems)})
