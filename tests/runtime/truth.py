"""A base with adapters of every kind resident in one runtime, and PEFT's own model of each, for rows alone."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quantization import dense_weight
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import peers, tiny
from tests.runtime import build, test_decoder, test_encoder
from tests.runtime.test_kinds import our_tokens

RANKS = (1, 2, 5, 16, 33, 64)
PREFIXES = (3, 8)
WIDE = {"wide llama": "llama", "wide bert": "bert"}  # large enough for our own forward
NEW = 8

Drawn = tuple[list[str], list[list[int]], list[list[int]]]


class Truth:
    """One base in one precision. PEFT's models compute with the weights that the base's stored ones stand for."""

    def __init__(self, folder: Path, family: str, quantize: str = "none", dtype: str = "auto") -> None:
        self.family, self._quantize = WIDE.get(family, family), quantize
        make = {"wide llama": test_decoder.checkpoint, "wide bert": test_encoder.checkpoint}.get(family)
        self._folder = make(folder / "base", self.family) if make else tiny.save(family, folder / "base")
        self.base = load_base(str(self._folder), quantize, device="cpu", dtype=dtype)
        self.task = peers.task_type(self.family)
        self.runtime = Runtime(self.base, Store(folder / "store"), slots=None)
        self.adapters = self._made()
        self.refs: dict[str, Any] = {kind: self.runtime.attach(one) for kind, one in self.adapters.items()}
        self.refs["none"] = None
        self._models: dict[tuple[str, torch.dtype], Any] = {}

    def _made(self) -> dict[str, Adapter]:
        base, mild = self.base, test_encoder.mild
        made = {f"lora{n}": mild(build.lora(base, n, n, labels=self.labels(f"lora{n}")), n) for n in RANKS}
        made |= {f"dora{n}": mild(build.lora(base, 100 + n, n, dora=True), n) for n in (4, 64)}
        made |= {f"prefix{n}": build.prefix(base, 200 + n, n, labels=self.labels(f"prefix{n}")) for n in PREFIXES}
        heads = ("head2", "head7") if base.kind == "causal" else ()
        return made | {kind: self._headed(kind, 300 + n, 3 + 30 * n) for n, kind in enumerate(heads)}

    def _headed(self, kind: str, seed: int, rank: int) -> Adapter:
        """A LoRA on a causal base that classifies."""
        adapter = test_encoder.mild(build.lora(self.base, seed, rank), rank)
        width = int(self.base.model.get_input_embeddings().weight.shape[1])
        head = torch.randn((self.labels(kind), width), generator=torch.Generator().manual_seed(seed))
        spec = replace(adapter.spec, task_type="SEQ_CLS", modules_to_save=("score",))
        return replace(adapter, spec=spec, tensors={**adapter.tensors, f"{build.PREFIX}score.weight": head})

    @staticmethod
    def labels(kind: str) -> int:
        """How many labels the head of an adapter has."""
        return {"head2": 2, "head7": 7, "lora1": 2, "lora16": 5, "lora64": 7, "prefix8": 4}.get(kind, peers.LABELS)

    def classifies(self, kind: str) -> bool:
        """Whether rows of this kind get logits of labels."""
        return kind.startswith("head") or not self.writes

    @property
    def writes(self) -> bool:
        """Whether the base generates."""
        return self.task != "SEQ_CLS"

    def draw(self, seed: int, heads: bool = True) -> Drawn:
        """1 to 8 adapters, and up to 12 rows of unlike length that use them or none; an answer each for a decoder.

        An encoder's rows all have a head: without one there is nothing to compute.
        """
        dice = random.Random(seed)
        some = dice.sample([k for k in sorted(self.adapters) if heads or not self.classifies(k)], dice.randint(1, 8))
        more = [*some, "none"] if self.writes else some
        kinds = [*some, *(dice.choice(more) for _ in range(dice.randint(1, 4)))]
        dice.shuffle(kinds)
        rows = [[dice.randrange(3, 250) for _ in range(dice.randint(1, 40))] for _ in kinds]
        return kinds, rows, [[dice.randrange(3, 250) for _ in range(dice.randint(1, 5))] for _ in kinds]

    def logits(self, kinds: Sequence[str], rows: list[list[int]], answers: list[list[int]]) -> list[torch.Tensor]:
        """Ours, of one mixed batch."""
        given = answers if self.task == "SEQ_2_SEQ_LM" else None
        found = self.runtime.logits(rows, [self.refs[kind] for kind in kinds], given)
        return [one[: self.labels(k)] if self.classifies(k) else one for k, one in zip(kinds, found, strict=True)]

    def tokens(self, kinds: Sequence[str], rows: list[list[int]]) -> list[list[int]]:
        """What our runtime writes greedily, in one mixed batch."""
        return our_tokens(self.runtime, rows, [self.refs[kind] for kind in kinds], NEW)

    def peft(
        self, kind: str, row: list[int], answer: Sequence[int] = (), dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """PEFT's logits of one row by itself; after each token of `row`, or of the decoder's start and `answer`."""
        found = peers.logits(self.model(kind, dtype), [row], [list(answer)])[0]
        if self.classifies(kind):
            return found
        return found[-(len(answer) + 1 if self.task == "SEQ_2_SEQ_LM" else len(row)) :]

    def after(self, kind: str, row: list[int], written: list[int], dtype: torch.dtype) -> torch.Tensor:
        """PEFT's logits at each step that writes one of these tokens, and after the last."""
        if self.task == "SEQ_2_SEQ_LM":
            return self.peft(kind, row, written, dtype)
        return self.peft(kind, [*row, *written], (), dtype)[-len(written) - 1 :]

    def written(self, kind: str, row: list[int]) -> list[int]:
        """What PEFT's own `generate` writes greedily for one row, up to the end token."""
        ids = torch.tensor([row])
        with torch.no_grad():
            out = self.model(kind, torch.float32).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )[0]
        new: list[int] = out[1 if self.task == "SEQ_2_SEQ_LM" else len(row) :].tolist()
        return new[: new.index(2)] if 2 in new else new

    def model(self, kind: str, dtype: torch.dtype) -> Any:
        """PEFT's model of one adapter (or the plain one), made once; all its weights are of `dtype`."""
        if (kind, dtype) not in self._models:
            task = "SEQ_CLS" if self.classifies(kind) else self.task
            made = peers.plain(self._folder, task, self.labels(kind))
            if self._quantize != "none":
                self._put_stored_weights(made, task)
            if kind != "none":
                with tempfile.TemporaryDirectory() as folder:
                    for name, data in self.adapters[kind].files().items():
                        (Path(folder) / name).write_bytes(data)
                    made = peft.PeftModel.from_pretrained(made, folder, autocast_adapter_dtype=False)
            self._models[kind, dtype] = made.to(dtype).eval()
        return self._models[kind, dtype]

    def _put_stored_weights(self, model: nn.Module, task: str) -> None:
        """Give a plain model the weights that the quantised base's stored ones stand for."""
        live = dict(self.base.view(task).model.named_modules())
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and not name.startswith(("classifier", "score")):
                module.weight.data = dense_weight(live[name], torch.float32).clone()

    def close(self) -> None:
        self.runtime.close()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of any logit, as a share of the largest logit."""
    assert found.shape == exact.shape
    return float((found.double() - exact).abs().max() / exact.abs().max())
