"""Generation with one adapter, and with a different adapter in each row, against PEFT (`adapter_names`)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases.inputs import pad_rows
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quiet import quiet
from adapterhub_lite.runtime.runtime import Runtime

from .common import BASE, chosen_prompts, in_turn, lora_store, print_head, print_row

ROWS = 8
NEW_TOKENS = 16
ROUNDS = 3


def main() -> None:
    """Print the comparison; both generate exactly NEW_TOKENS greedy tokens a row."""
    base = load_base(BASE)
    # No end token: both sides do the same number of steps.
    base.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    base.config.eos_token_id = None
    base.tokenizer.eos_token_id = None
    print_head(f"mixed batch: {ROWS} rows x {NEW_TOKENS} new tokens, LoRA rank 16, all linear layers", base)
    with lora_store(base, ROWS) as (store, refs, folders), quiet():
        runtime = Runtime(base, store, slots=ROWS)
        plain = AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=base.dtype)
        peer = PeftModel.from_pretrained(plain, folders[0], adapter_name="s000", low_cpu_mem_usage=True).eval()
        for i in range(1, ROWS):
            peer.load_adapter(folders[i], adapter_name=f"s{i:03}", low_cpu_mem_usage=True)
        prompts = [list(base.tokenizer(text)["input_ids"]) for text in chosen_prompts(ROWS)]
        cases: list[tuple[str, Any, list[str]]] = [
            ("no adapter", None, ["__base__"] * ROWS),
            ("one adapter", [refs[0]] * ROWS, ["s000"] * ROWS),
            ("two adapters", [refs[i % 2] for i in range(ROWS)], [f"s{i % 2:03}" for i in range(ROWS)]),
            (f"{ROWS} adapters", list(refs), [f"s{i:03}" for i in range(ROWS)]),
        ]
        for title, ours, theirs in cases:
            _compare(title, runtime, peer, prompts, ours, theirs)
        runtime.close()


def _compare(
    title: str, runtime: Runtime, peer: PeftModel, prompts: list[list[int]], ours: Any, theirs: list[str]
) -> None:
    ids, mask = pad_rows(prompts, runtime.base.pad_id, left=True)
    names = set(theirs)

    def peer_generate() -> torch.Tensor:
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        options |= {"input_ids": ids, "attention_mask": mask, "pad_token_id": runtime.base.pad_id}
        if names == {"__base__"}:
            with peer.disable_adapter():
                return peer.generate(**options)
        if len(names) == 1:
            peer.set_adapter(theirs[0])
            return peer.generate(**options)
        return peer.generate(**options, adapter_names=theirs)

    def our_generate() -> list[str]:
        return runtime.generate_ids(prompts, ours, NEW_TOKENS)

    with torch.inference_mode():
        expected = [
            runtime.base.tokenizer.decode(r, skip_special_tokens=True) for r in peer_generate()[:, ids.shape[1] :]
        ]
        equal = sum(a == b for a, b in zip(our_generate(), expected, strict=True))
        seconds = in_turn({"ours": our_generate, "peer": peer_generate}, ROUNDS)
    print_row(f"{title} ({equal} of {len(prompts)} rows give the same text)", seconds["ours"], seconds["peer"])
    print(f"   {'':<58} {len(prompts) * NEW_TOKENS / seconds['ours']:>10.0f} tokens/s ours")


if __name__ == "__main__":
    main()
