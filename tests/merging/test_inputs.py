"""What layers read, and rounding that goes by it: against hooks in PEFT, and against rounding number by number."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from adapterhub_lite.adapters.lora import LoraSite
from adapterhub_lite.kernels.quantise import values_of
from adapterhub_lite.merging import inputs as reading
from adapterhub_lite.merging.checkpoint import Checkpoint
from adapterhub_lite.merging.inputs import Inputs, inputs_of
from adapterhub_lite.merging.nf4 import Nf4
from adapterhub_lite.merging.quantised import change_of, quantised_plan
from adapterhub_lite.merging.residual import Factors, directions_of
from tests import peers
from tests.merging.test_quantised import KINDS, coupled, merge_plan, wide_folder  # noqa: F401


@pytest.mark.parametrize("kind", KINDS)
def test_what_adapters_do_to_a_weight_is_known_from_the_plan(tmp_path, wide_folder, kind):  # noqa: F811
    for family in ("llama", "gpt2"):
        base = wide_folder(family)
        plan = merge_plan(tmp_path / family, base, family, "CAUSAL_LM")
        bare = Checkpoint.open(base)
        for layer in quantised_plan(plan, kind).layers.values():
            found = change_of(layer.source, layer.turned)
            assert found is not None
            delta = layer.source.make() - bare.read(layer.source.name)
            torch.testing.assert_close(found.dense(), delta.T if layer.turned else delta, rtol=1e-4, atol=1e-5)
    assert change_of(plan.shards["model.safetensors"][0], False) is None


def test_dora_looks_at_what_its_matrices_read(tmp_path, wide_folder):  # noqa: F811
    plan = merge_plan(tmp_path, wide_folder("llama"), "llama", "CAUSAL_LM", kind="dora")
    found = [change_of(layer.source, layer.turned) for layer in quantised_plan(plan, "nf4").layers.values()]
    assert all(one is not None and one.down.shape[0] == 4 for one in found)


def test_where_nothing_is_known_the_adapters_effect_is_what_is_kept():
    """A change far below a step of the levels is lost by rounding number by number."""
    form, generator = Nf4(), torch.Generator().manual_seed(1)
    base = form.dense(form.quantise(torch.randn((96, 192), generator=generator), torch.float32)[0])
    change = Factors(torch.randn((4, 192), generator=generator), 0.003 * torch.randn((96, 4), generator=generator))
    merged = base + change.dense()
    x = torch.randn((200, 4), generator=generator) @ change.down + 0.3 * torch.randn((200, 192), generator=generator)
    effect = x @ change.dense().T
    lost = []
    for known in (None, directions_of(change)):
        dense = form.dense(form.quantise(merged, torch.float32, known)[0])
        lost.append(float((x @ (dense - merged).T).norm() / effect.norm()))
    assert lost[0] > 0.8
    assert lost[1] < 0.5


def test_directions_are_the_changes_own(tmp_path):
    generator = torch.Generator().manual_seed(0)
    change = Factors(torch.randn((3, 40), generator=generator), torch.randn((20, 3), generator=generator))
    found = directions_of(change)
    _, values, right = torch.linalg.svd(change.dense())
    scaled = right[:3] * (values[:3] / values[0])[:, None]
    expected = torch.eye(40) + 100 * scaled.T @ scaled
    torch.testing.assert_close(found.moment(0, 40), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.moment(8, 24), expected[8:24, 8:24], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.scales(), expected.diagonal().sqrt(), rtol=1e-3, atol=1e-3)
    none = directions_of(Factors(torch.zeros((2, 40)), torch.zeros((20, 2))))
    torch.testing.assert_close(none.moment(0, 40), torch.eye(40))


@pytest.mark.parametrize("double_quant", [False, True])
def test_rounding_that_knows_the_inputs_keeps_the_outputs(double_quant):
    weight = torch.randn((96, 192), generator=torch.Generator().manual_seed(1))
    x, fresh = coupled(192), coupled(192, tokens=600)[300:]
    inputs = Inputs(192)
    inputs.add(x)
    form = Nf4(double_quant=double_quant)
    errors = []
    for known in (None, inputs):
        dense = form.dense(form.quantise(weight, torch.float32, known)[0])
        errors.append(float((fresh @ (weight - dense).T).square().sum()))
    assert errors[1] < 0.35 * errors[0]


def test_wide_layers_are_compensated_panel_by_panel(monkeypatch):
    from adapterhub_lite.merging import nf4

    weight = torch.randn((32, 256), generator=torch.Generator().manual_seed(1))
    x = coupled(256)
    monkeypatch.setattr(reading, "PANEL", 128)
    monkeypatch.setattr(nf4, "PANEL", 128)
    inputs = Inputs(256)
    for row in x.split(50):
        inputs.add(row)
    assert inputs._sum is None
    assert inputs.tokens == 150  # samples end when there are as many as a panel is wide
    moment = x[:150].bfloat16().float()
    torch.testing.assert_close(inputs.moment(64, 192), moment[:, 64:192].T @ moment[:, 64:192] / 150)
    scales, codes = nf4.compensated(weight, inputs)
    dense = values_of(codes, scales).view(32, 256)
    plain = Nf4().dense(Nf4().quantise(weight, torch.float32)[0])
    ours, theirs = (float((x @ (weight - d).T).square().sum()) for d in (dense, plain))
    assert ours < 0.6 * theirs


def test_int8_weighs_errors_by_the_inputs():
    from adapterhub_lite.merging.int8 import Int8

    weight = torch.randn((8, 64), generator=torch.Generator().manual_seed(0))
    weight[:, 5] = 4.05  # large, and hardly read
    x = torch.ones((10, 64))
    x[:, 5] = 1e-4
    inputs = Inputs(64)
    inputs.add(x)
    errors = []
    for known in (None, inputs):
        dense = Int8().dense(Int8().quantise(weight, torch.float32, known)[0])
        errors.append(float(((weight - dense) * x[0]).square().sum()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora", "bias"])
def test_inputs_are_those_of_base_and_adapter(tiny_folder, family, kind):
    """Against hooks in PEFT's own model."""
    folder = tiny_folder(family)
    wrapped = peers.wrap(peers.plain(folder, "CAUSAL_LM"), peers.config(family, kind, "CAUSAL_LM"))
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            key = name.removeprefix("base_model.model.")
            module.register_forward_pre_hook(lambda m, given, key=key: seen.setdefault(key, []).append(given[0]))
    peers.logits(wrapped)
    model = peers.plain(folder, "CAUSAL_LM")
    modules = {name: model.get_submodule(name) for name in seen}
    found = inputs_of(modules, _sites(wrapped, model, modules), lambda: peers.logits(model))
    assert set(found) == set(seen)
    for name, given in seen.items():
        x = torch.cat([g.reshape(-1, g.shape[-1]) for g in given])
        torch.testing.assert_close(found[name].moment(0, x.shape[1]), x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[name].scales(), x.square().mean(0).sqrt(), rtol=1e-3, atol=1e-5)
    if family == "llama":
        assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.v_proj"]
        assert found["model.layers.0.self_attn.q_proj"] is not found["model.layers.0.self_attn.o_proj"]
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def _sites(wrapped: Any, model: nn.Module, modules: dict[str, nn.Module]) -> dict[nn.Module, LoraSite]:
    from peft import get_peft_model_state_dict

    from adapterhub_lite.adapters.adapter import Adapter
    from adapterhub_lite.adapters.fit import Target, fit
    from adapterhub_lite.bases.quantization import dense_weight
    from adapterhub_lite.formats.peft_config import parse_adapter_config

    config = wrapped.peft_config["default"].to_dict()
    said = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    spec = parse_adapter_config(json.dumps(said, default=lambda v: getattr(v, "value", str(v))).encode())
    adapter = Adapter(spec, get_peft_model_state_dict(wrapped), name="mine")
    every = dict(model.named_modules())
    return fit(adapter, Target(every, model.config, None, "", dense_weight)).sites


def test_a_plan_keeps_what_its_adapter_does_without_being_told_more(tmp_path, wide_folder):  # noqa: F811
    plan = merge_plan(tmp_path, wide_folder("llama"), "llama", "CAUSAL_LM")
    blind = {f: [replace(p, source=None, edit=None) for p in shard] for f, shard in plan.shards.items()}
    lost = []
    for source in (plan, replace(plan, shards=blind)):
        layers = quantised_plan(source, "nf4").layers
        found = []
        for layer in layers.values():
            parts = {p.name.removeprefix(layer.source.name.removesuffix("weight")): p.make() for p in layer.planned()}
            change = change_of(next(p for p in plan.shards["model.safetensors"] if p.name == layer.source.name), False)
            assert change is not None
            gap = layer.source.make() - layer.form.dense(parts)
            found.append(float((gap @ change.down.T).norm() / (change.dense() @ change.down.T).norm()))
        lost.append(sum(found) / len(found))
    assert lost[0] < 0.5 * lost[1]
