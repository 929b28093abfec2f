"""Gradients through a model's own forward: any model of transformers, by autograd.

The adapters' layers are functions of our own (`modules_sites`), each learner's on its own lines, so rows of several
learners share a forward. Rows are packed where the model lets attention be ours (`modules_attention`), else padded to
rows of like length. Dropout is a pure function of row, token and place (`modules_dropout`). What a model does with its
rows is found by trying it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...bases.inputs import PrefixRows
from ...bases.load import Base
from ...errors import Unsupported
from ..computation import Learner, Load, Row, Settings, Sums
from ..packs import Piece, load_of, make_packs, padded_load, placed
from ..trainable import TrainableLora, TrainablePrefix
from ..trainable_peft import TrainablePeft
from .attention import CannotPack, Spans, packed_attention
from .dropout import Dropless, Dropping
from .lines import Run, Strange
from .passes import CausalPass, EncoderPass, Loss, Pass, Seq2SeqPass
from .sites import FIRST_SITE, AdaptedSite, Part, replaced

_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_PROBE_LENGTHS = (7, 12)
# Layers that see tokens in groups of their own choice, or that see other rows.
_MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class ModuleComputation:
    """See `Computation`; `why` says why no faster one is used."""

    name = "layers of transformers"
    on_host = 0

    def __init__(self, base: Base, learners: Sequence[Learner], settings: Settings) -> None:
        self.why = ""
        self._base, self._learners, self._settings = base, list(learners), settings
        self._run = Run()
        self._dropping: Dropping | None = None
        view = base.view(learners[0].task_type) if base.kind == "encoder" else base.view()
        self._model: Any = _computing_model(view.model, learners)
        self._sites = self._make_sites()
        self._pass = self._make_pass(view)
        self._drops = settings.dropout_of_base and _drops(self._model, base.config)
        self._prefixed = any(isinstance(learner.trainable, TrainablePrefix) for learner in learners)
        mixture = any(getattr(base.config, key, None) for key in _MIXTURES)
        self._together = not self._prefixed and not mixture
        self._alone = False
        self._probe()

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation.gradients`."""
        for learner in self._learners:
            if learner.head is not None:
                learner.head.train(self._settings.dropout_of_base)
        try:
            with self._computing(dropping=True):
                return self._over(rows, _backward)
        finally:
            for learner in self._learners:
                if learner.head is not None:
                    learner.head.eval()

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        """See `Computation.losses`."""
        for learner in self._learners:
            if learner.head is not None:
                learner.head.eval()
        with torch.no_grad(), self._computing(dropping=False):
            return self._over(rows, lambda losses: None)

    @property
    def padded(self) -> bool:
        """See `Computation`."""
        return not self._pass.packs

    def loads(self, rows: Sequence[Row], training: bool = True) -> list[Load]:
        """See `Computation`."""
        answers = self._base.kind == "seq2seq"
        packs = self._packs(placed(rows), training)
        return [padded_load(pack, answers) if self.padded else load_of(pack) for pack in packs]

    def tokens(self, row: Row) -> int:
        """See `Computation`."""
        return len(row.example.ids) + (len(row.example.labels) if self._base.kind == "seq2seq" else 0)

    def release(self) -> None:
        """See `Computation`; what autograd makes goes by itself."""

    def _over(self, rows: Sequence[Row], then: Callable[[Sequence[Loss]], None]) -> list[Sums]:
        sums = [Sums() for _ in self._learners]
        for row in rows:
            sums[row.learner].tokens += self.tokens(row)
        waiting = self._packs(rows, self._run.dropping)
        while waiting:
            pack = waiting.pop(0)
            try:
                losses = self._forward(pack)
            except Strange:  # a layer mixes rows in a way that the probe did not show
                self._together = False
                waiting = [one for some in (pack, *waiting) for one in _by_learner(some)]
                continue
            then(losses)
            for loss in losses:
                mine = sums[loss.learner]
                mine.total += float(loss.total.detach())
                mine.count += loss.count
                mine.hits = mine.hits if loss.hits is None else (mine.hits or 0) + loss.hits
        self._run.norms.clear()
        return sums

    def _packs(self, rows: Sequence[Row], dropping: bool) -> list[list[Piece]]:
        """Packs of at most `pack_tokens`, padding counted; rows of one learner side by side, by length."""
        most, cost = self._settings.pack_tokens, self._pass.cost
        drops = [dropping and (self._drops or learner.trainable.dropout > 0) for learner in self._learners]
        if self._alone and any(drops):
            return [[piece] for piece in _pieces(rows, self._base.kind)]
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(0 if self._together else row.learner, []).append(row)
        packs: list[list[Piece]] = []
        for some in groups.values():
            if self._pass.packs:
                packs += [list(pack.pieces) for pack in make_packs(some, most, [not one for one in drops])]
                continue
            group = sorted(_pieces(some, self._base.kind), key=cost)
            for size in _cut([cost(piece) for piece in group], most):
                packs.append(sorted(group[:size], key=lambda piece: (piece.learner, cost(piece))))
                group = group[size:]
        return packs

    def _forward(self, pack: Sequence[Piece]) -> list[Loss]:
        self._run.rows = tuple(pack)
        if not self._run.dropping:
            return self._pass.losses(pack, self._run)
        torch.manual_seed(pack[0].key & (2**63 - 1))  # for what a model draws by itself
        self._dropping = Dropping(self._run) if self._drops else None
        with self._dropping or (Dropless() if self._settings.checkpoint else nullcontext()):
            return self._pass.losses(pack, self._run)

    @contextmanager
    def _computing(self, dropping: bool) -> Iterator[None]:
        """Within the block the model computes with all adapters."""
        self._run.dropping = dropping
        checkpoints = dropping and self._settings.checkpoint and not self._prefixed
        devices = [self._base.device] if self._base.device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(replaced(self._sites))
            if dropping:
                stack.enter_context(torch.random.fork_rng(devices))
            if checkpoints:
                stack.enter_context(_checkpointing(self._model, self._recomputed))
            if checkpoints or (dropping and self._drops):
                self._model.train(True)
                stack.callback(self._model.train, False)
            yield
        self._run.dropping, self._run.known, self._run.rows, self._dropping = False, {}, (), None

    def _recomputed(self, layer: Callable[..., Any], *args: Any) -> Any:
        """A layer whose inside is computed again in the backward, with the same dropout."""
        from torch.utils.checkpoint import checkpoint

        outer, rows = self._dropping, self._run.rows
        first, last = (0, 0) if outer is None else (outer.salt, 0)
        known = self._run.known

        def again(*given: Any) -> Any:
            nonlocal last
            self._run.known = known
            with ExitStack() as stack:
                inner = None if outer is None else Dropping(self._run, first)
                stack.enter_context(inner or Dropless())
                if self._pass.packs:
                    stack.enter_context(packed_attention(self._model, Spans.of(rows, inner)))
                made = layer(*given)
            last = 0 if inner is None else inner.salt
            return made

        made = checkpoint(again, *args, use_reentrant=False)
        if outer is not None:
            outer.skip_to(last)
        return made

    def _make_sites(self) -> dict[nn.Module, AdaptedSite]:
        parts: dict[nn.Module, dict[int, Part]] = {}
        for index, learner in enumerate(self._learners):
            if isinstance(learner.trainable, TrainableLora):
                for tensors in learner.trainable.sites.values():
                    parts.setdefault(tensors.module, {})[index] = Part(tensors, learner.trainable.dropout)
        order = {module: i for i, module in enumerate(self._model.modules())}
        return {m: AdaptedSite(m, some, FIRST_SITE + order[m], self._run) for m, some in parts.items()}

    def _make_pass(self, view: Any) -> Pass:
        base = self._base
        if base.kind == "encoder":
            return EncoderPass(base, self._model, view.head, self._learners, self._prefix)
        if base.kind == "seq2seq":
            return Seq2SeqPass(base, self._model, self._prefix)
        made = CausalPass(base, self._model, self._model.get_output_embeddings() in self._sites, self._prefix)
        made.within = lambda rows: packed_attention(self._model, Spans.of(rows, self._dropping))
        return made

    def _prefix(self, rows: Sequence[Piece]) -> PrefixRows | None:
        trainable = self._learners[rows[0].learner].trainable
        return trainable.prefix(len(rows), self._base.dtype) if isinstance(trainable, TrainablePrefix) else None

    def _probe(self) -> None:
        """Find out whether rows can be packed, and whether a layer's lines are those of the rows as we count them."""
        generator, last = torch.Generator().manual_seed(0), len(self._learners) - 1
        limit = int(self._base.config.vocab_size)
        texts = [tuple(torch.randint(0, limit, (n,), generator=generator).tolist()) for n in _PROBE_LENGTHS]
        labels = [text[:5] if self._base.kind == "seq2seq" else text for text in texts]
        if self._base.kind == "encoder":
            labels = [(0,) for _ in texts]
        pair = [Piece(who, i, 0, texts[i], labels[i]) for i, who in enumerate((0, last))]
        with torch.no_grad(), self._computing(dropping=False):
            alone = torch.cat([self._features([piece]) for piece in pair])
            if isinstance(self._pass, CausalPass) and not self._prefixed and not _windowed(self._base.config):
                self._pass.packs = True
                try:
                    packs = self._close(self._features(pair), alone)
                except (CannotPack, TypeError, ValueError, RuntimeError, Strange):
                    packs = False
                self._pass.packs = packs
            if self._together or any(learner.trainable.dropout for learner in self._learners):
                self._count_lines(pair)

    def _count_lines(self, pair: Sequence[Piece]) -> None:
        """A change of the first row's lines must reach the first row and no other."""
        two = pair if self._together else [pair[0], replace(pair[1], learner=pair[0].learner)]
        self._run.strange = False
        try:
            plain = self._features(two)
            self._run.noise = 1.0
            noisy = self._features(two)
        except Strange:
            self._together, self._alone = False, True
            return
        finally:
            self._run.noise = 0.0
        separate = self._close(noisy[1:], plain[1:])
        self._alone = self._run.strange or not separate
        self._together = self._together and not self._alone

    def _features(self, rows: Sequence[Piece]) -> torch.Tensor:
        self._run.rows = tuple(rows)
        return self._pass.features(rows, self._run)

    def _close(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        scale = max(float(expected.abs().max()), 1e-30)
        bound = _BOUNDS.get(self._base.dtype, 0.0) * scale
        return bool(torch.isfinite(found).all()) and float((found - expected).abs().max()) <= bound


def _computing_model(model: nn.Module, learners: Sequence[Learner]) -> nn.Module:
    """The base's own model, or PEFT's around its layers."""
    if not any(isinstance(learner.trainable, TrainablePeft) for learner in learners):
        return model
    (trainable,) = (learner.trainable for learner in learners[:1])
    if len(learners) > 1 or not isinstance(trainable, TrainablePeft):
        raise Unsupported("Adapters that PEFT's layers compute are trained one at a time.", "Train them in turn.")
    return trainable.model(model)


def _pieces(rows: Sequence[Row], kind: str) -> list[Piece]:
    """Rows as pieces: a causal model's without what follows the last supervised token."""
    if kind == "causal":
        most = sum(len(row.example.ids) for row in rows) + 1
        none = [False] * (max((row.learner for row in rows), default=0) + 1)
        return [piece for pack in make_packs(rows, most, none) for piece in pack.pieces]
    return [Piece(row.learner, row.key, 0, tuple(row.example.ids), tuple(row.example.labels)) for row in rows]


def _cut(costs: Sequence[int], most: int) -> list[int]:
    """How many neighbours, padded to the longest, go into each pack; a costlier one goes alone."""
    sizes: list[int] = []
    longest = count = 0
    for cost in costs:
        if count and max(longest, cost) * (count + 1) > most:
            sizes.append(count)
            longest = count = 0
        longest, count = max(longest, cost), count + 1
    return [*sizes, count] if count else sizes


def _by_learner(pack: Sequence[Piece]) -> list[list[Piece]]:
    """One pack of each learner; what a piece goes on from is of its own learner."""
    found: list[list[Piece]] = []
    for learner in dict.fromkeys(piece.learner for piece in pack):
        places = [i for i, piece in enumerate(pack) if piece.learner == learner]
        new = {-1: -1, **{old: i for i, old in enumerate(places)}}
        found.append([replace(pack[i], context=new[pack[i].context]) for i in places])
    return found


def _backward(losses: Sequence[Loss]) -> None:
    total = torch.stack([loss.total for loss in losses]).sum()
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]


def _drops(model: nn.Module, config: Any) -> bool:
    """Whether a model has dropout of its own, in layers or by functions that its configuration sets."""
    layers = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    said: Mapping[str, Any] = config.to_dict()
    return layers or any("drop" in key and isinstance(value, float) and value > 0 for key, value in said.items())


def _windowed(config: Any) -> bool:
    """Whether some layers attend to a part of what is before a token, which a short probe would not show."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(getattr(config, "sliding_window", None)) or bool(kinds - {"full_attention"})


@contextmanager
def _checkpointing(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block the model's layers are computed by `function(layer, *args)`."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, function
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func
