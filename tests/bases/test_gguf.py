"""A tiny GGUF made here becomes a checkpoint that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterhub_lite.bases.gguf import convert
from adapterhub_lite.events import Event, Progress

WIDTH, HEADS, INNER = 32, 2, 32
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A Llama of one layer over bytes; gives its tensors by GGUF name."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĠĠ"]
    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, WIDTH),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, INNER),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, WIDTH // HEADS),
        (writer.add_vocab_size, len(words)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, words),
        (writer.add_token_types, [3] * 3 + [1] * (len(words) - 3)),
        (writer.add_token_merges, ["Ġ Ġ"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_pad_token_id, 2),
        (writer.add_chat_template, TEMPLATE),
    ):
        add(value)  # type: ignore[operator]
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(words), WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.0.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}.weight": (INNER, WIDTH) for name in ("gate", "up", "down")}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray[Any, Any]], list[Event], bool]:
    source, folder = tmp_path_factory.mktemp("gguf"), tmp_path_factory.mktemp("made")
    tensors = write_gguf(source / "tiny.gguf")
    events: list[Event] = []
    before = torch.random.get_rng_state()
    convert(source / "tiny.gguf", folder, title="convert tiny", on_event=events.append)
    return folder, tensors, events, torch.equal(before, torch.random.get_rng_state())


def test_weights_are_dense_bfloat16(made: Any) -> None:
    folder, tensors, _, _ = made
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = torch.from_numpy(tensors["token_embd.weight"]).to(torch.bfloat16)
    assert torch.equal(model.get_input_embeddings().weight, expected)


def test_tokenizer_has_its_template_and_cuts_digits_first(made: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 64
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]


def test_nothing_of_this_moment_is_kept(made: Any) -> None:
    folder, _, _, same_random_state = made
    assert same_random_state
    text = "".join((folder / name).read_text() for name in ("config.json", "tokenizer_config.json"))
    assert not any(trace in text for trace in ("transformers_version", "_name_or_path", "is_local", "gguf"))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_progress_counts_tensors(made: Any) -> None:
    _, tensors, events, _ = made
    assert events[-1] == Progress("convert tiny", len(tensors), len(tensors), "tensors")
