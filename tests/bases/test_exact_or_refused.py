"""Checkpoints and adapters that say one thing and hold another are refused before anything is served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import AdapterMismatch, BaseUnavailable, FormatError, NoEffect, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.runtime.admit import fit_to_base
from adapterhub_lite.workflows.own_base import load_own_base
from tests import tiny
from tests.runtime import build


@pytest.fixture
def folder(tmp_path, tiny_folder):
    return shutil.copytree(tiny_folder("llama"), tmp_path / "llama")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"rope_parameters": {"auto_map": {"x": "y"}}},
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"_experts_implementation_internal": "evil/kernel"},
        {"use_kernels": True},
    ],
)
def test_a_configuration_that_asks_for_code_is_refused(folder, values):
    change(folder, **values)
    with pytest.raises(BaseUnavailable, match="code of its own"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("values", [{"hidden_size": 64}, {"hidden_size": "many"}, {"num_attention_heads": 0}])
def test_a_configuration_that_does_not_fit_the_weights_is_one_clear_error(folder, values):
    change(folder, **values)
    with pytest.raises(BaseUnavailable):
        load_base(str(folder), device="cpu")


def test_a_configuration_that_is_not_json_is_one_clear_error(folder):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises((BaseUnavailable, FormatError)):
        load_base(str(folder), device="cpu")


def test_a_folder_with_two_sets_of_weights_is_refused(folder, tmp_path):
    tiny.model("llama", seed=9).save_pretrained(tmp_path / "other", max_shard_size="40KB")
    for path in (tmp_path / "other").glob("model*"):
        shutil.copy(path, folder)
    with pytest.raises(BaseUnavailable, match="both one weights file and an index"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_live_digest_covers_what_a_quantised_base_computes_with(tiny_folder, quantize):
    base = load_base(str(tiny_folder("llama", hidden_size=64, intermediate_size=128)), quantize, device="cpu")
    before = base.live_digest()
    copy = next(m._ahl_copy for m in base.model.modules() if getattr(m, "_ahl_copy", None) is not None)
    copy[0, 0] += 1
    assert base.live_digest() != before


@pytest.mark.parametrize(
    "wrong",
    [{"num_layers": 1, "token_dim": 32}, {"num_layers": 4, "token_dim": 8}, {"num_transformer_submodules": 2}],
)
def test_a_prefix_whose_configuration_contradicts_the_base_is_refused(tiny_base, wrong):
    base = tiny_base("llama")
    adapter = build.prefix(base, 1)
    fit_to_base(adapter, base)
    with pytest.raises(AdapterMismatch, match="configuration says"):
        fit_to_base(Adapter(replace(adapter.spec, **wrong), adapter.tensors, name="odd"), base)


def zero_product(tensors):
    """A reads the first half of the inputs only through ranks that B does not write."""
    for name, tensor in tensors.items():
        half = tensor.shape[0] // 2 if "lora_A" in name else tensor.shape[1] // 2
        (tensor[:half] if "lora_A" in name else tensor[:, half:]).zero_()


def tiny_b(tensors):
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.fill_(1e-44)


@pytest.mark.parametrize("spoil", [zero_product, tiny_b])
def test_an_adapter_that_cannot_move_a_logit_is_refused(tiny_base, spoil):
    base = tiny_base("llama")
    adapter = build.lora(base, 1)
    spoil(adapter.tensors)
    with pytest.raises(NoEffect, match="does nothing"):
        fit_to_base(adapter, base)


def test_an_imported_adapter_does_not_choose_what_is_loaded(folder):
    card = Card(base={"name": str(folder), "fingerprint": {}}, origin={"kind": "imported"})
    with pytest.raises(Unsupported, match="not loaded unasked"):
        load_own_base(card)
    assert torch.equal(*(load_own_base(card, name=str(folder)).model.lm_head.weight for _ in range(2)))


@pytest.mark.parametrize(
    "fields",
    [
        {"base": {"fingerprint": "abc"}},
        {"base": {"fingerprint": {"identity": 5}}},
        {"metrics": {"test": {"accuracy": 10**400}}},
        {"effect": {"max_logit_change": "a lot"}},
        {"origin": {"losses": 5}},
        {"data": {"test": "rows"}},
    ],
)
def test_a_card_with_a_field_of_the_wrong_kind_is_refused(fields):
    good = json.loads(Card().to_bytes())
    Card.from_bytes(json.dumps(good))
    with pytest.raises(FormatError, match=f"{next(iter(fields))}|too large a number"):
        Card.from_bytes(json.dumps({**good, **fields}))


def test_another_end_token_is_another_tokenizer(folder):
    before = load_base(str(folder), device="cpu").fingerprint
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<unk>"}))
    after = load_base(str(folder), device="cpu").fingerprint
    assert before.tokenizer != after.tokenizer
    assert before.weights == after.weights
