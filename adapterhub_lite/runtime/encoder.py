"""A forward pass of our own for encoders built as BERT is: no padding, every adapter's rows side by side.

transformers' forward computes every row as long as the longest. This one lays the tokens of all rows one after another,
x [tokens, hidden], sorted by adapter and length: layers see real tokens only, an adapter's change is two plain products
on a slice of x, and rows of one length attend in one call, without a mask. After the last attention only the tokens
that some head reads go on. It is used only where it gives what the model itself gives on a probe (`encoder_of`); any
other model runs through its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.fit import Fitted
from ..adapters.pack import Group
from ..bases.load import Base
from .batch import BatchPlan
from .decoder import BOUNDS
from .native_encoder import native_encoder
from .prompting import position_limit
from .side_by_side import Layout, Run, Span, SpanSite, lay_out, tags_tokens

# Families whose position ids begin after the padding token's id; the others' begin at 0.
_COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
_FAMILIES = ("bert", "electra", "distilbert", *_COUNTS_FROM_PADDING)
_PROBE_LENGTHS = (12, 5, 1, 12)


@dataclass(frozen=True)
class Layer:
    """The parts of one encoder layer; the last layer has q and k, v apart, since fewer tokens need a q."""

    qkv: tuple[SpanSite, ...]
    out: SpanSite
    attended: nn.Module
    up: SpanSite
    act: nn.Module
    down: SpanSite
    norm: nn.Module

    @property
    def sites(self) -> tuple[Group, Group, Group, Group]:
        """The linear layers, by input: q, k and v; out; up; down."""
        three = tuple(module for site in self.qkv for module in site.modules)
        return three, self.out.modules, self.up.modules, self.down.modules


class Encoder:
    """The forward of one base."""

    def __init__(self, base: Base) -> None:
        model: Any = base.view("SEQ_CLS").model
        self.base = base
        inner = model.base_model
        self._takes_prefixes = base.config.model_type != "distilbert"
        layers = inner.encoder.layer if self._takes_prefixes else inner.transformer.layer
        self.layers = [_layer(layer, layer is layers[-1]) for layer in layers]
        self.heads = int(base.config.num_attention_heads)
        attention = layers[0].attention
        self.scaling = float((attention.self if self._takes_prefixes else attention).scaling)
        self.embeddings = inner.embeddings
        project = getattr(inner, "embeddings_project", None)
        self.project = None if project is None else SpanSite(project)
        self.pool, self.pool_act = _pool(model)
        self.first_position = 0
        if base.config.model_type in _COUNTS_FROM_PADDING:
            self.first_position = int(base.config.pad_token_id) + 1
        sites = [site for x in self.layers for site in (*x.qkv, x.out, x.up, x.down)]
        sites += [site for site in (self.project, self.pool) if site is not None]
        self._alone = {site.modules[0] for site in sites if len(site.modules) == 1}
        self._known = {module for site in sites for module in site.modules}
        self.native = native_encoder(self)

    def knows(self, plan: BatchPlan, rows: Sequence[list[int]]) -> bool:
        """Whether all layers that a plan changes are layers of this forward, and all rows fit its positions."""
        limit = position_limit(self.base)
        if plan.injected is not None:
            return False
        for row, ids in zip(plan.rows, rows, strict=True):
            if row is None or row.head is None:
                continue
            if not ids or (limit is not None and len(ids) + row.virtual_tokens > limit):
                return False
            if row.prefix is not None and not self._takes_prefixes:
                return False
            for module, site in row.sites.items():
                if module not in (self._known if site.scale is None else self._alone):
                    return False
        return True

    def __call__(self, plan: BatchPlan, rows: Sequence[list[int]]) -> list[torch.Tensor]:
        """What each row's own head gives, as `class_logits` says."""
        layout = lay_out(plan, rows, self.base.device)
        native = self.native if self.native is not None and self.native.knows(plan) else None
        positions = self._positions(layout)
        if native is not None and native.embeds(layout, positions):
            x = native(([i for row in layout.ids for i in row], positions), layout, plan)
        else:
            x = self._embed(layout, positions)
            x = native(x, layout, plan) if native is not None else self._layers(x, layout)
        found = [x.new_empty(0) for _ in rows]
        for i, made in zip(layout.order, self._labels(x, layout.runs), strict=True):
            found[i] = made
        return found

    def _layers(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """What leaves the last layer at the tokens that heads read, by torch."""
        for i, layer in enumerate(self.layers[:-1]):
            q, k, v = layer.qkv[0](x, layout.spans).chunk(3, -1)
            seen = self._attend(i, q, k, v, layout, read=False)
            x = _after_attention(layer, x, seen, layout.spans)
        layer = self.layers[-1]
        k, v = layer.qkv[1](x, layout.spans).chunk(2, -1)
        x = x if layout.read is None else x.index_select(0, layout.read)
        seen = self._attend(len(self.layers) - 1, layer.qkv[0](x, layout.read_spans), k, v, layout, read=True)
        return _after_attention(layer, x, seen, layout.read_spans)

    def _positions(self, layout: Layout) -> list[int]:
        positions: list[int] = []
        for run in layout.runs:
            first = self.first_position + (run.fitted.prefix.tokens if run.fitted.prefix else 0)
            positions += [*range(first, first + run.length)] * run.rows
        return positions

    def _embed(self, layout: Layout, positions: Sequence[int]) -> torch.Tensor:
        """What the layers are given [tokens, hidden]: virtual tokens and texts."""
        embeddings, device = self.embeddings, self.base.device
        x = embeddings.word_embeddings(torch.tensor([i for row in layout.ids for i in row], device=device))
        if any(run.fitted.prompt for run in layout.runs):
            texts = x.split([run.rows * run.tokens for run in layout.runs])
            x = torch.cat([_behind(run, text) for run, text in zip(layout.runs, texts, strict=True)])
        kinds = getattr(embeddings, "token_type_embeddings", None)
        x = x if kinds is None else x + kinds.weight[0]
        x = x + embeddings.position_embeddings(torch.tensor(positions, device=device))
        x = cast(torch.Tensor, embeddings.LayerNorm(x))
        return x if self.project is None else self.project(x, layout.spans)

    def _attend(
        self, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, *, read: bool
    ) -> torch.Tensor:
        """Attention of layer i, each row among its own tokens and prefix -> [tokens of q, hidden].

        Args:
            q: of all tokens, or of those that heads read.
        """
        parts, begin = [], 0
        for run in layout.runs:
            queries = run.read if read else run.length
            mine = self._by_heads(q, begin, run.rows, queries)
            keys, values = (self._by_heads(t, run.begin, run.rows, run.length) for t in (k, v))
            prefix = run.fitted.prefix
            if prefix is not None:
                before = (t[i].expand(run.rows, -1, -1, -1) for t in (prefix.keys, prefix.values))
                keys, values = (torch.cat(both, 2) for both in zip(before, (keys, values), strict=True))
            seen = F.scaled_dot_product_attention(mine, keys, values, scale=self.scaling)
            parts.append(seen.transpose(1, 2).reshape(run.rows * queries, -1))
            begin += run.rows * queries
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _by_heads(self, x: torch.Tensor, begin: int, rows: int, length: int) -> torch.Tensor:
        """[rows, heads, length, head_dim] of neighbouring rows, as a view of x [tokens, hidden]."""
        return x[begin : begin + rows * length].view(rows, length, self.heads, -1).transpose(1, 2)

    def _labels(self, x: torch.Tensor, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        """What the heads make of the tokens they read, row by row."""
        begin = 0
        for _, some in groupby(runs, key=lambda run: run.fitted.digest):
            here = list(some)
            fitted, lengths = here[0].fitted, [run.read for run in here for _ in range(run.rows)]
            mine = x[begin : begin + sum(lengths)]
            begin += sum(lengths)
            head: Any = fitted.head
            dtype = next(head.parameters()).dtype
            if tags_tokens(fitted):
                yield from head(mine.to(dtype)).split(lengths)
            elif self.pool is not None:
                yield from head(self.pool_act(self.pool(mine, [Span(0, len(mine), fitted)])).to(dtype))
            else:
                yield from head(mine[:, None].to(dtype))


def encoder_of(base: Base) -> Encoder | None:
    """Our forward of a base, or None where it has none or does not give what the model's own forward gives."""
    if "encoder" not in base.derived:
        base.derived["encoder"] = _make(base)
    return base.derived["encoder"]  # type: ignore[no-any-return]


def _make(base: Base) -> Encoder | None:
    config = base.config
    if base.kind != "encoder" or config.model_type not in _FAMILIES or base.device.type != "cpu":
        return None
    encoder = Encoder(base)
    return encoder if _agrees(base, encoder) else None


def _behind(run: Run, texts: torch.Tensor) -> torch.Tensor:
    """A run's texts [tokens, hidden], each behind the virtual tokens of the run's adapter."""
    prompt = run.fitted.prompt
    if prompt is None:
        return texts
    virtual = prompt.embeddings.to(texts).expand(run.rows, -1, -1)
    return torch.cat([virtual, texts.view(run.rows, run.tokens, -1)], 1).flatten(0, 1)


def _layer(layer: Any, last: bool) -> Layer:
    attention = layer.attention
    if hasattr(layer, "ffn"):  # DistilBERT's names
        three = attention.q_lin, attention.k_lin, attention.v_lin
        out, attended = attention.out_lin, layer.sa_layer_norm
        up, act, down, norm = layer.ffn.lin1, layer.ffn.activation, layer.ffn.lin2, layer.output_layer_norm
    else:
        three = attention.self.query, attention.self.key, attention.self.value
        out, attended = attention.output.dense, attention.output.LayerNorm
        up, act = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        down, norm = layer.output.dense, layer.output.LayerNorm
    qkv = (SpanSite(three[0]), SpanSite(*three[1:])) if last else (SpanSite(*three),)
    return Layer(qkv, SpanSite(out), attended, SpanSite(up), act, SpanSite(down), norm)


def _pool(model: Any) -> tuple[SpanSite | None, nn.Module]:
    """What stands between the first token and a classifier's head."""
    if model.config.model_type == "bert":
        return SpanSite(model.base_model.pooler.dense), model.base_model.pooler.activation
    if model.config.model_type == "distilbert":
        return SpanSite(model.pre_classifier), nn.ReLU()
    return None, nn.Identity()


def _after_attention(layer: Layer, x: torch.Tensor, seen: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    x = layer.attended(layer.out(seen, spans).add_(x))
    made: torch.Tensor = layer.norm(layer.down(layer.act(layer.up(x, spans)), spans).add_(x))
    return made


def _agrees(base: Base, encoder: Encoder) -> bool:
    """Whether both forwards give the same logits, of classifiers and of taggers, for rows of unlike lengths."""
    from .forward import model_logits
    from .sites import SiteHooks

    generator = torch.Generator().manual_seed(0)
    slot = base.view("SEQ_CLS").head
    assert slot is not None
    head = slot.build(slot.fresh(3, generator, 0.5)).to(base.device, base.dtype)
    width, limit = int(base.config.hidden_size), position_limit(base)
    # Without values of its own: those would be drawn from the process's random numbers.
    tagger = nn.Linear(width, 3, device="meta").to_empty(device="cpu")
    tagger.weight.data.normal_(0.0, width**-0.5, generator=generator)
    tagger.bias.data.zero_()
    heads = (("SEQ_CLS", head), ("TOKEN_CLS", tagger.to(base.device, base.dtype)))
    probes = [Fitted("probe", kind, kind, {}, None, one, 0) for kind, one in heads]
    lengths = [min(n, limit or n) for n in _PROBE_LENGTHS]
    rows = [torch.randint(0, int(base.config.vocab_size), (n,), generator=generator).tolist() for n in lengths]
    for probe in probes:
        plan = BatchPlan((probe,) * len(rows), (), None, base.device)
        with torch.inference_mode():
            found = torch.cat([one.flatten() for one in encoder(plan, rows)]).float()
        expected = torch.cat([one.flatten() for one in model_logits(base, SiteHooks(), plan, rows)]).float()
        if float((found - expected).abs().max()) > BOUNDS.get(base.dtype, 0.0) * float(expected.abs().max()):
            return False
    return True
