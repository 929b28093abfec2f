"""The forward of a decoder built as Llama is, in one native call: float32, on a CPU (see forward.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from .changes import address, tiles
from .library import library
from .packed import PackedWeight

_LANES = 16


@dataclass(frozen=True)
class Linear:
    """A frozen product with its biases [out], or without."""

    weight: PackedWeight
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LayerParts:
    """One layer: q, k, v are one product, gate and up another; norms are vectors, `head_norms` those of q and k."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    before: torch.Tensor
    after: torch.Tensor
    head_norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder; `inner` is that of gate, eps is added in every norm, scaling multiplies every score."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    eps: float
    scaling: float


@dataclass(frozen=True)
class Text:
    """Tokens laid one after another: `lengths` of each row, and for each token its row, column and angles [dim]."""

    lengths: tuple[int, ...]
    rows: torch.Tensor
    columns: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """The adapters of some rows, -1 for a row without: `changes` are those of one adapter after those of another."""

    owners: tuple[int, ...] = ()
    changes: Any = None
    width: int = 0
    scales: bool = False
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def cut(self, lengths: tuple[int, ...]) -> torch.Tensor:
        """The tiles of rows of these lengths."""
        if lengths not in self.known:
            self.known[lengths] = tiles(self.owners, lengths)
        return self.known[lengths]


class Forward:
    """The weights of a decoder, as native code reads them where they are.

    `sites` counts the groups of layers that an adapter may change: qkv, out, gate_up, down of each layer, the head.
    """

    def __init__(self, sizes: Sizes, layers: Sequence[LayerParts], norm: torch.Tensor, head: Linear) -> None:
        self._kept = (tuple(layers), norm, head)
        self._sizes, self._head = sizes, head
        self._stack = (_Layer * len(layers))(*map(_layer, layers))
        self.sites = 4 * len(layers) + 1
        self._decoder = _Decoder(
            len(layers), sizes.hidden, sizes.heads, sizes.kv_heads, sizes.dim, sizes.inner, sizes.eps, sizes.scaling,
            ctypes.addressof(self._stack), _product(head), address(norm),
        )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        text: Text,
        batch: Batch,
        keys: torch.Tensor,
        values: torch.Tensor,
        filled: torch.Tensor,
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Logits [wanted, vocabulary] after these tokens.

        Args:
            x: [tokens, hidden], the embeddings; overwritten.
            keys, values: [layers, rows, kv_heads, columns, dim]; the tokens' own columns are written.
            filled: [rows, columns] bool, the columns a row sees, its new tokens' own among them.
            wanted: for each row how many of its last tokens.
        """
        tokens, threads = x.shape[0], torch.get_num_threads()
        which: list[int] = []
        for end, count in zip(accumulate(text.lengths), wanted, strict=True):
            which += range(end - count, end)
        chosen = torch.tensor(which)
        logits = torch.empty((len(which), self._head.weight.n_out))
        room, _kept = self._room(tokens, batch.width, filled.shape, threads)
        mine, last = _adapters(batch, text.lengths), _adapters(batch, tuple(wanted))
        functions = library().functions
        assert functions is not None
        given = _Text(tokens, text.rows.data_ptr(), text.columns.data_ptr(), address(text.cos), address(text.sin))
        window = _Window(address(keys), address(values), filled.data_ptr(), filled.shape[0], filled.shape[1])
        functions.ahl_forward(
            *map(ctypes.addressof, (self._decoder, given, mine, window, room)), address(x), len(which),
            chosen.data_ptr(), ctypes.addressof(last), logits.data_ptr(), int(batch.scales), threads,
        )  # fmt: skip
        return logits

    def _room(self, tokens: int, width: int, window: torch.Size, threads: int) -> tuple[Any, list[torch.Tensor]]:
        s = self._sizes
        wide = max((s.heads + 2 * s.kv_heads) * s.dim, 2 * s.inner)
        lines = (s.hidden, s.hidden, wide, max(s.heads * s.dim, s.inner), width)
        kept = [torch.empty(tokens * n) for n in lines]
        kept += [torch.empty(threads * (window[1] + _LANES)), torch.empty(window[0], dtype=torch.long)]
        return _Room(*(one.data_ptr() for one in kept)), kept


def _structure(name: str, **fields: Any) -> Any:
    """A structure of forward.c or work.h, field by field: p an address, l a long, f a float."""
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}
    pairs = [(key, kinds.get(kind, kind) if isinstance(kind, str) else kind) for key, kind in fields.items()]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


_Product = _structure("_Product", panels="p", format="l", scales="p", codes="p", bias="p", k="l", n="l")
_Layer = _structure(
    "_Layer", qkv=_Product, out=_Product, gate_up=_Product, down=_Product,
    before="p", after="p", q_norm="p", k_norm="p",
)  # fmt: skip
_Decoder = _structure(
    "_Decoder", layers="l", hidden="l", heads="l", kv_heads="l", dim="l", inner="l", eps="f", scaling="f",
    stack="p", head=_Product, norm="p",
)  # fmt: skip
_Window = _structure("_Window", keys="p", values="p", filled="p", rows="l", columns="l")
_Text = _structure("_Text", tokens="l", row="p", column="p", cos="p", sin="p")
_Adapters = _structure("_Adapters", count="l", width="l", tiles="p", changes="p")
_Room = _structure(
    "_Room", normed="p", added="p", wide="p", inner="p", low="p", scores="p", begin="p",
)  # fmt: skip


def _product(linear: Linear) -> Any:
    weight = linear.weight
    return _Product(
        weight.panels.data_ptr(), weight.format, address(weight.scales), address(weight.codes), address(linear.bias),
        weight.n_in, weight.n_out,
    )  # fmt: skip


def _layer(parts: LayerParts) -> Any:
    products = map(_product, (parts.qkv, parts.out, parts.gate_up, parts.down))
    return _Layer(*products, address(parts.before), address(parts.after), *map(address, parts.head_norms))


def _adapters(batch: Batch, lengths: tuple[int, ...]) -> Any:
    if batch.changes is None:
        return _Adapters()
    some = batch.cut(lengths)
    return _Adapters(len(some), batch.width, some.data_ptr(), ctypes.addressof(batch.changes))
