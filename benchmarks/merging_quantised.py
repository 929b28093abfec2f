"""Merging into 4 bits: how far a merged NF4 model is from base + adapter, beside PEFT's own 4-bit merge.

The adapter is trained on the NF4 base by the built-in recipe `sql`; base + adapter unmerged is what all are held
against, on held-out prompts with their answers. PEFT dequantises, adds and rounds again. Ours searches scales, passes
losses on to inputs that the adapter does not look at, or that training rows do not have, and may keep a small adapter
of what is lost all the same. Figures are KL divergences in nats a token; with a residual adapter ours is no lone 4-bit
model, which is said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.adapters.fit import Fitted, Target, fit
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.bases.quantization import dense_weight, is_quantized
from adapterhub_lite.bases.quiet import quiet
from adapterhub_lite.merging.checkpoint import Checkpoint
from adapterhub_lite.merging.inputs import Inputs, inputs_of
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.plan import MergePlan, plan_merge
from adapterhub_lite.merging.quantised import QuantisedPlan, Rounding, quantised_plan, residual_adapter
from adapterhub_lite.merging.report import compare_logits
from adapterhub_lite.merging.residual import Factors, write_residual
from adapterhub_lite.recipe.load import load_recipe, recipe_dict
from adapterhub_lite.tasks.registry import make_task
from adapterhub_lite.tasks.rows import read_jsonl
from adapterhub_lite.training.train import train_adapter

from .common import BASE
from .rows import Row, Sample, within

PART = "merging into 4 bits"
GOAL = 0.5  # of the KL of PEFT's 4-bit merge
RANKS = (4, 8, 16)
_READ, _HELD = 48, 24  # training rows that say what layers read, test rows to measure on
_LENGTH = 256
_BATCH = 4
_ROWS = Path(__file__).parents[1] / "recipes" / "data" / "sql"


@dataclass
class Scene:
    """A trained adapter on its NF4 base, and rows to read and to measure on."""

    base: Base
    adapter: Adapter
    fitted: Fitted
    read: list[list[int]]
    held: list[list[int]]
    names: dict[nn.Module, str]

    @property
    def folder(self) -> Path:
        """The base's checkpoint."""
        return self.base.source.folder


def rows(name: str = BASE, steps: int = 40, ranks: Sequence[int] = RANKS) -> Iterator[Row]:
    """All figures. PEFT's merge and ours are of one adapter, read on the same rows by one forward."""
    with TemporaryDirectory() as folder, quiet():
        scene = _trained(name, steps)
        expected = _exact(scene)
        peer = _kl(expected, _logits(_peft_merged(scene, Path(folder)), scene.held))
        effect = _kl(expected, _logits(scene.base.model, scene.held))
        yield Row(PART, f"PEFT's 4-bit merge: KL ({steps} steps of sql, {name})", figure=peer, told=f"{peer:.2g} nats")
        yield Row(PART, "the adapter's own effect: KL of the bare base", figure=effect, told=f"{effect:.2g} nats")
        inputs = _inputs(scene)
        plain = plan_merge(scene.adapter, Checkpoint.open(scene.folder), **_OPTIONS)
        yield from _alone(scene, plain, inputs, expected, peer, Path(folder))
        for rank in ranks:
            yield _repaired(scene, plain, inputs, rank, expected, peer, Path(folder))


_OPTIONS: dict[str, Any] = {"quantization": "nf4", "bake": "dequantised", "dtype": "auto", "labels": None}


def _alone(
    scene: Scene,
    plain: MergePlan,
    inputs: Mapping[str, Inputs],
    expected: Sequence[torch.Tensor],
    peer: float,
    folder: Path,
) -> Iterator[Row]:
    """4-bit weights and nothing else: number by number, by what the adapter looks at, and with inputs known."""
    ways: tuple[tuple[str, MergePlan, Mapping[str, Inputs] | None], ...] = (
        ("scales searched, number by number", _blind(plain), None),
        ("scales searched, the adapter's directions kept", plain, None),
        ("scales searched, outputs on training rows kept", plain, inputs),
    )
    for index, (what, source, known) in enumerate(ways):
        plan = quantised_plan(source, "nf4", inputs=known)
        out = folder / f"alone-{index}"
        begun = time.perf_counter()
        _write(plan, scene, out)
        took = time.perf_counter() - begun
        found = _kl(expected, _logits(_loaded(out), scene.held))
        ratio, size = found / peer, _megabytes(out)
        told = f"{found:.2g} nats, {ratio:.2f} of PEFT's, {size:.0f} MB, weights off by {_off(plan)}"
        met = None if source is not plain else ratio <= GOAL
        yield Row(PART, f"ours, {what}: KL", None, "", None, ratio, told, "" if met is None else f"<= {GOAL}", met)
        yield within(PART, f"  written in ({what})", Sample(took, took, 1))


def _blind(plan: MergePlan) -> MergePlan:
    """The same without telling what adapters do to a weight."""
    shards = {f: [replace(p, source=None, edit=None) for p in shard] for f, shard in plan.shards.items()}
    return replace(plan, shards=shards)


def _repaired(
    scene: Scene,
    plain: MergePlan,
    inputs: Mapping[str, Inputs],
    rank: int,
    expected: Sequence[torch.Tensor],
    peer: float,
    folder: Path,
) -> Row:
    """With a residual adapter of this rank, as PEFT reads it."""
    from peft import PeftModel

    plan = quantised_plan(plain, "nf4", residual_rank=rank, inputs=inputs, changes=_changes(scene))
    out = folder / f"residual-{rank}"
    _write(plan, scene, out)
    beside = write_residual(residual_adapter(plan), out)
    model = _without_packing(PeftModel.from_pretrained(_loaded(out), beside))
    found = _kl(expected, _logits(model, scene.held))
    told = f"{found:.2g} nats, {found / peer:.3f} of PEFT's, {_megabytes(out):.0f} MB + {_megabytes(beside):.0f} MB"
    whole = " (its rank is the adapter's: nothing needs to be merged)" if rank >= scene.adapter.spec.rank else ""  # type: ignore[union-attr]
    return Row(PART, f"ours and a residual adapter of rank {rank}: KL{whole}", figure=found / peer, told=told)


def _trained(name: str, steps: int) -> Scene:
    """An adapter of the recipe `sql`, trained on the shortest rows: a few minutes."""
    recipe = load_recipe("sql", {"base": name, "training.max_steps": steps, "training.batch_size": _BATCH})
    base = load_base(name, "nf4", dtype="float32")
    task = make_task(recipe_dict(recipe)["task"])
    found = {}
    for part in ("train", "test"):
        rows = task.examples(read_jsonl(_ROWS / f"{part}.jsonl"), base.tokenizer, base.kind, _LENGTH)
        found[part] = sorted(rows, key=lambda e: len(e.ids)) if part == "train" else rows
    adapter = train_adapter(recipe, base, found["train"][: steps * _BATCH]).adapter
    view = base.view(adapter.spec.task_type)
    fitted = fit(adapter, Target(view.modules, base.config, None, "", dense_weight))
    read, held = (
        [e.ids for e in found[part][:: max(1, len(found[part]) // count)]][:count]
        for part, count in (("train", _READ), ("test", _HELD))
    )
    return Scene(base, adapter, fitted, read, held, {m: n for n, m in view.modules.items()})


def _exact(scene: Scene) -> list[torch.Tensor]:
    """Logits of base + adapter, unmerged: what every layer adds is added to its output."""

    def added(site: Any) -> Callable[..., torch.Tensor]:
        return lambda module, given, out: out + (given[0] @ site.down.T) @ site.up.T

    handles = [m.register_forward_hook(added(site)) for m, site in scene.fitted.sites.items()]
    try:
        return _logits(scene.base.model, scene.held)
    finally:
        for handle in handles:
            handle.remove()


def _peft_merged(scene: Scene, folder: Path) -> nn.Module:
    """PEFT's own merge of the same adapter into the same NF4 weights (`Linear4bit.merge`)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from adapterhub_lite.bases.quantization import quantization_config

    for name, data in scene.adapter.files().items():
        (folder / "peft").mkdir(exist_ok=True)
        (folder / "peft" / name).write_bytes(data)
    said = quantization_config("nf4", torch.float32, ["lm_head"])
    plain = AutoModelForCausalLM.from_pretrained(
        scene.folder, dtype=torch.float32, quantization_config=said, device_map={"": "cpu"}
    )
    merged: nn.Module = PeftModel.from_pretrained(plain, folder / "peft").merge_and_unload()
    return _without_packing(merged)


def _loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for module in model.modules():
        if is_quantized(module):
            module.compute_dtype = torch.float32  # type: ignore[assignment]  # so that rounding of activations is no part of it
    return _without_packing(model)


def _without_packing(model: nn.Module) -> nn.Module:
    """On some processors bitsandbytes computes 4-bit layers in bfloat16, which is more than rounding of weights."""
    for module in model.modules():
        if is_quantized(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model.eval()


def _inputs(scene: Scene) -> dict[str, Inputs]:
    modules = {name: module for module, name in scene.names.items() if is_quantized(module)}
    return inputs_of(modules, scene.fitted.sites, lambda: _logits(scene.base.model, scene.read))


def _changes(scene: Scene) -> dict[str, Factors]:
    return {scene.names[m]: Factors(site.down, site.up) for m, site in scene.fitted.sites.items()}


def _write(plan: MergePlan, scene: Scene, out: Path) -> None:
    with staged_merge(plan, scene.folder, out):
        pass


def _logits(model: nn.Module, held: Sequence[list[int]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row])).logits[0].clone() for row in held]


def _kl(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    return compare_logits(expected, found).mean_kl


def _off(plan: QuantisedPlan) -> str:
    """Relative errors of all weights, before the search and after."""
    found = list(plan.roundings.values())
    before, after = (math.sqrt(sum(v**2 for v in errors) / len(found)) for errors in _columns(found))
    return f"{after:.2%} ({before:.2%} as PEFT rounds)"


def _columns(found: Sequence[Rounding]) -> tuple[list[float], list[float]]:
    return [r.plain for r in found], [r.error for r in found]


def _megabytes(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    """Print all figures."""
    print("\n== merging into 4 bits")
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
