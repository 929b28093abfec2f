"""A forward pass of our own for decoders built as Llama is: fewer and larger products, one shared key-value window.

transformers' forward of a small model spends as long between the products as in them. This one computes q, k, v in one
product and gate, up in another (weights laid side by side, the modules' own weights become views), writes keys and
values in place, and asks the plan for the changes of a whole group of layers at once. It is used only where it gives
what the model itself gives on a probe (`decoder_of`); any other model runs through its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..bases.llama import FAMILIES, rope_follows_length
from ..bases.load import Base
from .batch import BatchPlan
from .changes import Changes, NativeChanges, changes_of
from .native import native_forward
from .products import Site, pack_sites
from .window import Window, WindowShape

_PROBE_TOKENS = 12
# Largest difference of a logit from the model's own forward, as a share of the largest logit: rounding, not meaning.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Layer:
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
        self.sites = [self.lm_head, *(site for x in self.layers for site in (x.qkv, x.out, x.gate_up, x.down))]
        pack_sites(self.sites, base.dtype)
        self._groups = {site.modules for site in self.sites}
        self.native = native_forward(self)

    def knows(self, plan: BatchPlan) -> bool:
        """Whether all layers that a plan changes are layers of this forward."""
        known = all(group in self._groups for row in plan.rows if row is not None for group in row.packs)
        return known and plan.injected is None

    def new_window(self, rows: int, columns: int) -> Window:
        """An empty window for this base."""
        return Window(self.shape, rows, columns, self.base.device, self.base.dtype)

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        window: Window,
        changes: Changes,
        mask: torch.Tensor | None,
        *,
        every: bool = False,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] after the last of the new tokens; [rows, t, vocabulary] if after `every` one.

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
            x = x + self._attend(layer, i, layer.before(x), turn, window, changes, mask)
            hidden = layer.gate_up(layer.after(x), changes)
            gate, up = hidden.chunk(2, -1)
            x = x + layer.down(layer.act(gate) * up, changes)
        return self.lm_head(self.norm(x if every else x[:, -1]), changes)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, window: Window, changes: Changes) -> torch.Tensor:
        """Logits [rows, vocabulary] after one more token a row, whose column the window has been extended by.

        Args:
            tokens, positions: [rows].
        """
        if self.native is not None and isinstance(changes, NativeChanges) and len(tokens) <= self.native.most_tokens:
            return self.native.step(tokens, positions, window, changes)
        mask = window.mask()
        mask = None if mask is None else mask[:, None, None, :]
        return self(tokens[:, None], positions[:, None], window, changes, mask)

    def _attend(
        self,
        layer: Layer,
        i: int,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        window: Window,
        changes: Changes,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        rows, new = x.shape[:2]
        both = self.heads + self.kv_heads
        heads = layer.qkv(x, changes).view(rows, new, both + self.kv_heads, self.head_dim)
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
        return layer.out(seen.reshape(rows, new, -1), changes)


def decoder_of(base: Base) -> Decoder | None:
    """Our forward of a base, or None where it has none or does not give what the model's own forward gives."""
    if "decoder" not in base.derived:
        base.derived["decoder"] = _make(base)
    return base.derived["decoder"]  # type: ignore[no-any-return]


def _make(base: Base) -> Decoder | None:
    config = base.config
    if base.kind != "causal" or config.model_type not in FAMILIES:
        return None
    if _slides(config) or rope_follows_length(config):
        return None
    decoder = Decoder(base)
    return decoder if _agrees(base, decoder) else None


def _slides(config: Any) -> bool:
    """Whether some token of a text that the model can take does not see all tokens before it."""
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return True
    window = getattr(config, "sliding_window", None)
    return window is not None and int(window) < int(config.max_position_embeddings)


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
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
        after = decoder.step(ids[:, -1].to(base.device), positions, window, changes_of(base, plan))
        expected = base.model(input_ids=ids.to(base.device)).logits[:, -2:].float()
    bound = BOUNDS.get(base.dtype, 0.0) * float(expected.abs().max())
    differences = (logits.float() - expected[:, 0]).abs().max(), (after.float() - expected[:, 1]).abs().max()
    return all(float(d) <= bound for d in differences)
