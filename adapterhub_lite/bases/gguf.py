"""A GGUF file turned once into what plain transformers loads: bfloat16 safetensors, config and tokenizer.

Takes: a GGUF file whose digest was checked. Gives: the files in a folder. Never: keeps the weights packed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from ..events import Listener, Progress
from .quiet import quiet

# What the loader writes about the machine and moment of the conversion; a base must be the same bytes everywhere.
_TRACES = {
    "config.json": ("_model_name_or_path", "_name_or_path", "transformers_version"),
    "generation_config.json": ("transformers_version",),
    "tokenizer_config.json": ("is_local", "local_files_only"),
}


def convert(weights: Path, folder: Path, *, title: str, on_event: Listener) -> None:
    """Write `weights` into `folder` as a checkpoint."""
    import torch

    on_event(Progress(title, 0, 0, "tensors"))
    with quiet(), torch.random.fork_rng(devices=[]):  # a first run must train like a second one
        tokenizer = _tokenizer(weights)
        with _counted(title, on_event):
            model = _model(weights)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name, keys in _TRACES.items():
        _drop(folder / name, keys)


def _model(weights: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )


def _tokenizer(weights: Path) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
    if _pre_tokenizer(weights) == "smollm":
        # GGUF names the pre-tokenizer and transformers ignores the name: blanks before a digit would be cut
        # otherwise than the model learnt ("x  12").
        split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    return tokenizer


def _pre_tokenizer(weights: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(weights).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field else ""


def _drop(path: Path, keys: tuple[str, ...]) -> None:
    content = json.loads(path.read_bytes())
    kept = {key: value for key, value in content.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextlib.contextmanager
def _counted(title: str, on_event: Listener) -> Iterator[None]:
    """Turn the loop over tensors into events; its bar is tqdm's own and heeds no setting of transformers."""
    loader = vars(import_module("transformers.modeling_gguf_pytorch_utils"))

    def report(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        waiting = list(tensors)
        for done, tensor in enumerate(waiting, 1):
            yield tensor
            on_event(Progress(title, done, len(waiting), "tensors"))

    bar = loader["tqdm"]
    loader["tqdm"] = report
    try:
        yield
    finally:
        loader["tqdm"] = bar
