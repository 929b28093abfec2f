"""A base without its weights has the modules, shapes and ties of the loaded one."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adapterhub_lite.bases.skeleton import skeleton

LOADERS = {"t5": AutoModelForSeq2SeqLM}


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("t5", {})],
)
def test_shapes_and_ties_are_those_of_the_loaded_model(tiny_folder, family, config):
    folder = tiny_folder(family, **config)
    loaded = LOADERS.get(family, AutoModelForCausalLM).from_pretrained(folder)
    view = skeleton(folder, None)
    # named_parameters tells a tied weight once
    assert {n: p.shape for n, p in view.model.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert {p.device.type for p in view.model.parameters()} == {"meta"}
