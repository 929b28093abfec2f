"""Gradients of adapters on encoders built as BERT is, by hand: no padding, and no autograd but in heads.

The tokens of many rows, of one or several learners, go through the layers one after another; after the last attention
only those that a head reads go on. Dropout, the base's own too, is a pure function of row, token and place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...bases.load import Base
from ...errors import CapacityError
from ...kernels.training import available
from ...kernels.training_attention import LARGEST_DIM
from ...tasks.task import IGNORED
from ..computation import Learner, Load, Row, Settings, Sums
from ..decoder.changes import Changes
from ..decoder.lora import Tokens, Tools
from ..memory.buffers import Buffers
from ..modules.dropout import Dropping
from ..modules.lines import Lines, Run, Segment
from ..modules.passes import cross_entropy
from ..packs import Pack, Piece, load_of, placed
from .layer import PLACES, Layer, Scene
from .native import NativeEncoderOps
from .ops import Drop, EncoderOps, Rows
from .packs import encoder_packs, read_places
from .parts import EncoderParts, parts_of
from .whole import WholeLayers, reads_whole

# Largest difference of what heads read from the model's own forward, as a share of the largest: rounding, not meaning.
_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
_PROBE_LENGTHS = (12, 5, 1, 12)
# Places in which something is dropped after the layers' own, see `encoder_layer.PLACES`.
_EMBEDDED, _PROJECT, _POOL, _READ = range(4)


_Segments = tuple[tuple[int, int, int], ...]


class FusedEncoder:
    """A `Computation` for what `encoder_parts.not_covered` finds covered."""

    name = "fused encoder"
    padded = False
    on_host = 0

    def __init__(
        self,
        base: Base,
        learners: Sequence[Learner],
        settings: Settings,
        *,
        parts: EncoderParts | None = None,
        ops: EncoderOps | None = None,
    ) -> None:
        self.why = "the base is built as BERT is, and all adapters change its layers only"
        self._base, self._learners, self._settings = base, tuple(learners), settings
        self._parts = parts or parts_of(base, learners[0].task_type)
        self._ops = ops or ops_for(base)
        trainables = [learner.trainable for learner in learners]
        last = PLACES * len(self._parts.layers)
        self._project = (
            None if self._parts.project is None else Changes(self._parts.project, trainables, last + _PROJECT)
        )
        self._pool = None if self._parts.pool is None else Changes(self._parts.pool, trainables, last + _POOL)
        below = self._project is not None and bool(self._project.learners)
        trained = self._parts.trained(trainables)
        self._lowest = -1 if below else min(trained, default=len(self._parts.layers))
        native = isinstance(self._ops, NativeEncoderOps) and not settings.checkpoint and bool(trained)
        whole = native and reads_whole(self._parts, trainables)
        self._whole = WholeLayers(self._parts, trainables, self._lowest) if whole else None
        # Each of these has memory of its own, which the native call has no use for.
        self._layers = [] if whole else [Layer(self._parts, i, trainables) for i in range(len(self._parts.layers))]
        self._buffers = Buffers(base.device, base.dtype)
        self._run = Run()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that packs so far have asked for."""
        return self._buffers.nbytes + (self._whole.nbytes if self._whole else 0)

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation`."""
        self._set_heads(self._settings.dropout_of_base)
        try:
            with torch.no_grad():
                for change in self._changes():
                    for group in change.learners.values():
                        group.read()
                found = self._over(rows, True)
                for change in self._changes():
                    for group in change.learners.values():
                        group.give()
        finally:
            self._set_heads(False)
        return found

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation`."""
        self._set_heads(False)
        with torch.no_grad():
            for change in self._changes():
                for group in change.learners.values():
                    group.read()
            return self._over(rows, False)

    def loads(self, rows: Sequence[Row], training: bool = True) -> list[Load]:
        """See `Computation`."""
        packs = encoder_packs(placed(rows), self._settings.pack_tokens, self._parts.tags)
        return [load_of(pack.pieces) for pack in packs]

    def tokens(self, row: Row) -> int:
        """See `Computation`."""
        return len(row.example.ids)

    def release(self) -> None:
        """See `Computation`."""
        self._buffers.clear()

    def read(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """What a head reads of each text (a tagger's: of its first token) without dropout [texts, width]."""
        pieces = [Piece(0, 0, 0, tuple(ids), (0,) if not self._parts.tags else _first(len(ids))) for ids in texts]
        with torch.no_grad():
            scene, ids = self._scene(Pack(tuple(pieces)), False)
            x, _ = self._forward(scene, ids)
            return self._pooled(scene, x)[0].clone()

    def _set_heads(self, mode: bool) -> None:
        for learner in self._learners:
            if learner.head is not None:
                learner.head.train(mode)

    def _changes(self) -> list[Changes]:
        """Those whose parameters are to be read for a step."""
        found = [change for layer in self._layers for change in layer.changes]
        return [*found, *(one for one in (self._project, self._pool) if one is not None)]

    def _over(self, rows: Sequence[Row], training: bool) -> list[Sums]:
        sums = [Sums() for _ in self._learners]
        for pack in encoder_packs(rows, self._settings.pack_tokens, self._parts.tags):
            self._one(pack, sums, training)
        for row in rows:
            sums[row.learner].tokens += len(row.example.ids)
        return sums

    def _one(self, pack: Pack, sums: list[Sums], training: bool) -> None:
        """Losses of a pack, and with `training` its gradients."""
        scene, ids = self._scene(pack, training)
        x, entries = self._forward(scene, ids)
        pooled, hidden = self._pooled(scene, x)
        grad = self._head_losses(pack, scene, pooled, sums, training)
        if not training:
            return
        if self._pool is not None:
            grad = self._pool_back(scene, x, hidden, pooled, grad)
        if self._lowest == len(self._parts.layers):
            return
        self._backward(scene, entries, grad)

    def _forward(self, scene: Scene, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the last layer gives for tokens that are read, and what each layer read."""
        x = self._embed(scene, ids)
        if self._whole:
            return self._whole.forward(scene, x), [x]
        entries = []
        for layer in self._layers:
            entries.append(x)
            x = layer.forward(scene, x, self._keep(layer, scene.tools.training))
            if self._settings.checkpoint and not layer.last:
                kept = self._buffers(f"entry {layer.index + 1}", *x.shape)
                x = kept.copy_(x)
        return x, entries

    def _keep(self, layer: Layer, training: bool) -> str:
        """Layers that nothing is kept of share their memory, but what one reads of the other."""
        if not training or layer.index < self._lowest:
            return f"of {layer.index % 2}"
        return "again" if self._settings.checkpoint else str(layer.index)

    def _backward(self, scene: Scene, entries: Sequence[torch.Tensor], grad: torch.Tensor) -> None:
        below: torch.Tensor | None = grad
        if self._whole:
            below = None if self._lowest >= 0 else self._buffers("below", *entries[0].shape)
            self._whole.backward(scene, entries[0], grad.contiguous(), below)
            return self._project_back(scene, below)
        for layer in reversed(self._layers[max(self._lowest, 0) :]):
            assert below is not None
            x, keep = entries[layer.index], self._keep(layer, True)
            if self._settings.checkpoint and not layer.last:
                layer.forward(scene, x, keep)
            below = layer.backward(scene, x, below, keep, layer.index == self._lowest)
        self._project_back(scene, below)

    def _project_back(self, scene: Scene, below: torch.Tensor | None) -> None:
        if self._project is not None and below is not None:
            embedded = self._buffers("embedded", scene.tokens.count, self._project.frozen.n_in)
            hidden = self._buffers("hidden project", scene.tokens.count, self._project.rank)
            self._project.back(below, embedded, hidden, None, scene.tokens, scene.tools)

    def _embed(self, scene: Scene, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of tokens [tokens, width], which no adapter changes."""
        parts, tokens = self._parts, scene.tokens
        embeddings = parts.embeddings
        x = F.embedding(ids, embeddings.word_embeddings.weight)
        kinds = getattr(embeddings, "token_type_embeddings", None)
        x = x if kinds is None else x + kinds.weight[0]
        x = x + F.embedding(tokens.indices + parts.first_position, embeddings.position_embeddings.weight)
        x = torch.as_tensor(embeddings.LayerNorm(x))
        salt = PLACES * len(self._parts.layers)
        if scene.drops and parts.drop_embedded:
            self._ops.drop(x, tokens.keys, tokens.indices, salt + _EMBEDDED, parts.drop_embedded, x)
        if self._project is None:
            return x
        embedded = self._buffers("embedded", *x.shape).copy_(x)
        out = self._buffers("entry 0", tokens.count, parts.width)
        hidden = self._buffers("hidden project", tokens.count, self._project.rank)
        self._project.forward(embedded, out, hidden, tokens, scene.tools)
        return out

    def _pooled(self, scene: Scene, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a head reads [read tokens, width], and A x of the pooling layer."""
        if self._pool is None:
            return x, None
        out = self._buffers("pooled", len(x), self._pool.frozen.n_out)
        hidden = self._buffers("hidden pool", len(x), self._pool.rank)
        self._pool.forward(x, out, hidden, scene.read, scene.tools)
        return (out.tanh_() if self._parts.pool_act == "tanh" else out.relu_()), hidden

    def _pool_back(
        self, scene: Scene, x: torch.Tensor, hidden: torch.Tensor | None, pooled: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        assert self._pool is not None
        assert hidden is not None
        slope = grad * (1 - pooled.square() if self._parts.pool_act == "tanh" else (pooled > 0).to(grad.dtype))
        below = self._buffers("pool slope", *x.shape)
        self._pool.back(slope, x, hidden, below, scene.read, scene.tools)
        return below

    def _head_losses(
        self, pack: Pack, scene: Scene, pooled: torch.Tensor, sums: list[Sums], training: bool
    ) -> torch.Tensor:
        """Sums of each learner's losses; gives the gradient of what heads read, zeros without `training`."""
        wanted = torch.tensor([t for p in pack.pieces for t in p.targets if t != IGNORED], device=self._base.device)
        leaf = pooled.detach().requires_grad_(training)
        drops = Drop(scene.read.keys, scene.read.indices, _READ, self._parts.drop_read if scene.drops else 0.0)
        total: Any = 0.0
        with torch.set_grad_enabled(training):
            for begin, end, learner in scene.read.segments:
                if begin == end:
                    continue
                lines = Lines(drops.keys[begin:end], drops.indices[begin:end], (Segment(0, end - begin, learner),))
                logits = self._logits(learner, leaf[begin:end], lines, drops.p)
                loss = cross_entropy(logits, wanted[begin:end])
                total = total + loss
                mine = sums[learner]
                mine.total += float(loss.detach())
                mine.count += end - begin
                mine.hits = (mine.hits or 0) + int((logits.argmax(-1) == wanted[begin:end]).sum())
        if training and isinstance(total, torch.Tensor):
            total.backward()  # type: ignore[no-untyped-call]
        return leaf.grad if leaf.grad is not None else torch.zeros_like(pooled)

    def _logits(self, learner: int, x: torch.Tensor, lines: Lines, p: float) -> torch.Tensor:
        head: Any = self._learners[learner].head
        x = x.to(next(head.parameters()).dtype)
        if not self._parts.tags and self._parts.pool is None:
            x = x[:, None]  # such a head takes the first token of a sequence by itself
        if not head.training:
            return head(x)  # type: ignore[no-any-return]
        self._run.rows, self._run.known = (), {len(lines.keys): lines}
        with Dropping(self._run, PLACES * (len(self._parts.layers) + 1)):
            return head(F.dropout(x, p))  # type: ignore[no-any-return]

    def _scene(self, pack: Pack, training: bool) -> tuple[Scene, torch.Tensor]:
        device = self._base.device
        lengths = [len(piece.ids) for piece in pack.pieces]
        places, counts, segments, asked = read_places(pack)
        keys = torch.tensor([piece.key for piece in pack.pieces]).repeat_interleave(torch.tensor(lengths)).to(device)
        indices = torch.cat([torch.arange(n) for n in lengths]).to(device)
        chosen = torch.tensor(places, dtype=torch.int64, device=device)
        tokens = Tokens(sum(lengths), segments, keys, indices)
        read = Tokens(len(places), asked, keys[chosen], indices[chosen])
        every = Rows(lengths, lengths, keys, indices)
        some = Rows(counts, lengths, read.keys, read.indices)
        drops = training and self._settings.dropout_of_base
        tools = Tools(self._ops, self._buffers, training)
        ids = torch.tensor([i for piece in pack.pieces for i in piece.ids], device=device)
        if max(lengths) > self._parts.positions:
            raise CapacityError(
                f"A text has {max(lengths)} tokens, this base has {self._parts.positions} positions.",
                "Lower training.max_length.",
            )
        return Scene(tools, self._ops, tokens, read, chosen, every, some, drops), ids


def _first(length: int) -> tuple[int, ...]:
    return (0, *[IGNORED] * (length - 1))


def ops_for(base: Base) -> EncoderOps:
    """The fastest element-wise work for where a base computes."""
    fits = base.device.type == "cpu" and base.dtype == torch.float32 and available()
    width = int(base.config.hidden_size) // int(base.config.num_attention_heads)
    return NativeEncoderOps() if fits and width % 16 == 0 and width <= LARGEST_DIM else EncoderOps()


def agrees(base: Base, parts: EncoderParts) -> bool:
    """Whether what heads read is what the model's own forward gives, for rows of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    kind = "TOKEN_CLS" if parts.tags else "SEQ_CLS"
    lengths = [min(n, parts.positions) for n in _PROBE_LENGTHS]
    texts = [torch.randint(0, int(base.config.vocab_size), (n,), generator=generator).tolist() for n in lengths]
    probe = FusedEncoder(base, [Learner(_Nothing(), None, kind)], Settings(), parts=parts)  # type: ignore[arg-type]
    found = probe.read(texts)
    own = torch.cat([_own(base, parts, kind, ids) for ids in texts])
    if found.shape != own.shape or not bool(torch.isfinite(found).all()):
        return False
    return float((found - own).abs().max()) <= _BOUNDS.get(base.dtype, 0.0) * float(own.abs().max())


class _Nothing:
    """A trainable that changes nothing."""

    def parameters(self) -> list[nn.Parameter]:
        return []


def _own(base: Base, parts: EncoderParts, kind: str, ids: Sequence[int]) -> torch.Tensor:
    """What the model's own head would be given for one text [1, width]."""
    from ..modules.passes import EncoderPass

    view = base.view(kind)
    stand_in = Learner(_Nothing(), nn.Linear(1, 1, dtype=base.dtype), kind)  # type: ignore[arg-type]
    run = Run()
    piece = Piece(0, 0, 0, tuple(ids), _first(len(ids)) if parts.tags else (0,))
    with torch.no_grad():
        return EncoderPass(base, view.model, view.head, [stand_in], lambda rows: None).features([piece], run)
