"""A forward pass of our own for decoders built as Llama is: fewer and larger products, one shared key-value window.

transformers' forward of a small model spends as long between the products as in them. This one computes q, k, v in one
product and gate, up in another (weights laid side by side, the modules' own weights become views), writes keys and
values in place, and asks the plan for the changes of a whole group of layers at once. It is used only where it gives
what the model itself gives on a probe (`decoder_of`); any other model runs through its own forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.pack import Group
from ..adapters.sites import features
from ..bases.fused import fuse
from ..bases.load import Base
from .batch import BatchPlan
from .sites import GroupChange
from .window import Window, WindowShape

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_PROBE_TOKENS = 12
# Largest difference of a logit from the model's own forward, as a share of the largest logit: rounding, not meaning.
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class Site:
    """Layers of one input, computed as one product where their weights allow it, and changed as the plan says."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules: Group = modules
        self._fused = fuse(modules)
        self._biases = [getattr(module, "bias", None) for module in modules]
        self._widths = [features(module)[1] for module in modules]

    def __call__(self, x: torch.Tensor, changes: Mapping[Group, GroupChange]) -> torch.Tensor:
        """x [rows, ..., in] -> [rows, ..., out of all layers]."""
        if self._fused is not None:
            out = F.linear(x, self._fused.weight, self._fused.bias)
        else:
            parts = [module(x) for module in self.modules]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        change = changes.get(self.modules)
        if change is not None:
            change.apply(x, (out,) if len(self.modules) == 1 else torch.split(out, self._widths, -1), self._biases)
        return out


@dataclass(frozen=True)
class _Layer:
    """The parts of one decoder layer."""

    before: nn.Module
    qkv: Site
    norms: tuple[nn.Module | None, nn.Module | None]
    out: Site
    after: nn.Module
    gate_up: Site
    act: nn.Module
    down: Site


class Decoder:
    """The forward of one base. Shapes: rows = batch rows, t = new tokens a row."""

    def __init__(self, base: Base) -> None:
        model: Any = base.model
        self.base = base
        config = base.config
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        inner = model.model
        self.scaling = float(inner.layers[0].self_attn.scaling)
        self.embed, self.rotary, self.norm, self.lm_head = (
            inner.embed_tokens,
            inner.rotary_emb,
            inner.norm,
            Site(model.lm_head),
        )
        self.layers = [_layer(layer) for layer in inner.layers]
        self.shape = WindowShape(len(self.layers), self.kv_heads, self.head_dim)
        self._groups = {f.modules for x in self.layers for f in (x.qkv, x.out, x.gate_up, x.down)}
        self._groups.add(self.lm_head.modules)

    def knows(self, plan: BatchPlan) -> bool:
        """Whether all layers that a plan changes are layers of this forward."""
        return set(plan.groups) <= self._groups

    def new_window(self, rows: int, columns: int) -> Window:
        """An empty window for this base."""
        return Window(self.shape, rows, columns, self.base.device, self.base.dtype)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, window: Window, plan: BatchPlan, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after the last of the new tokens.

        Args:
            ids, positions: [rows, t]; the last t columns of the window are written.
            mask: [rows, 1, t, columns], True where a new token sees a column; None: every token sees every column.
        """
        x = self.embed(ids)
        cos, sin = self.rotary(x, positions)
        half = self.head_dim // 2
        turn = cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]
        if mask is not None:
            mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)
        for i, layer in enumerate(self.layers):
            x = x + self._attend(layer, i, layer.before(x), turn, window, plan, mask)
            hidden = layer.gate_up(layer.after(x), plan.groups)
            gate, up = hidden.chunk(2, -1)
            x = x + layer.down(layer.act(gate) * up, plan.groups)
        return self.lm_head(self.norm(x[:, -1]), plan.groups)

    def _attend(
        self,
        layer: _Layer,
        i: int,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        window: Window,
        plan: BatchPlan,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        rows, new = x.shape[:2]
        both = self.heads + self.kv_heads
        heads = layer.qkv(x, plan.groups).view(rows, new, both + self.kv_heads, self.head_dim)
        turned = heads[:, :, :both]
        if layer.norms[0] is not None and layer.norms[1] is not None:
            turned = torch.cat(
                [layer.norms[0](heads[:, :, : self.heads]), layer.norms[1](heads[:, :, self.heads : both])], 2
            )
        turned = torch.addcmul(turned * turn[0], turned.roll(self.head_dim // 2, -1), turn[1])
        begin, end = window.end - new, window.end
        keys, values = window.keys[i], window.values[i]
        keys[:, :, begin:end] = turned[:, :, self.heads :].transpose(1, 2)
        values[:, :, begin:end] = heads[:, :, both:].transpose(1, 2)
        # The query heads of one key head are taken for more queries of it, so that keys are not repeated.
        queries = turned[:, :, : self.heads].transpose(1, 2).reshape(rows, self.kv_heads, -1, self.head_dim)
        seen = F.scaled_dot_product_attention(
            queries, keys[:, :, :end], values[:, :, :end], attn_mask=mask, scale=self.scaling
        )
        seen = seen.view(rows, self.heads, new, self.head_dim).transpose(1, 2)
        return layer.out(seen.reshape(rows, new, -1), plan.groups)


def decoder_of(base: Base) -> Decoder | None:
    """Our forward of a base, or None where it has none or does not give what the model's own forward gives."""
    if "decoder" not in base.derived:
        base.derived["decoder"] = _make(base)
    return base.derived["decoder"]  # type: ignore[no-any-return]


def _make(base: Base) -> Decoder | None:
    config = base.config
    if base.kind != "causal" or config.model_type not in _FAMILIES:
        return None
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or _slides(config):
        return None
    decoder = Decoder(base)
    return decoder if _agrees(base, decoder) else None


def _slides(config: Any) -> bool:
    return config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm,
        Site(attention.q_proj, attention.k_proj, attention.v_proj),
        (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)),
        Site(attention.o_proj),
        layer.post_attention_layernorm,
        Site(mlp.gate_proj, mlp.up_proj),
        mlp.act_fn,
        Site(mlp.down_proj),
    )


def _agrees(base: Base, decoder: Decoder) -> bool:
    """Whether both forwards give the same next-token logits for a prompt, and for one more token after it."""
    from .prefill import prefill

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(base.config.vocab_size), (2, _PROBE_TOKENS), generator=generator)
    plan = BatchPlan((None, None), (), None, base.device)
    with torch.inference_mode():
        logits, window, positions = prefill(decoder, ids[:, :-1].tolist(), plan)
        window.extend()
        after = decoder(ids[:, -1:].to(base.device), positions[:, None], window, plan, None)
        expected = base.model(input_ids=ids.to(base.device)).logits[:, -2:].float()
    bound = _BOUNDS.get(base.dtype, 0.0) * float(expected.abs().max())
    differences = (logits.float() - expected[:, 0]).abs().max(), (after.float() - expected[:, 1]).abs().max()
    return all(float(d) <= bound for d in differences)
