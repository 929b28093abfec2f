"""Silence the chatter of the libraries underneath: progress bars, advice and warnings that are not ours to give."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("transformers", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "accelerate", "httpx")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, libraries log errors only and show no progress bar; what was set before is put back."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as hf_logging

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
