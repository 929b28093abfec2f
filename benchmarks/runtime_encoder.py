"""An encoder with four classifiers of different label counts in one batch, beside four passes of PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from adapterhub_lite.bases.inputs import pad_rows
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.runtime.runtime import Runtime

from .common import chosen_prompts, in_turn, random_lora
from .rows import Row, faster

if TYPE_CHECKING:
    from .runtime import Sizes

ENCODER = "minilm-l6"
PART = "encoder"
_LABELS = (2, 3, 6, 20)


def rows(sizes: Sizes) -> Iterator[Row]:
    """The figures of this part."""
    base = load_base(ENCODER)
    runtime = Runtime(base)
    adapters = [random_lora(base, 16, seed=i, labels=n) for i, n in enumerate(_LABELS)]
    refs = [runtime.attach(adapter) for adapter in adapters]
    texts = [list(base.tokenizer(text)["input_ids"]) for text in chosen_prompts(sizes.labelled)]
    owners = [i % len(_LABELS) for i in range(len(texts))]
    with TemporaryDirectory() as folder:
        peers = []
        for i, adapter in enumerate(adapters):
            target = Path(folder) / str(i)
            target.mkdir()
            for name, data in adapter.files().items():
                (target / name).write_bytes(data)
            peers.append(_peer(base, target, _LABELS[i]))
        batches = [_batch(base, [t for t, owner in zip(texts, owners, strict=True) if owner == i]) for i in range(4)]

        def passes() -> list[torch.Tensor]:
            with torch.inference_mode():
                return [peer(**batch).logits for peer, batch in zip(peers, batches, strict=True)]

        given = [refs[owner] for owner in owners]
        _check(runtime.logits(texts, given), passes(), owners)
        found = in_turn({"ours": lambda: runtime.logits(texts, given), "PEFT": passes}, 5 * sizes.rounds)
    runtime.close()
    what = f"{len(texts)} rows, 4 classifiers of {', '.join(map(str, _LABELS))} labels, one batch / 4 passes"
    yield faster(PART, what, found["ours"], "PEFT", found["PEFT"], at_least=3)


def _peer(base: Base, folder: Path, labels: int) -> Any:
    plain = AutoModelForSequenceClassification.from_pretrained(
        base.source.folder, num_labels=labels, ignore_mismatched_sizes=True, dtype=base.dtype
    )
    return PeftModel.from_pretrained(plain.to(base.device), folder, low_cpu_mem_usage=True).eval()


def _batch(base: Base, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids, mask = pad_rows(rows, base.pad_id, left=False)
    return {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device)}


def _check(ours: list[torch.Tensor], theirs: list[torch.Tensor], owners: list[int]) -> None:
    """Both sides give the same logits."""
    at = [0] * len(theirs)
    for row, owner in zip(ours, owners, strict=True):
        expected = theirs[owner][at[owner]]
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-3, atol=1e-3)
        at[owner] += 1
