"""The README of a merged model: what it is made of, in the Hub's form (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ..merging.report import MergeReport
from .merge_served import GGUF

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def merged_card(
    report: MergeReport, config: Mapping[str, Any], task: Mapping[str, Any] | None = None, chats: bool = False
) -> str:
    """Base, adapters and figures. No licence is claimed: that of the base, and of the data, is not known here.

    Args:
        task: of the first adapter, to show how its model is asked.
        chats: whether the tokenizer has a chat template.
    """
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
        _usage(report, config, task or {}, chats),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(report: MergeReport, config: Mapping[str, Any], task: Mapping[str, Any], chats: bool) -> str:
    names = config.get("architectures") or ["AutoModelForCausalLM"]
    auto = "AutoModelForCausalLM"
    for ending in ("SequenceClassification", "TokenClassification", "ConditionalGeneration"):
        if str(names[0]).endswith(ending):
            auto = "AutoModelForSeq2SeqLM" if ending == "ConditionalGeneration" else f"AutoModelFor{ending}"
    gguf = f', gguf_file="{GGUF}"' if report.to.startswith("gguf") else ""
    asks = auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM") and task.get("type") == "instruct"
    lines = [f"from transformers import {auto}{', AutoTokenizer' if asks else ''}"]
    lines.append(f'model = {auto}.from_pretrained("."{gguf})')
    if report.residual_rank:
        lines += ["from peft import PeftModel", 'model = PeftModel.from_pretrained(model, "residual")']
    if asks:
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("."{gguf})', *_asked(task, auto, chats)]
    inner = "\n".join(lines)
    return f"```python\n{inner}\n```"


def _asked(task: Mapping[str, Any], auto: str, chats: bool) -> list[str]:
    """A prompt and its answer, as the adapter was trained on them (`tasks.prompts`)."""
    system = str(task.get("system") or "")
    prompt = str(task.get("template") or "{" + str(task.get("prompt") or "prompt") + "}")
    causal = auto == "AutoModelForCausalLM"
    if chats and causal:
        turns = [*([("system", system)] if system else []), ("user", prompt)]
        told = ", ".join(f'{{"role": "{role}", "content": {_quoted(text)}}}' for role, text in turns)
        inputs = f'apply_chat_template([{told}], add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        lines = [f"inputs = tokenizer.{inputs}"]
    else:
        text = f"{system}\n\n{prompt}" if system and causal else prompt
        lines = [f'inputs = tokenizer({_quoted(text)}, return_tensors="pt")']
    start = '[0, inputs["input_ids"].shape[1]:]' if causal else "[0]"
    return [
        "# A row's own values stand where the braces are.",
        *lines,
        f"found = model.generate(**inputs, max_new_tokens={int(task.get('max_new_tokens') or 64)}, do_sample=False)",
        f"print(tokenizer.decode(found{start}, skip_special_tokens=True))",
    ]


def _quoted(text: str) -> str:
    """A string of Python that ends no block of code."""
    return json.dumps(text).replace("`", "\\u0060")


def _plain(text: str) -> str:
    """Text that Markdown takes as text."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    cleaned = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{cleaned}`" if cleaned else "unknown"
