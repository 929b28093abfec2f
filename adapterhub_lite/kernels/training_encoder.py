"""The layers of an encoder built as BERT is, with low-rank adapters that learn: forward and backward in one native call
each, float32, on a CPU (see training_encoder.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from mmap import mmap
from typing import Any

import torch

from .changes import address
from .encoder import SITES, TallLinear
from .encoder import _product as product_of
from .forward import _Product, _structure
from .library import library

_MEMBERS = 3
_PLACES = 3


@dataclass(frozen=True)
class Norm:
    """A layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LayerWeights:
    """One layer; its weights are `lying_linear`s, which the backward reads too.

    Attributes:
        drops: shares that are dropped of attention's weights and before each norm.
    """

    q: TallLinear
    k: TallLinear
    v: TallLinear
    out: TallLinear
    up: TallLinear
    down: TallLinear
    attended: Norm
    made: Norm
    drops: tuple[float, float, float]


@dataclass(frozen=True)
class LowRank:
    """What a learner changes at one layer: W + scale b a; a [rank, in], b [out, rank]. Gradients go to their `grad`."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float


@dataclass(frozen=True)
class Sizes:
    """Widths of an encoder; scaling multiplies every score.

    Attributes:
        places, salts: the number of a place that drops is places * layer + its salt (attention, after it, at the end).
    """

    width: int
    heads: int
    dim: int
    inner: int
    scaling: float
    places: int
    salts: tuple[int, int, int]


@dataclass(frozen=True)
class Crowd:
    """Tokens one after another: all of them, or those that are read.

    Attributes:
        segments: (first, end, learner).
        keys, indices: int64 [count], what dropout asks for.
        begin: int64 [texts + 1], where those of each text begin.
    """

    count: int
    segments: Sequence[tuple[int, int, int]]
    keys: torch.Tensor
    indices: torch.Tensor
    begin: torch.Tensor


@dataclass(frozen=True)
class Pass:
    """What is computed.

    Attributes:
        longest: tokens of the longest text.
        chosen: int64 [read.count], which of all tokens are read.
        training: whether what a backward needs is kept.
        drops: whether the encoder's own dropout is on.
    """

    all: Crowd
    read: Crowd
    longest: int
    chosen: torch.Tensor
    training: bool
    drops: bool


Adapters = Sequence[Sequence[Sequence[Sequence[LowRank | None]]]]
"""[learner][layer][site]: what is changed at the layers of a site, in their order; an empty site is unchanged."""


class TrainedEncoder:
    """The layers of an encoder and what is learnt of them; a backward belongs to the forward before it.

    Args:
        lowest: the first layer whose backward is wanted.
    """

    def __init__(self, sizes: Sizes, layers: Sequence[LayerWeights], adapters: Adapters, lowest: int) -> None:
        self._sizes, self._kept = sizes, (tuple(layers), adapters)
        self._stack = (_Layer * len(layers))(*map(_layer, layers))
        self._members: list[tuple[Any, LowRank]] = []
        self._groups = (_Group * (len(adapters) * len(layers) * SITES))()
        self._room, self._asked = torch.empty(0), 0
        places = product(range(len(adapters)), range(len(layers)), range(SITES))
        found = [
            self._group(self._groups[i], adapters[who][at][site], site) for i, (who, at, site) in enumerate(places)
        ]
        self._copies = torch.empty(sum(found))
        low = max([1, *(group.width for group in self._groups)])
        self._lay_out(self._groups)
        self._job = _Job(
            layers=len(layers), width=sizes.width, heads=sizes.heads, dim=sizes.dim, inner=sizes.inner,
            scaling=sizes.scaling, stack=ctypes.addressof(self._stack), learners=len(adapters),
            groups=ctypes.addressof(self._groups), low=low, lowest=lowest, places=sizes.places,
            seen_salt=sizes.salts[0], attended_salt=sizes.salts[1], made_salt=sizes.salts[2],
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of what passes so far have asked for."""
        return self._asked * self._room.itemsize

    def forward(self, what: Pass, x: torch.Tensor) -> torch.Tensor:
        """What leaves the last layer at the tokens that are read [read, width], from x [tokens, width]."""
        out = torch.empty((what.read.count, self._sizes.width))
        self._job.x, self._job.out = _matrix(x, what.all.count, self._sizes.width), out.data_ptr()
        self._run("ahl_encoder_forward", what, gradients=False)
        return out

    def backward(self, what: Pass, x: torch.Tensor, grad: torch.Tensor, below: torch.Tensor | None) -> None:
        """Add to the gradients of all a and b; below [tokens, width] becomes that of x.

        Args:
            x: as `forward` was given it.
            grad: of what it gave.
        """
        width = self._sizes.width
        self._job.x, self._job.grad = _matrix(x, what.all.count, width), _matrix(grad, what.read.count, width)
        self._job.below = None if below is None else _matrix(below, what.all.count, width)
        self._run("ahl_encoder_backward", what, gradients=True)

    def _run(self, name: str, what: Pass, gradients: bool) -> None:
        functions, job, threads = library().functions, self._job, torch.get_num_threads()
        assert functions is not None
        for entry, site in self._members:
            entry.a, entry.b = site.a.data_ptr(), site.b.data_ptr()
            if gradients:
                entry.grad_a, entry.grad_b = _gradient(site.a), _gradient(site.b)
        kept = [self._crowd(job.all, what.all), self._crowd(job.read, what.read)]
        job.texts, job.longest, job.chosen = len(what.all.begin) - 1, what.longest, what.chosen.data_ptr()
        job.training, job.drops = what.training, what.drops
        at = ctypes.addressof(job)
        functions.ahl_encoder_room(at, threads)
        if self._room.numel() < job.floats:
            assert not gradients, "a backward follows the forward of the same pass"
            self._room = torch.empty(0)
            self._room = _mapped(2 * job.floats)
        self._asked = max(self._asked, job.floats)
        job.room = self._room.data_ptr()
        if not getattr(functions, name)(at, threads):
            raise MemoryError
        del kept

    @staticmethod
    def _crowd(entry: Any, crowd: Crowd) -> torch.Tensor:
        segments = torch.tensor(crowd.segments, dtype=torch.long)
        entry.count, entry.segment_count, entry.segments = crowd.count, len(crowd.segments), segments.data_ptr()
        entry.keys, entry.indices, entry.begin = (t.data_ptr() for t in (crowd.keys, crowd.indices, crowd.begin))
        return segments

    def _group(self, group: Any, members: Sequence[LowRank | None], site: int) -> int:
        """Fill in ranks; returns how many floats its copies take."""
        floats = 0
        for i, one in enumerate(members):
            if one is not None:
                rank, n_in = one.a.shape
                entry = group.members[i]
                entry.rank, entry.first, entry.scale = rank, group.width, one.scale
                group.width += rank
                self._members.append((entry, one))
                floats += rank * (2 * n_in + one.b.shape[0])
        group.inputs = next((one.a.shape[1] for one in members if one is not None), 0)
        return floats

    def _lay_out(self, groups: Any) -> None:
        at = self._copies.data_ptr()
        outs = {ctypes.addressof(entry): one.b.shape[0] for entry, one in self._members}
        for group in groups:
            if not group.width:
                continue
            size = 4 * group.width * group.inputs
            group.down, group.lines = at, at + size
            at += 2 * size
            for entry in group.members:
                if entry.rank:
                    entry.up = at
                    at += 4 * entry.rank * outs[ctypes.addressof(entry)]


def _mapped(floats: int) -> torch.Tensor:
    """Memory of its own, of which only what is written takes any, so that it may be larger than what is needed now.

    It goes back to the system when more has to follow; an allocator would keep it.
    """
    return torch.frombuffer(mmap(-1, 4 * floats), dtype=torch.float32)


def _gradient(parameter: torch.nn.Parameter) -> int:
    """Where a parameter's gradient lies, which is made if there is none."""
    grad = parameter.grad
    if grad is None or not grad.is_contiguous():
        grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        if parameter.grad is not None:
            grad.copy_(parameter.grad)
        parameter.grad = grad
    return grad.data_ptr()


def _matrix(x: torch.Tensor, rows: int, columns: int) -> int:
    if x.shape != (rows, columns) or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"This should be float32 [{rows}, {columns}], contiguous; it is {x.dtype} {list(x.shape)}.")
    return x.data_ptr()


_Rate = _structure("_Rate", threshold="l", scale="f")
_Layer = _structure(
    "_Layer", q=_Product, k=_Product, v=_Product, out=_Product, up=_Product, down=_Product,
    attended="p", attended_bias="p", made="p", made_bias="p", attended_eps="f", made_eps="f", rates=_Rate * _PLACES,
)  # fmt: skip
_Trained = _structure("_Trained", a="p", b="p", grad_a="p", grad_b="p", up="p", rank="l", first="l", scale="f")
_Group = _structure("_Group", members=_Trained * _MEMBERS, down="p", lines="p", width="l", inputs="l")
_Crowd = _structure("_Crowd", count="l", segment_count="l", segments="p", keys="p", indices="p", begin="p")
_Job = _structure(
    "_Job", layers="l", width="l", heads="l", dim="l", inner="l", scaling="f", stack="p", learners="l", groups="p",
    texts="l", longest="l", low="l", training="l", drops="l", lowest="l", places="l",
    seen_salt="l", attended_salt="l", made_salt="l", all=_Crowd, read=_Crowd, chosen="p", room="p", floats="l",
    x="p", grad="p", out="p", below="p",
)  # fmt: skip


def _layer(parts: LayerWeights) -> Any:
    products = map(product_of, (parts.q, parts.k, parts.v, parts.out, parts.up, parts.down))
    norms = [address(t) for norm in (parts.attended, parts.made) for t in (norm.weight, norm.bias)]
    rates = (_Rate * _PLACES)(*((round(p * 2**24), 1 / (1 - p)) for p in parts.drops))
    return _Layer(*products, *norms, parts.attended.eps, parts.made.eps, rates)
