"""An encoder with four classifiers of different label counts in one batch, beside four passes of PEFT.

Real sentences where `AHL_DATA` names a folder of data sets (sst2, ag_news, clinc150 and dolly, each with
validation.jsonl), else sentences of our own of as unlike lengths. A pass of PEFT has the rows of one classifier, padded
to its longest; PEFT computes in float32 or in bfloat16, whichever is faster.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from adapterhub_lite.bases.inputs import pad_rows
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.runtime.prompting import position_limit
from adapterhub_lite.runtime.runtime import Runtime

from .common import chosen_prompts, in_turn, random_lora
from .rows import Row, faster

if TYPE_CHECKING:
    from .runtime import Sizes

ENCODER = "minilm-l6"
PART = "encoder"
_LABELS = (2, 4, 10, 20)
_SETS = (("sst2", "text"), ("ag_news", "text"), ("clinc150", "text"), ("dolly", "instruction"))
_OWN_WORDS = (20, 40, 9, 12)  # median words of a sentence for each classifier, where there are no data sets
_BATCHES = 4  # mixed batches in one measurement: how ragged a batch is differs
_GOAL = 3.0
_Ids = list[list[int]]
_Work = Callable[[], list[list[torch.Tensor]]]


def rows(sizes: Sizes) -> Iterator[Row]:
    """The figures of this part."""
    base = load_base(ENCODER)
    runtime = Runtime(base)
    adapters = [random_lora(base, 16, seed=i, labels=n) for i, n in enumerate(_LABELS)]
    refs = [runtime.attach(adapter) for adapter in adapters]
    with TemporaryDirectory() as folder:
        for i, adapter in enumerate(adapters):
            target = Path(folder) / str(i)
            target.mkdir()
            for name, data in adapter.files().items():
                (target / name).write_bytes(data)
        peers = {
            _name(dtype): [_peer(base, Path(folder) / str(i), n, dtype) for i, n in _numbered()]
            for dtype in dict.fromkeys((base.dtype, torch.bfloat16))
        }
    each = sizes.labelled // len(_LABELS)
    kind, texts = _ragged(each * _BATCHES)
    even = [chosen_prompts(1) * (each * _BATCHES) for _ in _LABELS]
    for what, some, goal in ((kind, texts, _GOAL), ("equal lengths", even, None)):
        yield from _figures(runtime, refs, peers, _batches(base, some, each), what, goal, 3 * sizes.rounds)
    runtime.close()


def _batches(base: Base, texts: Sequence[Sequence[str]], each: int) -> list[list[_Ids]]:
    """Token ids of the rows of each classifier, batch by batch; `texts` are those of each classifier."""
    cut = {"truncation": True, "max_length": position_limit(base)}
    ids = [[list(base.tokenizer(text, **cut)["input_ids"]) for text in some] for some in texts]
    return [[some[i : i + each] for some in ids] for i in range(0, each * _BATCHES, each)]


def _figures(
    runtime: Runtime,
    refs: Sequence[Any],
    peers: dict[str, list[Any]],
    batches: Sequence[Sequence[_Ids]],
    what: str,
    goal: float | None,
    rounds: int,
) -> Iterator[Row]:
    """Mixed batches of ours beside the passes of PEFT; and what the frozen products in them take, which bounds ours."""
    base = runtime.base
    padded = [[_padded(base, some) for some in batch] for batch in batches]
    # As requests come: the classifiers take turns.
    mixed = [[one for several in zip(*batch, strict=True) for one in several] for batch in batches]
    given = [ref for _ in batches[0][0] for ref in refs]
    own = f"PEFT {_name(base.dtype)}"
    tried = in_turn({f"PEFT {dtype}": _passes(models, padded[:1]) for dtype, models in peers.items()}, 2)
    # Measured is each form of PEFT that may be the faster one: emulated bfloat16 takes many times as long.
    chosen = [name for name in tried if name == own or tried[name].p50 < 2 * tried[own].p50]
    works: dict[str, _Work] = {"ours": lambda: [runtime.logits(rows, given) for rows in mixed]}
    works |= {name: _passes(peers[name.removeprefix("PEFT ")], padded) for name in chosen}
    _check(works["ours"](), works[own]())
    counts = [sum(map(len, rows)) for rows in mixed]
    bound, operations = _products(base, counts, len(given))
    found = {name: sample.per(len(batches)) for name, sample in in_turn({**works, "bound": bound}, rounds).items()}
    best = min(chosen, key=lambda name: found[name].p50)
    real = sum(counts)
    all_ = sum(one["input_ids"].numel() for batch in padded for one in batch)
    tokens = f"{real / len(batches):.0f} tokens, padded {all_ / len(batches):.0f}"
    told = f"{len(given)} rows, {len(refs)} classifiers, {what}: {tokens}"
    yield faster(PART, told, found["ours"], best, found[best], at_least=goal)
    speed = operations / len(batches) / found["bound"].p50 / 1e9
    share = found["bound"].p50 / found["ours"].p50
    told = f"{speed:.0f} GFLOP/s, {share:.0%} of our time"
    yield Row(PART, "the frozen products in that, by torch alone", found["bound"], figure=speed, told=told)


def _products(base: Base, counts: Sequence[int], rows: int) -> tuple[Callable[[], object], float]:
    """Work that multiplies so many tokens with the frozen weights and does nothing else, and its operations.

    Of the last layer only keys and values are needed of all tokens, the rest of one token a row.
    """
    layers: Any = base.model.base_model.encoder.layer  # type: ignore[union-attr]
    given: dict[int, torch.Tensor] = {}
    products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for count in counts:
        for name, module in layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                every = not name.startswith(f"{len(layers) - 1}.") or name.endswith((".key", ".value"))
                width = module.in_features
                if width not in given:
                    given[width] = torch.randn((max(counts), width), device=base.device).to(base.dtype)
                products.append((given[width][: count if every else rows], module.weight, module.bias))

    def run() -> None:
        with torch.inference_mode():
            for x, weight, bias in products:
                F.linear(x, weight, bias)

    return run, float(sum(2 * len(x) * weight.numel() for x, weight, _ in products))


def _passes(models: Sequence[Any], batches: Sequence[Sequence[dict[str, torch.Tensor]]]) -> _Work:
    def run() -> list[list[torch.Tensor]]:
        with torch.inference_mode():
            return [[model(**one).logits for model, one in zip(models, batch, strict=True)] for batch in batches]

    return run


def _ragged(each: int) -> tuple[str, list[list[str]]]:
    """What the texts are, and as many for each classifier."""
    root = os.environ.get("AHL_DATA")
    if root and all((Path(root) / name / "validation.jsonl").is_file() for name, _ in _SETS):
        return "real texts", [_sentences(Path(root) / name / "validation.jsonl", field, each) for name, field in _SETS]
    made = random.Random(0)
    words = " ".join(chosen_prompts(8)).split()
    counts = [[max(1, round(median * made.lognormvariate(0, 0.45))) for _ in range(each)] for median in _OWN_WORDS]
    return "texts of our own", [[" ".join(made.choices(words, k=count)) for count in some] for some in counts]


def _sentences(path: Path, field: str, count: int) -> list[str]:
    lines = path.read_text("utf-8").splitlines()[:count]
    return [str(json.loads(line)[field]) for line in lines]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numbered() -> Iterator[tuple[int, int]]:
    return iter(enumerate(_LABELS))


def _peer(base: Base, folder: Path, labels: int, dtype: torch.dtype) -> Any:
    plain = AutoModelForSequenceClassification.from_pretrained(
        base.source.folder, num_labels=labels, ignore_mismatched_sizes=True, dtype=dtype
    )
    return PeftModel.from_pretrained(plain.to(base.device), folder, low_cpu_mem_usage=True).to(dtype).eval()


def _padded(base: Base, rows: _Ids) -> dict[str, torch.Tensor]:
    ids, mask = pad_rows(rows, base.pad_id, left=False)
    return {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device)}


def _check(ours: Sequence[list[torch.Tensor]], theirs: Sequence[list[torch.Tensor]]) -> None:
    """Both sides give the same logits; ours come in turn, theirs pass by pass."""
    for rows, passes in zip(ours, theirs, strict=True):
        for i, row in enumerate(rows):
            torch.testing.assert_close(row, passes[i % len(passes)][i // len(passes)], rtol=1e-3, atol=1e-3)
