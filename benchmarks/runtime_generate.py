"""Greedy generation: the bare base, one adapter, and a different one in each row, beside transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases.inputs import pad_rows
from adapterhub_lite.bases.load import Base
from adapterhub_lite.runtime.decoder import decoder_of
from adapterhub_lite.runtime.runtime import Runtime

from .common import chosen_prompts, in_turn, lora_store
from .rows import Row, Sample, faster, share

if TYPE_CHECKING:
    from .runtime import Sizes

PART = "generate"


def rows(base: Base, sizes: Sizes) -> Iterator[Row]:
    """The figures of this part."""
    for owner in (base.model.generation_config, base.config, base.tokenizer):  # both sides do the same steps
        owner.eos_token_id = None  # type: ignore[union-attr]
    prompts = [list(base.tokenizer(text)["input_ids"]) for text in chosen_prompts(sizes.rows)]
    with lora_store(base, sizes.registered, distinct=sizes.rows) as (store, refs, folders):
        runtime = Runtime(base, store, slots=sizes.rows, batch_size=sizes.rows)
        plain = AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=base.dtype).to(base.device)
        narrow = AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=torch.bfloat16).to(base.device)
        for count in (1, min(8, sizes.rows)):
            yield _bare(runtime, plain, narrow, prompts[:count], sizes)
        del narrow
        peer = PeftModel.from_pretrained(plain, folders[0], adapter_name="s000", low_cpu_mem_usage=True).eval()
        for i in range(1, sizes.rows):
            peer.load_adapter(folders[i], adapter_name=f"s{i:03}", low_cpu_mem_usage=True)
        eight = min(8, sizes.rows)
        yield _adapted(runtime, peer, prompts[:eight], refs, [0] * eight, 3.5, sizes)
        yield _adapted(runtime, peer, prompts, refs, list(range(sizes.rows)), 8.0, sizes)
        del peer, plain
        yield from _retention(runtime, prompts, refs, sizes)
        yield _registered(runtime, prompts, refs, sizes)
        runtime.close()


def _bare(runtime: Runtime, plain: Any, narrow: Any, prompts: list[list[int]], sizes: Sizes) -> Row:
    count = len(prompts)
    works = {
        "ours": lambda: runtime.generate_ids(prompts, None, sizes.new_tokens),
        "float32": _generate(plain, runtime, prompts, sizes.new_tokens),
        "bfloat16": _generate(narrow, runtime, prompts, sizes.new_tokens),
    }
    equal = _equal(runtime, works["ours"](), works["float32"](), prompts)
    found = in_turn(works, sizes.rounds)
    best = min(("float32", "bfloat16"), key=lambda name: found[name].p50)
    what = f"base alone, {count} rows x {sizes.new_tokens} tokens ({equal} of {count} texts equal)"
    return _told(faster(PART, what, found["ours"], f"HF {best}", found[best], at_least=1.5), count * sizes.new_tokens)


def _adapted(
    runtime: Runtime, peer: Any, prompts: list[list[int]], refs: list[str], owners: Sequence[int], goal: float,
    sizes: Sizes,
) -> Row:  # fmt: skip
    count, adapters = len(prompts), len(set(owners))
    if adapters == 1:
        peer.set_adapter(f"s{owners[0]:03}")
    names = {} if adapters == 1 else {"adapter_names": [f"s{i:03}" for i in owners]}
    works = {
        "ours": lambda: runtime.generate_ids(prompts, [refs[i] for i in owners], sizes.new_tokens),
        "PEFT": _generate(peer, runtime, prompts, sizes.new_tokens, **names),
    }
    equal = _equal(runtime, works["ours"](), works["PEFT"](), prompts)
    found = in_turn(works, sizes.rounds)
    what = f"{count} rows, {adapters} adapters, {sizes.new_tokens} tokens ({equal} of {count} texts equal)"
    return _told(faster(PART, what, found["ours"], "PEFT", found["PEFT"], at_least=goal), count * sizes.new_tokens)


def _retention(runtime: Runtime, prompts: list[list[int]], refs: list[str], sizes: Sizes) -> Iterator[Row]:
    """Speed with S adapters over our own base alone, as a fraction of the limit that the bytes read for it set."""
    count = len(prompts)
    chosen: dict[int, list[str | None]] = {0: [None] * count}
    chosen |= {s: [refs[i * s // count] for i in range(count)] for s in (1, 4, 16) if s <= count}
    works = {
        str(s): lambda given=given: runtime.generate_ids(prompts, given, sizes.new_tokens)  # type: ignore[misc]
        for s, given in chosen.items()
    }
    found = in_turn(works, sizes.rounds)
    frozen, adapter = _bytes(runtime.base), runtime.fitted(refs[0]).nbytes
    for s in list(chosen)[1:]:
        limit = frozen / (frozen + s * adapter)
        speed = found["0"].p50 / found[str(s)].p50
        what = f"retention, {count} rows, {s} adapters: {speed:.2f} of the base's speed, limit {limit:.2f}"
        yield share(PART, what, found[str(s)], "bare", found["0"], speed / limit, at_least=0.85)


def _registered(runtime: Runtime, prompts: list[list[int]], refs: list[str], sizes: Sizes) -> Row:
    """The same rows while the store holds few, and while it holds many that any row might name."""
    count = len(prompts)
    few = Runtime(runtime.base, runtime.store, slots=count, batch_size=count)
    for ref in refs:  # every name has been resolved once, as a server's would be
        runtime.task(ref)
    given = refs[:count]
    works = {
        "many": lambda: runtime.generate_ids(prompts, given, sizes.new_tokens),
        "few": lambda: few.generate_ids(prompts, given, sizes.new_tokens),
    }
    found = in_turn(works, sizes.rounds)
    few.close()
    speed = found["few"].p50 / found["many"].p50
    what = f"{len(refs)} adapters registered, {len(set(given))} active"
    return share(PART, what, found["many"], f"{count} registered", found["few"], speed, at_least=0.98)


def _bytes(base: Base) -> int:
    """Bytes of weights that one step of our forward reads."""
    decoder = decoder_of(base)
    assert decoder is not None
    return sum(site.nbytes for site in decoder.sites)


def _generate(model: Any, runtime: Runtime, prompts: list[list[int]], new: int, **more: Any) -> Callable[[], Any]:
    ids, mask = (t.to(runtime.base.device) for t in pad_rows(prompts, runtime.base.pad_id, left=True))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": runtime.base.pad_id}

    def work() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(input_ids=ids, attention_mask=mask, **options, **more)[:, ids.shape[1] :]

    return work


def _equal(runtime: Runtime, texts: Any, tokens: Any, prompts: list[list[int]]) -> int:
    expected = [runtime.base.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    return sum(a == b for a, b in zip(texts, expected, strict=True))


def _told(row: Row, tokens: int) -> Row:
    from dataclasses import replace

    assert row.ours is not None
    return replace(row, told=f"{row.told}, {tokens / row.ours.p50:,.0f} tokens/s")


__all__ = ["PART", "Sample", "rows"]
