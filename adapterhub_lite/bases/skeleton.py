"""A base without its weights: modules and shapes on the meta device, made from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import BaseUnavailable
from .load import checked_config
from .quiet import quiet
from .views import VIEWS, View, kind_of, make_view


def skeleton(folder: Path, task_type: str | None) -> View:
    """The modules of the checkpoint in `folder` as PEFT's `task_type` sees them; no tensor of it is read.

    Raises:
        BaseUnavailable, Unsupported: its configuration is not one of a base.
    """
    return skeleton_of(checked_config(folder), task_type)


def skeleton_of(config: dict[str, Any], task_type: str | None) -> View:
    """The same from the content of a config.json.

    Raises:
        BaseUnavailable, Unsupported: it is not one of a base.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    kind = kind_of(config)
    classes = {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "encoder": AutoModelForSequenceClassification,
    }
    plain = {key: value for key, value in config.items() if key != "model_type"}
    with quiet(), torch.device("meta"):
        try:
            settings = AutoConfig.for_model(config["model_type"], **plain)
            model = classes[kind].from_config(settings, trust_remote_code=False)
        except Exception as error:  # each class of transformers checks its configuration in its own way, or not at all
            raise BaseUnavailable(
                f"The configuration of this {config['model_type']} makes no model: {_first_line(error)}",
                "Is config.json whole, and does this version of transformers know the model?",
            ) from error
        return make_view(model, kind, task_type if task_type in VIEWS else "default")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{' '.join(line.strip() for line in lines[:2]).partition('. ')[0][:200].rstrip('.')}."
