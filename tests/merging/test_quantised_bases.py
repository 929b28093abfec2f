"""What a quantised base computes with: the same layers, rounded the same way, wherever its checkpoint is read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.adapters.sites import is_linear
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.bases.quantization import dense_weight, is_quantized
from adapterhub_lite.merging.checkpoint import Checkpoint
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.plan import plan_merge
from adapterhub_lite.merging.quantised import quantised_plan
from adapterhub_lite.merging.report import Thresholds
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.combine_base import FrozenWeights
from adapterhub_lite.workflows.merge import merge
from adapterhub_lite.workflows.merge_expected import Expected
from adapterhub_lite.workflows.merge_served import Merged, plain_model
from tests import peers, tiny
from tests.merging.build import INSTRUCT, peft_folder, stored
from tests.merging.peft_merges import plan_of

FAMILIES = ("llama", "gpt2", "bert", "t5")
CHANGED = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"], "t5": ["q"]}
SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 128}}  # of the others, blocks go over the ends of rows
FORMS = [(family, kind) for family in FAMILIES for kind in ("nf4", "int8", "nf4-double")]

LOOSE = Thresholds(max_kl=1e9, min_top1=0.0, max_lost=1e9, max_metric_drop=1.0)


def truth(base: Base) -> dict[str, torch.Tensor]:
    """The weights [out, in] of all linear layers as the base computes with them, by the names of its modules."""
    found = {}
    for name, module in base.model.named_modules():
        if is_quantized(module):
            found[name] = dense_weight(module).float()
        elif is_linear(module):
            weight = module.weight.detach().float()
            found[name] = weight.T if type(module).__name__ == "Conv1D" else weight
    return found


def made(tmp_path, tiny_folder, family: str, kind: str):
    folder = tiny_folder(family, **SIZES.get(family, {}))
    peft_folder(tmp_path / "peft", folder, family, target_modules=CHANGED[family])
    return folder, load_base(str(folder), kind, device="cpu")


@pytest.mark.parametrize(("family", "kind"), FORMS)
def test_a_dequantised_bake_is_what_the_base_computes_with(tmp_path, tiny_folder, family, kind):
    folder, base = made(tmp_path, tiny_folder, family, kind)
    adapter = read_adapter(tmp_path / "peft")
    checkpoint = Checkpoint.open(folder)
    plan = plan_merge(adapter, checkpoint, quantization=kind, bake="dequantised", dtype="auto", labels=None)
    planned = {one.name: one.make() for shard in plan.shards.values() for one in shard}
    whole = Expected(checkpoint, [(adapter, 1.0)], kind)
    with staged_merge(plan, folder, tmp_path / "out") as out:
        written = Checkpoint.open(out)
        for name, weight in truth(base).items():
            stored_name = f"{name}.weight"
            if stored_name not in planned:
                continue
            turned = family == "gpt2" and name != "lm_head"
            frozen = whole.base(stored_name)
            assert torch.equal(frozen.T if turned else frozen, weight), f"expected {name}"
            if stored_name in plan.changed:
                torch.testing.assert_close(planned[stored_name], whole.dense(stored_name), rtol=1e-6, atol=1e-6)
                assert not torch.equal(planned[stored_name], frozen)
            else:
                assert torch.equal(planned[stored_name], frozen), f"planned {name}"
            assert torch.equal(written.read(stored_name), planned[stored_name]), f"written {name}"


@pytest.mark.parametrize(("family", "kind"), FORMS)
def test_frozen_weights_are_what_the_base_computes_with(tmp_path, tiny_folder, family, kind):
    folder, base = made(tmp_path, tiny_folder, family, kind)
    member = SimpleNamespace(card=SimpleNamespace(base={"quantization": kind}), mark={})
    frozen = FrozenWeights(member, folder, peers.task_type(family))  # type: ignore[arg-type]
    seen = 0
    for name, weight in truth(base).items():
        if name != "lm_head":
            assert torch.equal(frozen(name), weight), name
            seen += 1
    assert seen > 5


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "lora"), ("gpt2", "dora"), ("t5", "lora"), ("t5", "dora")])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_merge_of_a_quantised_base_gives_its_logits(tmp_path, tiny_folder, family, kind, quantize):
    folder = tiny_folder(family)
    peft_folder(tmp_path / "peft", folder, family, kind)
    base = load_base(str(folder), quantize, device="cpu")
    ref = stored(Store(tmp_path / "store"), "mine", tmp_path / "peft", base, None, tmp_path / "data")
    report = merge(ref, tmp_path / "out", store=Store(tmp_path / "store"), base=base, bake="dequantised")
    assert report.difference is not None
    assert report.difference.max_logit < 1e-4
    assert max(layer.error for layer in report.layers) < 1e-6


@pytest.mark.parametrize("verify", ["full", "weights"])
def test_layers_that_stay_as_they_are_stand_in_the_report(tmp_path, tiny_folder, verify):
    folder = tiny_folder("llama", hidden_size=64, intermediate_size=100)
    peft_folder(tmp_path / "peft", folder, "llama")
    base, store = load_base(str(folder), device="cpu"), Store(tmp_path / "store")
    ref = stored(store, "mine", tmp_path / "peft", base, None, tmp_path / "data")
    report = merge(ref, tmp_path / "out", store=store, base=base, to="nf4", verify=verify, thresholds=LOOSE)
    said = [note for note in report.notes if "they are not quantised" in note]
    assert len(said) == 1
    assert said[0] in json.loads((tmp_path / "out" / "merge_report.json").read_text())["notes"]
    assert said[0] in "\n".join(report.lines())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_a_checkpoint_of_bfloat16_is_measured_in_what_its_base_computes_in(tmp_path, to, quantize):
    """transformers loads what is quantised in the dtypes that it is stored in, whatever is asked for."""
    folder = tmp_path / "base"
    tiny.model("llama", **SIZES["llama"]).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    peft_folder(tmp_path / "peft", folder, "llama")
    base, store = load_base(str(folder), quantize, device="cpu"), Store(tmp_path / "store")
    assert base.dtype == torch.float32
    ref = stored(store, "mine", tmp_path / "peft", base, INSTRUCT, tmp_path / "data")
    report = merge(ref, tmp_path / "out", store=store, base=base, to=to, thresholds=LOOSE)
    assert [one.rows for one in report.metrics] == [6]
    model = plain_model(Merged(tmp_path / "out", to, "CAUSAL_LM"), base)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = plain.generate(torch.tensor([[5, 9, 40]]), max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > 3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_experts_that_are_no_linear_layers_are_told(tmp_path, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=tiny.VOCABULARY, num_key_value_heads=2, **sizes, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    peft_folder(tmp_path / "peft", tmp_path / "base", "llama", target_modules=["q_proj"], task="CAUSAL_LM")
    floats = plan_of(tmp_path / "base", (tmp_path / "peft", 1.0))
    (said,) = [note for note in quantised_plan(floats, kind).notes if "they are not quantised" in note]
    assert said.startswith("26 matrices (model.layers.0.mlp.experts.0.")
    assert "no linear layers of Qwen3MoeForCausalLM" in said
