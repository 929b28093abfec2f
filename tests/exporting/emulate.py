"""Readers written after their own sources, in numbers only: the change [out, in] that each would add to each module of
a base when it is given a folder, or why it refuses it. What a reader ignores without a word is ignored here too.

Each says in its docstring where it was read. The base is given as {module name: (in, out)}.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Base = Mapping[str, tuple[int, int]]
Deltas = dict[str, torch.Tensor]


class Refused(Exception):
    """The reader's own error."""


def files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return config, {k: t.double() for k, t in load_file(folder / "adapter_model.safetensors").items()}


def vllm(folder: Path, base: Base, max_lora_rank: int = 16) -> Deltas:
    """vllm/lora/peft_helper.py, lora_model.py, utils.py (v0.11 to v0.16)."""
    config, tensors = files(folder)
    known = ("r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora")
    helper = {key: config[key] for key in known if key in config}
    if {"r", "lora_alpha", "target_modules"} - set(helper):
        raise Refused("Missing required configuration fields")
    if helper.get("modules_to_save"):
        raise Refused("vLLM only supports modules_to_save being None.")
    if helper.get("use_dora"):
        raise Refused("vLLM does not yet support DoRA.")
    if helper["r"] > max_lora_rank:
        raise Refused(f"LoRA rank {helper['r']} is greater than max_lora_rank {max_lora_rank}.")
    if helper.get("bias", "none") != "none":
        raise Refused("Adapter bias is not supported.")
    scale = helper["lora_alpha"] / (math.sqrt(helper["r"]) if helper.get("use_rslora") else helper["r"])
    expected = {name.rpartition(".")[2] for name in base}
    loras: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, half = ".".join(parts[:-2]), parts[-2][-1]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            module, half = ".".join(parts[:-1]), parts[-1][-1]
        else:
            raise Refused(f"{key} is unsupported LoRA weight")
        if module.rpartition(".")[2] not in expected:
            raise Refused(f"expected target modules in {sorted(expected)}")
        loras.setdefault(module, {})[half] = tensor
    if any(pair["A"].shape[0] > max_lora_rank for pair in loras.values()):
        raise Refused("the buffers have no room")
    return {name: scale * loras[name]["B"] @ loras[name]["A"] for name in base if name in loras}


def sglang(folder: Path, base: Base) -> Deltas:
    """sglang/srt/lora/lora.py (LoRAAdapter), mem_pool.py (one rank for all buffers of an adapter)."""
    config, tensors = files(folder)
    if config["peft_type"].lower() != "lora" or not isinstance(config["target_modules"], list):
        raise Refused("peft_type or target_modules")
    scale, rank = config["lora_alpha"] / config["r"], config["r"]
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number = re.search(r"layers\.(\d+)\.", key)
        if number is not None:
            layers.setdefault(int(number[1]), {})[key] = tensor
    names = {(re.search(r"layers\.(\d+)\.", n)[1], n.rpartition(".")[2]): n for n in base if ".layers." in f".{n}"}  # type: ignore[index]
    found: Deltas = {}
    for number, weights in layers.items():
        stacked = _stacked(weights)
        for leaf in sorted({key.split(".lora_")[0].rpartition(".")[2] for key in stacked}):
            down, up = (next(t for k, t in stacked.items() if f".{leaf}.lora_{half}." in k) for half in "AB")
            slices = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(
                leaf, (leaf,)
            )
            if down.shape[0] != rank * len(slices) or up.shape[1] != rank:
                raise Refused(f"{leaf}: the buffer is for rank {rank}")
            row = 0
            for i, part in enumerate(slices):
                module = names.get((str(number), part))
                if module is None:
                    raise Refused(f"no layer {part}")
                rows = base[module][1]
                found[module] = scale * up[row : row + rows] @ down[i * rank : (i + 1) * rank]
                row += rows
    return found


def _stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """normalize_qkv_proj and normalize_gate_up_proj."""
    weights, names = dict(weights), list(weights)
    present = {leaf for leaf in ("q_proj", "k_proj", "v_proj") if any(leaf in name for name in names)}
    for name in names:
        if "q_proj" in name and present:
            k, v = name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj")
            if v not in weights:
                raise Refused(f"KeyError: {v}")
            middle = weights[k] if "k_proj" in present else torch.zeros_like(weights[v])
            weights[name.replace("q_proj", "qkv_proj")] = torch.cat([weights.pop(name), middle, weights.pop(v)])
            weights.pop(k, None)
        if "gate_proj" in name:
            up = name.replace("gate_proj", "up_proj")
            second = weights.pop(up, None)
            first = weights.pop(name)
            weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                [first, torch.zeros_like(first) if second is None else second]
            )
    left = [n for n in weights if any(f".{leaf}." in n for leaf in ("q_proj", "k_proj", "v_proj", "up_proj"))]
    if left:
        raise Refused(f"no buffer called as {left[0]}")
    return weights


def lorax(folder: Path, base: Base, world_size: int = 1) -> Deltas:
    """lorax_server/adapters/lora.py (LoraConfig, LoraWeights.load), utils/sgmv.py (pad_rank)."""
    config, tensors = files(folder)
    rank, types = config["r"], {}
    for name in base:
        types.setdefault(name.rpartition(".")[2], []).append(name)
    found: Deltas = {}
    for names in types.values():  # Model.load_adapter goes through the types of layers
        halves = [[tensors.get(f"{PREFIX}{n}.lora_{half}.weight") for half in "AB"] for n in names]
        if any(a is None or b is None for a, b in halves):
            continue  # "There is no LoRA weight for this layer type in the adapter"
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        if len({a.shape[0] for a, _ in halves}) > 1:  # type: ignore[union-attr]
            raise Refused("stack expects each tensor to be equal size")
        for name, (a, b) in zip(names, halves, strict=True):
            found[name] = b @ a * scale  # type: ignore[operator]
        own, least = int(halves[0][0].shape[0]), 8 * world_size  # type: ignore[union-attr]
        rank = least if own <= least else (own + 15) // 16 * 16  # config.r = padded_rank
    return found


def llama_cpp_converter(folder: Path) -> Deltas:
    """convert_lora_to_gguf.py of llama.cpp on a PEFT folder, then build_lora_mm: alpha / rank of B."""
    config, tensors = files(folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        half = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if half is None:
            raise Refused(f"Unexpected name '{key}': Not a lora_A or lora_B tensor")
        pairs.setdefault(half[1], {})[half[2]] = tensor
    return {n: config["lora_alpha"] / p["B"].shape[1] * p["B"] @ p["A"] for n, p in pairs.items()}


LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2 = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}


def llama_cpp(path: Path, config: Mapping[str, Any]) -> Deltas:
    """src/llama-adapter.cpp on a GGUF file, with names and rows turned back to those of transformers.

    Args:
        config: of the base: heads and key-value heads, by which rows of q and k lie in pairs (architecture llama only).
    """
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.type"] != "adapter" or fields["adapter.type"] != "lora":
        raise Refused("general.type or adapter.type")
    arch = fields["general.architecture"]
    tensors = {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}
    found: Deltas = {}
    for name in [n.removesuffix(".lora_a") for n in tensors if n.endswith(".lora_a")]:
        a, b = (torch.from_numpy(tensors[f"{name}.lora_{half}"]) for half in "ab")
        delta = fields["adapter.lora.alpha"] / b.shape[1] * b @ a
        _, layer, leaf, _ = name.split(".")
        module = f"transformer.h.{layer}.{GPT2[leaf]}" if arch == "gpt2" else f"model.layers.{layer}.{LLAMA[leaf]}"
        if arch == "llama" and leaf in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"]
            shape = (heads, delta.shape[0] // heads // 2, 2, delta.shape[1])
            delta = delta.reshape(shape).swapaxes(1, 2).reshape(delta.shape)  # the converter's permute, undone
        found[module] = delta
    return found
