"""Adapters of PEFT methods that have no form of ours, of random values and made by PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import peft.tuners.boft.layer
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests import peers

# Else PEFT looks for a compiler, to build what no adapter here needs.
peft.tuners.boft.layer._FBD_CUDA = False

# Small enough for the tiny models. What comes after a dash is another form of one method.
OPTIONS: dict[str, dict[str, Any]] = {
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "BOFT-blocks": {"boft_block_size": 0, "boft_block_num": 4, "boft_dropout": 0.1},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DEFT-qr": {"r": 4, "decomposition_method": "qr", "para": True, "alpha": 3},
    "DELORA": {"r": 4, "delora_lambda": 7},
    "DELORA-patterns": {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "lambda_pattern": {"v_proj": 3}},
    "FOURIERFT": {"n_frequency": 20},
    "FOURIERFT-seed": {"n_frequency": 20, "random_loc_seed": 5, "scaling": 60.0, "init_weights": True},
    "GLORA": {"r": 4},
    "GLORA-vectors": {"r": 4, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    "GRALORA": {"r": 4, "gralora_k": 2, "alpha": 8},
    "GRALORA-hybrid": {"r": 4, "gralora_k": 2, "hybrid_r": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "HRA-gs": {"r": 4, "apply_GS": True},
    "LN_TUNING": {},
    "MISS": {"r": 4},
    "MISS-bat": {"r": 4, "init_weights": "bat"},
    "MISS-mini": {"r": 4, "init_weights": "mini", "mini_r": 2},
    "OFT": {"r": 0, "oft_block_size": 8},
    "OFT-coft": {
        "r": 4,
        "oft_block_size": 0,
        "coft": True,
        "eps": 0.5,
        "use_cayley_neumann": False,
        "block_share": True,
    },
    "OSF": {"effective_rank": 8},
    "PEANUT": {"r": 4, "depth": 1, "act_fn": "silu"},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "RANDLORA-seed": {"r": 4, "save_projection": False, "projection_prng_key": 3, "sparse": True},
    "ROAD": {"group_size": 8},
    "ROAD-4": {"group_size": 4, "variant": "road_4"},
    "SHIRA": {"r": 2, "random_seed": 1},
    "SUPERTUNING": {"sparsity": 0.98},
    "TINYLORA": {"u": 8},
    "TINYLORA-tied": {"u": 8, "weight_tying": 0.5},
    "TRAINABLE_TOKENS": {"token_indices": [5, 7, 40]},
    "UNILORA": {"theta_d_length": 32},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "VERA": {"r": 8},
    "VERA-seed": {"r": 8, "save_projection": False, "projection_prng_key": 9},
    "WAVEFT": {"n_frequency": 20},
    "WAVEFT-db2": {"n_frequency": 20, "wavelet_family": "db2", "random_loc_seed": 3},
}
KINDS = tuple(OPTIONS)
METHODS = tuple(dict.fromkeys(kind.partition("-")[0] for kind in KINDS))
_LINEAR = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
    "roberta": ["query", "value", "output.dense"],
    "t5": ["q", "v", "wo"],
}
_NORMS = {
    "llama": ["input_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],
    "bert": ["LayerNorm"],
    "roberta": ["LayerNorm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
_EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "roberta": "word_embeddings"}


def targets(family: str, method: str) -> list[str]:
    """The modules that an adapter changes in a family."""
    if method == "TRAINABLE_TOKENS":
        return [_EMBEDDINGS.get(family, "shared")]
    return (_NORMS if method == "LN_TUNING" else _LINEAR)[family]


def settings(family: str, kind: str, task: str, **changes: Any) -> Any:
    """PEFT's configuration of one kind of adapter."""
    method = kind.partition("-")[0]
    given = {"target_modules": targets(family, method), **OPTIONS[kind], **changes}
    if family == "t5" and task == "SEQ_CLS":
        given["modules_to_save"] = ["classification_head"]
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](task_type=task, **given)


def save(folder: Path, base_folder: Path, made: Any, seed: int = 3) -> None:
    """Write the folder of an adapter whose trained values are random."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(peers.plain(base_folder, made.task_type), made)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.data.add_(torch.randn_like(parameter) * (2.0 if "unilora" in name else 0.1))
        wrapped.save_pretrained(folder)


def load(folder: Path, base_folder: Path, task: str) -> Any:
    """What plain PEFT reads from the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(peers.plain(base_folder, task), folder).eval()
