"""The layers of an encoder built as BERT is, in one native call: float32, on a CPU (see encoder.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from .changes import address
from .forward import Batch, _Product, _structure
from .library import library

_LANES = 16
_PANEL = 48
_QUERIES = 8
# Tokens of a block: its lines and a panel of weights stay in the second cache, and each panel is read for many tokens.
_BLOCK = 128
_LEAST = 48
ACTS = {"gelu": 1, "relu": 2}
SITES = 4  # of a layer: q k v, out, up, down


@dataclass(frozen=True)
class TallLinear:
    """A frozen product in float32 for many rows: panels of 48 outputs [panels, in, 48], biases [out] or none.

    With `lies`, panels is the weight as a module has it [out, in], contiguous.
    """

    panels: torch.Tensor
    bias: torch.Tensor | None
    n_in: int
    n_out: int
    lies: bool = False


def tall_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> TallLinear:
    """Lay out a weight [out, in] in panels; zeros fill the last one."""
    n_out, n_in = weight.shape
    whole = F.pad(weight, (0, 0, 0, -n_out % _PANEL)).view(-1, _PANEL, n_in)
    return TallLinear(whole.transpose(1, 2).contiguous(), bias, n_in, n_out)


def lying_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> TallLinear:
    """A weight [out, in] as it lies, without a copy: panels are put together when they are read."""
    n_out, n_in = weight.shape
    return TallLinear(weight.contiguous(), bias, n_in, n_out, lies=True)


@dataclass(frozen=True)
class LayerParts:
    """One layer; a norm is its weight and its bias."""

    q: TallLinear
    k: TallLinear
    v: TallLinear
    out: TallLinear
    up: TallLinear
    down: TallLinear
    attended: tuple[torch.Tensor, torch.Tensor]
    norm: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Widths of an encoder; eps is added in every norm, scaling multiplies every score, act is one of `ACTS`."""

    hidden: int
    heads: int
    dim: int
    inner: int
    eps: float
    scaling: float
    act: str


@dataclass(frozen=True)
class Embedding:
    """What tokens begin as: the norm (weight, bias) of word [words, hidden] + kind [hidden] + position [.., hidden]."""

    words: torch.Tensor
    kind: torch.Tensor | None
    positions: torch.Tensor
    norm: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Texts:
    """Texts laid one after another.

    Attributes:
        lengths: tokens of each text.
        read: which tokens of each are read after the last layer, first and how many.
        owners: the adapter of each text, as `Batch` numbers them; -1: none.
        x: the tokens' embeddings [tokens, hidden]; or, for an encoder that has them, the numbers of word and position.
    """

    lengths: Sequence[int]
    read: Sequence[tuple[int, int]]
    owners: Sequence[int]
    x: torch.Tensor | tuple[Sequence[int], Sequence[int]]


def has_encoder() -> bool:
    """Whether there is native code, for registers that hold the sums it keeps in them (AVX-512)."""
    functions = library().functions
    return functions is not None and bool(functions.ahl_wide_registers())


class Encoder:
    """The weights of an encoder's layers, as native code reads them where they are."""

    def __init__(self, sizes: Sizes, layers: Sequence[LayerParts], embedding: Embedding | None = None) -> None:
        self._kept, self._sizes = (tuple(layers), embedding), sizes
        self._stack = (_Layer * len(layers))(*map(_layer, layers))
        numbers = (sizes.hidden, sizes.heads, sizes.dim, sizes.inner, sizes.eps, sizes.scaling, ACTS[sizes.act])
        stack = ctypes.addressof(self._stack)
        self._plain = _Encoder(len(layers), *numbers, stack)
        self._whole = None if embedding is None else _Encoder(len(layers), *numbers, stack, *_embedding(embedding))

    def __call__(self, texts: Texts, batch: Batch) -> torch.Tensor:
        """What leaves the last layer at the tokens that are read [read, hidden]."""
        s, threads = self._sizes, torch.get_num_threads()
        counts = [count for _, count in texts.read]
        begin, read_begin = [0, *accumulate(texts.lengths)], [0, *accumulate(counts)]
        read = [at + first + i for at, (first, count) in zip(begin, texts.read, strict=False) for i in range(count)]
        whole, ends = blocks(texts.lengths, threads), blocks(counts, threads)
        x = texts.x if isinstance(texts.x, torch.Tensor) else None
        words: tuple[Sequence[int], Sequence[int]] = ((), ()) if isinstance(texts.x, torch.Tensor) else texts.x
        tables = (begin, read_begin, read, texts.owners, *words, whole[0], ends[0])
        kept = [torch.tensor(table, dtype=torch.long) for table in tables]
        *first, at, ends_at = (one.data_ptr() for one in kept)
        given = _Texts(*first, len(whole[0]) - 1, at, whole[1], len(ends[0]) - 1, ends_at, ends[1])
        most = max(_most(begin, whole[0]), _most(read_begin, ends[0]))
        room, _kept = self._room(most, max(texts.lengths), batch.width, threads)
        by = _Adapters(None if batch.changes is None else ctypes.addressof(batch.changes), batch.width)
        out, seen = torch.empty((len(read), s.hidden)), torch.empty((len(read), s.heads * s.dim))
        encoder = self._plain if x is not None else self._whole
        functions = library().functions
        assert functions is not None
        assert encoder is not None
        functions.ahl_encode(
            *map(ctypes.addressof, (encoder, given, by, room)), address(x), address(out), address(seen), threads
        )
        return out

    def _room(self, tokens: int, longest: int, width: int, threads: int) -> tuple[Any, Any]:
        s = self._sizes
        of_heads = s.heads * s.dim
        each = tokens * sum(n + _LANES for n in (s.hidden, s.hidden, 3 * of_heads, of_heads, s.inner, width))
        scores = (s.dim + _QUERIES) * (longest + _LANES)
        kept = (
            torch.empty(each * threads),
            torch.empty(scores * threads),
            torch.empty((threads * 2 * tokens, 3), dtype=torch.long),
        )
        return _Room(*(one.data_ptr() for one in kept), tokens, each, scores), kept


def _most(begin: Sequence[int], cuts: Sequence[int]) -> int:
    """Tokens of the largest block."""
    return max(begin[end] - begin[first] for first, end in pairwise(cuts))


def blocks(lengths: Sequence[int], threads: int) -> tuple[list[int], bool]:
    """Cut texts into blocks that are computed one after another -> where each begins, and whether threads share each.

    Threads that take blocks of their own never wait for each other; the last ones are small, so that all end together.
    """
    left = sum(lengths)
    together = threads > 1 and (left < 2 * threads * _LEAST or 2 * threads * max(lengths) > left)
    cuts, size, most = [0], 0, _BLOCK * threads if together else min(_BLOCK, left // (2 * threads))
    for i, length in enumerate(lengths):
        if size and size + length > most:
            cuts.append(i)
            left, size = left - size, 0
            most = most if together else max(_LEAST, min(_BLOCK, left // (2 * threads)))
        size += length
    return [*cuts, len(lengths)], together


_Layer = _structure(
    "_Layer", q=_Product, k=_Product, v=_Product, out=_Product, up=_Product, down=_Product,
    attended="p", attended_bias="p", norm="p", norm_bias="p",
)  # fmt: skip
_Encoder = _structure(
    "_Encoder", layers="l", hidden="l", heads="l", dim="l", inner="l", eps="f", scaling="f", act="l", stack="p",
    words="p", kind="p", positions="p", norm="p", norm_bias="p",
)  # fmt: skip
_Texts = _structure(
    "_Texts", begin="p", read_begin="p", read="p", owner="p", word="p", position="p",
    whole="l", whole_at="p", whole_together="l", ends="l", ends_at="p", ends_together="l",
)  # fmt: skip
_Adapters = _structure("_Adapters", changes="p", width="l")
_Room = _structure("_Room", lines="p", own="p", tiles="p", tokens="l", each="l", scores="l")


def _product(linear: TallLinear) -> Any:
    weight, bias = address(linear.panels), address(linear.bias)
    return _Product(weight, int(linear.lies), None, None, bias, linear.n_in, linear.n_out)


def _layer(parts: LayerParts) -> Any:
    products = map(_product, (parts.q, parts.k, parts.v, parts.out, parts.up, parts.down))
    return _Layer(*products, *map(address, (*parts.attended, *parts.norm)))


def _embedding(parts: Embedding) -> tuple[int | None, ...]:
    return tuple(map(address, (parts.words, parts.kind, parts.positions, *parts.norm)))
