"""Where a model's tensors go in a GGUF file: names, orientation and order of rows, by architecture.

llama.cpp turns pairs of neighbouring rows of q and k where transformers turns the two halves of a head; for the
architecture "llama" the rows are therefore stored in another order. Conv1D weights (GPT-2) are stored [out, in]. Tied
output layers are not stored. A file holds exactly the tensors that llama.cpp asks for: it refuses one too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import torch

from ..errors import AdapterMismatch, Unsupported

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
"""transformers' model_type -> llama.cpp's architecture."""

_MODELS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # made anew by whoever loads a model
_ROPE_KEYS = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_ROPES = {
    "default": set(),
    "linear": set(),
    "yarn": {"beta_fast", "beta_slow"},
    "llama3": {"low_freq_factor", "high_freq_factor"},
}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """A tensor of the file: its name, shape (rows first), and what is done to the model's tensor."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    order: torch.Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """A language model as llama.cpp sees it.

    Attributes:
        arch: llama.cpp's name of the architecture.
        config: transformers' configuration, with every default filled in.
    """

    arch: str
    config: Any

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Layout:
        """Read the content of a config.json.

        Raises:
            Unsupported: llama.cpp does not compute this model, or no file of it is written here.
        """
        from transformers import AutoConfig

        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise Unsupported(f"GGUF files of {kind} models are not written.", f"Written are: {known}. Or safetensors.")
        names = [str(name) for name in config.get("architectures") or []]
        if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
            shown = ", ".join(names) or "a model without a class"
            raise Unsupported(f"A GGUF file holds a language model; this is {shown}.", "Write safetensors.")
        plain = {key: value for key, value in config.items() if key != "model_type"}
        layout = cls(ARCHITECTURES[kind], AutoConfig.for_model(kind, **plain))
        (_check_gpt2 if layout.arch == "gpt2" else _check_llama)(layout.config)
        return layout

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding matrix."""
        return bool(self.config.tie_word_embeddings)

    @property
    def head_dim(self) -> int:
        """Values per attention head."""
        given = getattr(self.config, "head_dim", None)
        return int(given or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def read_config(self) -> Any:
        """What plain transformers is to be told with a file: it reads little of a configuration from the file itself.

        llama.cpp takes a mistral for a llama, and transformers finds the tensors of no mistral in a file.
        """
        if self.config.model_type != "mistral":
            return self.config
        from transformers import LlamaConfig

        told = self.config.to_dict()
        return LlamaConfig(**{key: value for key, value in told.items() if key not in ("model_type", "architectures")})

    @cached_property
    def required(self) -> Shapes:
        """Names and shapes of the tensors that llama.cpp must find."""
        shapes = _gpt2_shapes(self.config) if self.arch == "gpt2" else self._llama_shapes()
        if not self.tied:
            shapes["output.weight"] = (self.config.vocab_size, self.config.hidden_size)
        return shapes

    @cached_property
    def optional(self) -> Shapes:
        """Those that it takes where they are there: a Llama's biases."""
        if self.arch != "llama":
            return {}
        leaves = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        names = [f"blk.{i}.{leaf}" for i in range(self.config.num_hidden_layers) for leaf in leaves]
        return {f"{name}.bias": self.required[f"{name}.weight"][:1] for name in names}

    def place(self, tensor: str) -> Place | None:
        """Where a tensor of the checkpoint goes; None for one that the file does not hold.

        Raises:
            AdapterMismatch: llama.cpp has no place for it.
        """
        if tensor.endswith(_BUFFERS) or (self.tied and tensor == "lm_head.weight"):
            return None
        name = self._name(tensor)
        shape = {**self.required, **self.optional}.get(name or "")
        if name is None or shape is None:
            raise AdapterMismatch(
                f"llama.cpp has no place for {tensor} in a model of the architecture {self.arch}.", "Write safetensors."
            )
        transposed = self.arch == "gpt2" and name.startswith("blk.") and len(shape) == 2
        return Place(name, shape, transposed, self._order(name, shape[0]))

    @cached_property
    def _names(self) -> Any:
        return gguf.get_tensor_name_map(_MODELS[self.arch], self.config.num_hidden_layers)

    def _name(self, tensor: str) -> str | None:
        prefix = "transformer." if self.arch == "gpt2" else "model."
        for candidate in (tensor, f"{prefix}{tensor}"):  # a backbone's checkpoint lacks the prefix
            found = self._names.get_name(candidate, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return str(found)
        return None

    def _order(self, name: str, rows: int) -> torch.Tensor | None:
        """For each row of the file the row of the model it is: rows i and i + half of a head become neighbours."""
        leaf = name.split(".")[-2]
        if self.arch != "llama" or leaf not in ("attn_q", "attn_k"):
            return None
        heads = rows // self.head_dim
        return torch.arange(rows).reshape(heads, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def _llama_shapes(self) -> Shapes:
        config, width = self.config, int(self.config.hidden_size)
        query, key = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        inner = int(config.intermediate_size)
        shapes: Shapes = {"token_embd.weight": (config.vocab_size, width), "output_norm.weight": (width,)}
        for i in range(config.num_hidden_layers):
            block: Shapes = {
                "attn_norm.weight": (width,),
                "attn_q.weight": (query, width),
                "attn_k.weight": (key, width),
                "attn_v.weight": (key, width),
                "attn_output.weight": (width, query),
                "ffn_norm.weight": (width,),
                "ffn_gate.weight": (inner, width),
                "ffn_up.weight": (inner, width),
                "ffn_down.weight": (width, inner),
            }
            if self.arch == "qwen2":
                block |= {f"attn_{leaf}.bias": (rows,) for leaf, rows in (("q", query), ("k", key), ("v", key))}
            if self.arch == "qwen3":
                block |= {f"attn_{leaf}_norm.weight": (self.head_dim,) for leaf in ("q", "k")}
            shapes |= {f"blk.{i}.{leaf}": shape for leaf, shape in block.items()}
        return shapes


def _gpt2_shapes(config: Any) -> Shapes:
    width = int(config.n_embd)
    inner = int(config.n_inner or 4 * width)
    shapes: Shapes = {"token_embd.weight": (config.vocab_size, width)}
    shapes |= {"position_embd.weight": (config.n_positions, width)}
    shapes |= {"output_norm.weight": (width,), "output_norm.bias": (width,)}
    matrices: Shapes = {
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    for i in range(config.n_layer):
        shapes |= {f"blk.{i}.{leaf}_norm.{kind}": (width,) for leaf in ("attn", "ffn") for kind in ("weight", "bias")}
        shapes |= {f"blk.{i}.{leaf}.weight": shape for leaf, shape in matrices.items()}
        shapes |= {f"blk.{i}.{leaf}.bias": shape[:1] for leaf, shape in matrices.items()}
    return shapes


def _refuse(what: str) -> Unsupported:
    return Unsupported(f"llama.cpp does not compute this model: {what}.", "Write safetensors.")


def _check_gpt2(config: Any) -> None:
    # llama.cpp's "gelu" is the approximation by tanh.
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise _refuse(f"its activation is {config.activation_function}")
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        raise _refuse("its attention is not GPT-2's own")


def _check_llama(config: Any) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise _refuse(f"its activation is {config.hidden_act}")
    rope = config.rope_parameters or {}
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind not in _ROPES:
        raise _refuse(f"its positions are scaled by {kind}")
    if kind == "llama3" and config.model_type not in ("llama", "mistral"):
        raise _refuse(f"positions of {config.model_type} are not scaled as Llama 3's are")
    unknown = sorted(key for key, value in rope.items() if value is not None and key not in _ROPE_KEYS | _ROPES[kind])
    if unknown:
        raise _refuse(f"the file has no place for {unknown[0]} of its positions")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _refuse("it turns a part of each head only")
