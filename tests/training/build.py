"""Our trainable adapters with exactly the tensors of a PEFT model, and the gradients of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from adapterhub_lite.adapters.prefix import prefix_shape
from adapterhub_lite.bases.load import Base
from adapterhub_lite.formats.peft_config import LoraSpec, PrefixSpec
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Computation, Learner, Row, Settings, make_computation
from adapterhub_lite.training.trainable import Trainable, TrainableLora, TrainablePrefix

DROPLESS = Settings(dropout_of_base=False)
EXAMPLES = {
    "causal": [
        Example([5, 6, 7, 8, 9, 10, 2], [IGNORED] * 4 + [9, 10, 2]),
        Example([30, 31, 32, 2], [IGNORED, 31, 32, 2]),
        Example([50, 51, 52, 53, 2], [IGNORED] * 3 + [53, 2]),
    ],
    "seq2seq": [
        Example([5, 6, 7, 8, 2], [9, 10, 2]),
        Example([30, 31, 2], [32, 33, 34, 35, 2]),
        Example([50, 2], [51, 2]),
    ],
    "encoder": [Example([1, 5, 6, 7, 2], [0]), Example([1, 30, 2], [2]), Example([1, 50, 51, 52, 53, 2], [1])],
}


class Twin:
    """One of our trainable adapters (and head) that starts from a PEFT model's values."""

    def __init__(
        self,
        base: Base,
        wrapped: Any,
        make: Callable[..., Computation] = make_computation,
        how: Settings = DROPLESS,
    ) -> None:
        self.base = base
        self.peft = {n.replace(".default", ""): p for n, p in wrapped.named_parameters() if p.requires_grad}
        settings = wrapped.peft_config["default"]
        self.adapter: Trainable = (
            self._prefix(settings) if hasattr(settings, "num_virtual_tokens") else self._lora(settings)
        )
        self.head = self._head() if base.kind == "encoder" else None
        kind = {"encoder": "SEQ_CLS", "causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}[base.kind]
        self.learner = Learner(self.adapter, self.head, kind)
        self.computation = make(base, [self.learner], how)

    def _lora(self, settings: Any) -> TrainableLora:
        modules = self.base.view().modules
        names = {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in self.peft if ".lora_" in n}
        spec = LoraSpec(
            rank=settings.r,
            alpha=settings.lora_alpha,
            rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            dropout=settings.lora_dropout,
        )
        made = TrainableLora(spec, {n: modules[n] for n in sorted(names)}, torch.Generator())
        for name, site in made.sites.items():
            stem = f"base_model.model.{name}"
            site.a.data = self.peft[f"{stem}.lora_A.weight"].detach().clone()
            site.b.data = self.peft[f"{stem}.lora_B.weight"].detach().clone()
            if site.magnitude is not None:
                site.magnitude.data = self.peft[f"{stem}.lora_magnitude_vector.weight"].detach().clone()
        return made

    def _prefix(self, settings: Any) -> TrainablePrefix:
        spec = PrefixSpec(
            num_virtual_tokens=settings.num_virtual_tokens,
            token_dim=settings.token_dim,
            num_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            num_transformer_submodules=settings.num_transformer_submodules,
            encoder_hidden_size=settings.encoder_hidden_size,
            prefix_projection=settings.prefix_projection,
        )
        made = TrainablePrefix(spec, prefix_shape(self.base.config), torch.Generator(), self.base.device)
        for ours, theirs in zip(made.parameters(), self._prefix_peers(), strict=True):
            assert ours.shape == theirs.shape
            ours.data = theirs.detach().clone()
        return made

    def _prefix_peers(self) -> list[torch.nn.Parameter]:
        """PEFT's parameters in the order of ours: embedding, then the network layer by layer."""
        inner = {n.removeprefix("prompt_encoder."): p for n, p in self.peft.items() if n.startswith("prompt_encoder.")}
        order = ["embedding.weight", *(f"transform.{i}.{part}" for i in (0, 2) for part in ("weight", "bias"))]
        return [inner[n] for n in order if n in inner]

    def _head(self) -> torch.nn.Module:
        slot = self.base.view("SEQ_CLS").head
        assert slot is not None
        head = slot.build({n: p.detach().clone() for n, p in self._head_peers().items()})
        return head.requires_grad_(True)

    def _head_peers(self) -> dict[str, torch.nn.Parameter]:
        return {n.partition("modules_to_save.")[2]: p for n, p in self.peft.items() if "modules_to_save." in n}

    def gradients(self, examples: Sequence[Example]) -> tuple[float, list[tuple[str, torch.Tensor]]]:
        """Our summed loss, and the gradient of each parameter in the order of `peers`."""
        own = self.parameters()
        for parameter in own.values():
            parameter.grad = None
        (sums,) = self.computation.gradients([Row(e, key=77 + i) for i, e in enumerate(examples)])
        return sums.total, [(n, p.grad) for n, p in own.items()]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that is trained, by name."""
        made: dict[str, torch.nn.Parameter] = {}
        if isinstance(self.adapter, TrainableLora):
            for name, site in self.adapter.sites.items():
                made[f"{name} A"], made[f"{name} B"] = site.a, site.b
                if site.magnitude is not None:
                    made[f"{name} magnitude"] = site.magnitude
        else:
            made |= {f"prefix {i}": p for i, p in enumerate(self.adapter.parameters())}
        return made | {f"head {n}": p for n, p in (self.head.named_parameters() if self.head else ())}

    def peers(self) -> list[torch.nn.Parameter]:
        """PEFT's parameters, in the order of `parameters`."""
        found = []
        for name in self.parameters():
            stem, _, part = name.rpartition(" ")
            if stem == "head":
                found.append(self._head_peers()[part])
            elif stem == "prefix":
                found.append(self._prefix_peers()[int(part)])
            else:
                keys = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
                found.append(self.peft[f"base_model.model.{stem}.{keys[part]}"])
        return found


def peft_gradients(wrapped: Any, twin: Twin, examples: Sequence[Example]) -> tuple[float, list[torch.Tensor]]:
    """The summed cross-entropy that plain PEFT and plain torch give on the same padded batch, and its gradients."""
    wrapped.zero_grad()
    ids, mask = _pad([e.ids for e in examples], 0)
    labels, _ = _pad([e.labels for e in examples], IGNORED)
    if twin.base.kind == "causal":
        logits, labels = wrapped(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]
    elif twin.base.kind == "seq2seq":
        given = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1].clamp(min=0)], 1)
        logits = wrapped(input_ids=ids, attention_mask=mask, decoder_input_ids=given).logits
    else:
        logits, labels = wrapped(input_ids=ids, attention_mask=mask).logits, labels[:, 0]
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    loss.backward()
    return float(loss.detach()), [p.grad for p in twin.peers()]


def _pad(rows: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[value] * (width - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return ids, mask


def assert_gradients_equal(
    ours: Sequence[tuple[str, torch.Tensor]], theirs: Sequence[torch.Tensor], relative: float
) -> None:
    """Each gradient equal to `relative` of its own largest value, and none of them all zero."""
    for (name, own), other in zip(ours, theirs, strict=True):
        assert own is not None, f"{name} has no gradient"
        assert other is not None
        scale = float(other.abs().max())
        assert scale > 1e-9, f"the reference gradient of {name} is zero"
        error = float((own - other).abs().max()) / scale
        assert error <= relative, f"{name}: gradient off by {error:.2e} of its largest value"


@contextmanager
def precision(monkeypatch: Any) -> Iterator[None]:
    """Let bases load in float64, which users cannot ask for."""
    from adapterhub_lite.bases.devices import DTYPES

    with monkeypatch.context() as patch:
        patch.setitem(DTYPES, "float64", torch.float64)
        yield
