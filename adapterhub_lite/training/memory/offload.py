"""Layers' inputs, and a table of embeddings, in the host's memory while a device computes.

Two places on the device take turns: while a layer computes, the input of the one before it goes to pinned memory on a
stream of its own, and in the backward that of the next one comes back (as in ZeRO-Offload, arXiv 2101.06840).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ...bases.load import Base
from ..computation import Computation, Learner, Settings, heeded
from .buffers import Buffers


class Copier(Protocol):
    """Copies beside the computing."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Begin to copy, after all work and all copies asked for so far; the result is for `wait`."""

    def wait(self, begun: Any) -> None:
        """Work that is asked for from now on begins after this copy."""


class PlainCopier:
    """Copies at once: a CPU."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `Copier`."""
        target.copy_(source)

    def wait(self, begun: None) -> None:
        """See `Copier`."""


class CudaCopier:
    """Copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """See `Copier`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        for tensor in (source, target):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)  # whoever frees it meanwhile does not give it to others too early
        return done

    def wait(self, begun: torch.cuda.Event) -> None:
        """See `Copier`."""
        torch.cuda.current_stream(self._device).wait_event(begun)


class Inputs:
    """Inputs of all layers of one pass: written upwards, read downwards.

    Layer i has place i % 2 on the device. Those of the two highest layers stay there.
    """

    def __init__(self, buffers: Buffers, layers: int, copier: Copier) -> None:
        self._buffers, self._layers, self._copier = buffers, layers, copier
        self._held = [-1, -1]  # whose input each place has
        self._leaving: list[Any] = [None, None]
        self._coming: dict[int, Any] = {}
        self._host: dict[int, torch.Tensor] = {}
        self._shape = (0, 0)

    def place(self, layer: int, count: int, width: int) -> torch.Tensor:
        """Where to write a layer's input [count, width]."""
        self._free(layer % 2)
        self._held[layer % 2], self._shape = layer, (count, width)
        return self._on_device(layer)

    def keep(self, layer: int) -> None:
        """It has been written, and is not asked for until the backward."""
        if layer < self._layers - 2:
            self._leaving[layer % 2] = self._copier.copy(self._on_device(layer), self._on_host(layer))

    def get(self, layer: int, lowest: int) -> torch.Tensor:
        """The input of a layer; the one below is on its way then. The one above is not read any more."""
        self._bring(layer)
        if layer in self._coming:
            self._copier.wait(self._coming.pop(layer))
        if layer > lowest:
            self._bring(layer - 1)
        return self._on_device(layer)

    @property
    def on_host(self) -> int:
        """Bytes in the host's memory, as far as passes have asked for them."""
        return sum(kept.nbytes for kept in self._host.values())

    def _bring(self, layer: int) -> None:
        if self._held[layer % 2] != layer:
            self._free(layer % 2)
            self._coming[layer] = self._copier.copy(self._on_host(layer), self._on_device(layer))
            self._held[layer % 2] = layer

    def _free(self, place: int) -> None:
        """What was in this place has left."""
        if self._leaving[place] is not None:
            self._copier.wait(self._leaving[place])
            self._leaving[place] = None

    def _on_device(self, layer: int) -> torch.Tensor:
        return self._buffers(f"x {layer % 2}", *self._shape)

    def _on_host(self, layer: int) -> torch.Tensor:
        if self._buffers.device.type == "meta":  # only the device's bytes are counted
            return self._on_device(layer)
        count = self._shape[0] * self._shape[1]
        kept = self._host.get(layer)
        if kept is None or kept.numel() < count:
            pinned = self._buffers.device.type == "cuda"
            kept = self._host[layer] = torch.empty(count, dtype=self._buffers.dtype, pin_memory=pinned)
        return kept[:count].view(self._shape)


def inputs_for(buffers: Buffers, layers: int) -> Inputs:
    """Inputs kept on the host of a CUDA device; on a CPU the same copies, at once."""
    cuda = buffers.device.type == "cuda"
    return Inputs(buffers, layers, CudaCopier(buffers.device) if cuda else PlainCopier())


def look_up(table: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """out = the table's rows of these ids, wherever the table is."""
    if table.device == out.device:
        torch.index_select(table, 0, ids, out=out)
    else:
        out.copy_(table.index_select(0, ids.to(table.device)))


def movable_table(base: Base) -> torch.Tensor | None:
    """The table of input embeddings, where a device would have its room without it: not on a CPU, nor where the output
    layer has the same table.
    """
    model: Any = base.model
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == table.data_ptr()
    return None if table.device.type != "cuda" or tied else table


@contextmanager
def table_on_host(base: Base) -> Iterator[int]:
    """Within the block the table of input embeddings is in the host's memory, and only a fused decoder can compute.

    Gives the bytes that the device has meanwhile; see `movable_table`.
    """
    table = movable_table(base)
    if table is None:
        yield 0
        return
    device, count = table.device, table.nbytes
    table.data = table.data.to("cpu")
    try:
        yield count
    finally:
        table.data = table.data.to(device)


@contextmanager
def settled(base: Base, learners: Sequence[Learner], computation: Computation, settings: Settings) -> Iterator[int]:
    """Within the block what `settings` wants on the host is there; gives the bytes of the base that are.

    The computation gives its buffers back before they return: there need not be room for both.
    """
    if not settings.table_on_host or "table_on_host" not in heeded(base, learners):
        yield 0
        return
    with table_on_host(base) as count:
        try:
            yield count
        finally:
            computation.release()
