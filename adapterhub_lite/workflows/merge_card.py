"""The README of a merged model: what it is made of, in the Hub's form (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ..merging.report import MergeReport
from .merge_served import GGUF

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def merged_card(report: MergeReport, config: Mapping[str, Any]) -> str:
    """Base, adapters and figures. No licence is claimed: that of the base, and of the data, is not known here."""
    origin = report.base_origin.partition(" ")[2]
    base = origin if _HUB_ID.fullmatch(origin) else None
    head = {
        **({"base_model": base, "base_model_relation": "merge"} if base else {}),
        "library_name": "gguf" if report.to.startswith("gguf") else "transformers",
        "license": "unknown",
        "tags": ["adapterhub-lite", "merge"],
    }
    members = "\n".join(f"| {_code(m.ref)} | {m.weight:g} | {_code(m.digest)} |" for m in report.adapters)
    checks = "\n".join(f"| {_plain(c.name)} | {c.value:.3g} | {c.relation} {c.limit:g} |" for c in report.checks)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_plain(report.base.rstrip('/').rpartition('/')[2])} with {_plain(report.adapter)}",
        f"Adapters baked into {_plain(report.base.rstrip('/').rpartition('/')[2])} with adapterhub-lite. "
        "The licence is unknown: that of the base and of the adapters' data applies.",
        f"| adapter | weight | digest |\n|---|---|---|\n{members}",
        f"Fingerprint of the base: {_code(report.base_fingerprint)}. Baked into its {report.bake} weights"
        + (f" ({report.quantization})." if report.quantization != "none" else "."),
        f"Verified against base + adapter:\n\n| figure | measured | threshold |\n|---|---|---|\n{checks}",
        f"All figures are in {_code('merge_report.json')} and {_code('merge_report.html')}.",
        _usage(report, config),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(report: MergeReport, config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or ["AutoModelForCausalLM"]
    auto = "AutoModelForCausalLM"
    for ending in ("SequenceClassification", "TokenClassification", "ConditionalGeneration"):
        if str(names[0]).endswith(ending):
            auto = "AutoModelForSeq2SeqLM" if ending == "ConditionalGeneration" else f"AutoModelFor{ending}"
    gguf = f', gguf_file="{GGUF}"' if report.to.startswith("gguf") else ""
    lines = [f"from transformers import {auto}", f'model = {auto}.from_pretrained("."{gguf})']
    if report.residual_rank:
        lines += ["from peft import PeftModel", 'model = PeftModel.from_pretrained(model, "residual")']
    inner = "\n".join(lines)
    return f"```python\n{inner}\n```"


def _plain(text: str) -> str:
    """Text that Markdown takes as text."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    cleaned = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{cleaned}`" if cleaned else "unknown"
