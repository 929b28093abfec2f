"""LoRA adapters as GGUF files: added to a base's file as llama.cpp adds them, they give the merged model's file."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from adapterhub_lite.errors import AdapterMismatch, FormatError, StoreError, StoreFull, Unsupported
from adapterhub_lite.events import Event, Progress
from adapterhub_lite.merging.gguf_lora import write_gguf_lora
from adapterhub_lite.merging.gguf_model import write_gguf
from tests.merging import gguf_models as tiny
from tests.store.faulty import Crash, Failing

Changes = dict[str, tuple[torch.Tensor, torch.Tensor]]


def changes_of(model: Any, ranks: tuple[int, ...] = (4,), only: str = "") -> Changes:
    """Random pairs for every matrix of the blocks, [out, in] whatever way the module stores its weight."""
    generator = torch.Generator().manual_seed(3)
    found: Changes = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and (".layers." in name or ".h." in name) and only in name:
            rows, columns = reversed(parameter.shape) if ".h." in name else parameter.shape
            rank = ranks[len(found) % len(ranks)]
            down = torch.randn(rank, columns, generator=generator) * 0.2
            found[name.removesuffix(".weight")] = down, torch.randn(rows, rank, generator=generator) * 0.2
    return found


def deltas_of(changes: Changes) -> dict[str, torch.Tensor]:
    """The same as changes of a checkpoint's weights."""
    return {
        f"{module}.weight": (up @ down).T.contiguous() if ".h." in module else up @ down
        for module, (down, up) in changes.items()
    }


def applied(base: Path, adapter: Path) -> dict[str, np.ndarray[Any, Any]]:
    """llama.cpp's sum, alpha / rank * B A onto each weight, by the gguf library alone."""
    fields, factors, _ = tiny.read(adapter)
    _, tensors, _ = tiny.read(base)
    names = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert names == {name.removesuffix(".lora_b") for name in factors if name.endswith(".lora_b")}
    for name in names:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        delta = a @ b.T if name == "token_embd.weight" else b @ a  # an embedding's A is looked up by token
        assert delta.shape == tensors[name].shape
        tensors[name] = tensors[name] + scale * delta
    return tensors


def check(tmp_path: Path, folder: Path, changes: Changes, kind: str = "f32", tolerance: float = 1e-3) -> None:
    plan = tiny.plan_of(folder)
    write_gguf_lora(changes, plan.config, tmp_path / "adapter.gguf", kind)
    write_gguf(plan, folder, tmp_path / "base.gguf")
    write_gguf(tiny.plan_of(folder, deltas_of(changes)), folder, tmp_path / "merged.gguf")
    got, (_, expected, _) = (
        applied(tmp_path / "base.gguf", tmp_path / "adapter.gguf"),
        tiny.read(tmp_path / "merged.gguf"),
    )
    _, bare, _ = tiny.read(tmp_path / "base.gguf")
    assert set(got) == set(expected)
    changed = 0
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=tolerance * np.abs(expected[name]).max())
        changed += bool(np.abs(bare[name] - expected[name]).max() > 0.1 * np.abs(expected[name]).max())
    assert changed == len(changes)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_base_and_adapter_are_the_merged_file(tmp_path, family):
    folder = tiny.save(family, tmp_path / "base", tie_word_embeddings=True)
    check(tmp_path, folder, changes_of(tiny.model(family)))


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 2e-3), ("q8_0", 0.02)])
def test_smaller_kinds_are_near(tmp_path, kind, tolerance):
    folder = tiny.save("llama", tmp_path / "base")
    check(tmp_path, folder, changes_of(tiny.model("llama"), ranks=(32, 8)), kind, tolerance)
    _, _, types = tiny.read(tmp_path / "adapter.gguf")
    expected = {"f16": {"F16"}, "q8_0": {"Q8_0", "F16"}}[kind]
    assert set(types.values()) == expected  # B of rank 8 is no whole block


def test_ranks_that_differ_share_one_alpha(tmp_path):
    folder = tiny.save("qwen2", tmp_path / "base")
    check(tmp_path, folder, changes_of(tiny.model("qwen2"), ranks=(1, 3, 7)))
    fields, factors, _ = tiny.read(tmp_path / "adapter.gguf")
    assert fields["adapter.lora.alpha"] == 7.0
    assert {f.shape[0] for name, f in factors.items() if name.endswith("lora_a")} == {1, 3, 7}


def test_the_file_says_what_it_is(tmp_path):
    model = tiny.model("llama")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    events: list[Event] = []
    write_gguf_lora(changes_of(model), config, tmp_path / "sql-1.gguf", "f32", on_event=events.append)
    fields, factors, types = tiny.read(tmp_path / "sql-1.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "general.name": "sql-1",
    }
    assert {key: fields[key] for key in expected} == expected
    assert set(types.values()) == {"F32"}
    down, up = changes_of(model)["model.layers.1.mlp.down_proj"]
    assert np.array_equal(factors["blk.1.ffn_down.weight.lora_a"], down.numpy())
    assert np.array_equal(factors["blk.1.ffn_down.weight.lora_b"], up.numpy())
    assert isinstance(events[-1], Progress)
    assert events[-1].done == events[-1].total > 0


def test_an_embedding_is_stored_as_it_is_looked_up(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(5)
    rows, columns = torch.randn(tiny.SIZE, 4, generator=generator), torch.randn(4, 64, generator=generator)
    pair = rows.T, columns.T  # PEFT's lora_embedding_A and B
    plan = tiny.plan_of(folder)
    write_gguf_lora({"model.embed_tokens": pair}, plan.config, tmp_path / "adapter.gguf", "f32")
    _, factors, _ = tiny.read(tmp_path / "adapter.gguf")
    # What llama.cpp asks of the shapes: A has a row for each token, B one for each column of the embedding.
    assert factors["token_embd.weight.lora_a"].shape == (tiny.SIZE, 4)
    assert factors["token_embd.weight.lora_b"].shape == (64, 4)
    write_gguf(plan, folder, tmp_path / "base.gguf")
    got = applied(tmp_path / "base.gguf", tmp_path / "adapter.gguf")["token_embd.weight"]
    _, bare, _ = tiny.read(tmp_path / "base.gguf")
    np.testing.assert_allclose(got, bare["token_embd.weight"] + (rows @ columns).numpy(), atol=1e-4)


def test_an_untied_output_layer_is_changed_and_a_tied_one_refused(tmp_path):
    folder = tiny.save("llama", tmp_path / "base", tie_word_embeddings=False)
    pair = torch.randn(2, 64), torch.randn(tiny.SIZE, 2)
    plan = tiny.plan_of(folder)
    write_gguf_lora({"lm_head": pair}, plan.config, tmp_path / "adapter.gguf", "f32")
    _, factors, _ = tiny.read(tmp_path / "adapter.gguf")
    assert set(factors) == {"output.weight.lora_a", "output.weight.lora_b"}
    for module in ("lm_head", "model.embed_tokens"):
        with pytest.raises(Unsupported, match="both the embedding and the output layer"):
            write_gguf_lora({module: pair}, {**plan.config, "tie_word_embeddings": True}, tmp_path / "tied.gguf")


def test_small_factors_keep_their_digits_in_float16(tmp_path):
    folder = tiny.save("llama", tmp_path / "base")
    down, up = torch.randn(4, 64), torch.randn(96, 4) * 1e-7  # below float16's smallest normal number
    name = "model.layers.0.mlp.up_proj"
    write_gguf_lora({name: (down, up)}, tiny.plan_of(folder).config, tmp_path / "adapter.gguf", "f16")
    _, factors, _ = tiny.read(tmp_path / "adapter.gguf")
    got = factors["blk.0.ffn_up.weight.lora_b"] @ factors["blk.0.ffn_up.weight.lora_a"]
    expected = (up.double() @ down.double()).numpy()
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()


def test_what_does_not_fit_is_refused(tmp_path):
    folder = tiny.save("llama", tmp_path / "base")
    config = tiny.plan_of(folder).config
    good = torch.randn(2, 64), torch.randn(96, 2)

    def refused(error: type[Exception], match: str, changes: Changes, given: Any = config, kind: str = "f16") -> None:
        with pytest.raises(error, match=match):
            write_gguf_lora(changes, given, tmp_path / "adapter.gguf", kind)
        assert not (tmp_path / "adapter.gguf").exists()

    up_proj = "model.layers.0.mlp.up_proj"
    refused(FormatError, "changes no matrix", {})
    refused(AdapterMismatch, "no place for score", {"score": good})
    refused(AdapterMismatch, r"\(96, 63\)", {up_proj: (torch.randn(2, 63), good[1])})
    refused(AdapterMismatch, "no LoRA pair", {up_proj: (torch.randn(3, 64), good[1])})
    refused(Unsupported, "adds no LoRA", {"model.norm": good})
    refused(Unsupported, "bert", {up_proj: good}, {**config, "model_type": "bert"})
    refused(Unsupported, "q4_0", {up_proj: good}, kind="q4_0")
    refused(FormatError, "not finite", {up_proj: (good[0], good[1] * float("nan"))})
    refused(Unsupported, "F16 ends at", {up_proj: (good[0] * 1e6, good[1] * 1e6)})


def test_gpt2s_positions_take_no_lora_and_its_squares_are_not_turned(tmp_path):
    folder = tiny.save("gpt2", tmp_path / "base")
    config = tiny.plan_of(folder).config
    with pytest.raises(Unsupported, match="adds no LoRA"):
        write_gguf_lora({"transformer.wpe": (torch.randn(2, 64), torch.randn(1024, 2))}, config, tmp_path / "a.gguf")
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    write_gguf_lora({"transformer.h.0.attn.c_proj": (down, up)}, config, tmp_path / "a.gguf", "f32")
    _, factors, _ = tiny.read(tmp_path / "a.gguf")
    assert np.array_equal(factors["blk.0.attn_output.weight.lora_a"], down.numpy())


def test_a_file_is_whole_or_absent_whatever_fails(tmp_path):
    model = tiny.model("llama")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    changes = changes_of(model, only="q_proj")
    counted = Failing(0, OSError())
    write_gguf_lora(changes, config, tmp_path / "whole.gguf", fs=counted)
    whole = (tmp_path / "whole.gguf").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    for at in range(1, counted.count + 1):
        for error in (OSError(errno.ENOSPC, "no space left"), Crash()):
            with pytest.raises((StoreFull, OSError, Crash)):
                write_gguf_lora(changes, config, out / "whole.gguf", fs=Failing(at, error))
            assert at == counted.count or not (out / "whole.gguf").exists()
            assert isinstance(error, Crash) or at == counted.count or not list(out.iterdir())
            for left in out.iterdir():
                assert left.name != "whole.gguf" or left.read_bytes() == whole
                left.unlink()
    with pytest.raises(StoreError, match="exists"):
        write_gguf_lora(changes, config, tmp_path / "whole.gguf")


def test_alignment_and_order_of_the_file(tmp_path):
    model = tiny.model("llama")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    write_gguf_lora(changes_of(model, ranks=(3,)), config, tmp_path / "a.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert all(int(tensor.data_offset) % 32 == 0 for tensor in reader.tensors)
    names = [tensor.name for tensor in reader.tensors]
    assert names[1::2] == [name[:-1] + "b" for name in names[::2]]
