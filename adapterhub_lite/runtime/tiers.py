"""Where adapters are: on disk (the store), in host memory, on the device; and what each of these may hold.

On a CPU host and device are one. On a CUDA device the host keeps a copy of every adapter that was brought in, in pinned
memory as far as its budget goes, so that one that left the device comes back without the disk: one copy beside the
computation, which waits for it where the adapter is first used.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..adapters.fit import Fitted
from ..adapters.pack import Pack, unpacked
from ..adapters.prefix import FittedPrefix
from ..adapters.prompt import FittedPrompt
from ..bases.memory import available_bytes
from ..errors import Unsupported
from .admit import Admitted
from .batch import Composer, Stack

_SHARE = 0.5  # of what is free when a runtime is made; docs/decisions.md says why
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BYTES = re.compile(r"(?P<number>\d{1,15}(\.\d{1,6})?) ?(?P<unit>[kmgt]i?|)b?", re.ASCII | re.IGNORECASE)
_ALIGNMENT = 256  # as CUDA's own allocations


class Residence(NamedTuple):
    """One adapter in memory: `tier` is device or host, `leases` the running batches that use it."""

    name: str
    tier: str
    bytes: int
    pinned: bool
    leases: int


def parse_bytes(given: int | str) -> int:
    """A number of bytes, or text such as "2GB", "1.5 GiB".

    Raises:
        Unsupported: it is neither.
    """
    match = _BYTES.fullmatch(given.strip()) if isinstance(given, str) else None
    if match is not None:
        given = int(float(match["number"]) * _UNITS[match["unit"].lower()])
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise Unsupported(f"{given!r} is no amount of memory.", 'Give bytes, or text such as "500MB" or "2GB".')
    return given


def device_budget(given: int | str | None, device: torch.device) -> int:
    """Bytes for adapters on a device; left out, half of what is free there now."""
    if given is not None:
        return parse_bytes(given)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    return max(1, int(_SHARE * free))


class BoundedComposer(Composer):
    """A composer that remembers stacks of matrices only as far as `room` (bytes) goes: adapters come first."""

    def __init__(self, room: Callable[[], int]) -> None:
        super().__init__()
        self._room = room

    @property
    def nbytes(self) -> int:
        """Bytes of the stacks remembered."""
        return sum(map(_stack_bytes, list(self._stacks.values())))  # other threads may ask

    def trim(self, room: int) -> None:
        """Forget stacks, the oldest first, until they take at most `room` bytes."""
        while self._stacks and self.nbytes > room:
            self._stacks.popitem(last=False)

    def _stack(self, adapters: tuple[Fitted, ...]) -> Stack:
        made = super()._stack(adapters)
        self.trim(self._room())
        return made


def _stack_bytes(stack: Stack) -> int:
    return sum(down.nbytes + sum(up[2].nbytes for up in ups if up is not None) for down, ups in stack.groups.values())


class Copier(Protocol):
    """Copies bytes to a device beside what it computes."""

    def start(self, flat: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """Begin the copy of a host tensor of bytes; the second value makes the computation wait for its end."""
        ...


class CudaCopier:
    """On a stream of its own, with an event at the end of each copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, flat: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """See `Copier`."""
        with torch.cuda.stream(self._stream):
            copied = flat.to(self._device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)

        def wait() -> None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(done)
            copied.record_stream(computing)  # its memory belongs to the copying stream's pool

        return copied, wait


@dataclass(frozen=True)
class Image:
    """An adapter whose tensors lie in one host buffer, `spans` saying where (offset in bytes), in `remade`'s order."""

    fitted: Fitted
    flat: torch.Tensor
    spans: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.flat.nbytes

    def on(self, copier: Copier) -> tuple[Fitted, Callable[[], None]]:
        """The adapter on the device, and what waits for its arrival."""
        flat, wait = copier.start(self.flat)
        offsets = iter(self.spans)
        return remade(self.fitted, lambda tensor: _view(flat, next(offsets), tensor)), wait


def image_of(fitted: Fitted, *, pin: bool) -> Image:
    """Copy an adapter to the host.

    Args:
        pin: into pinned memory, if the system gives some: else copies from it do not run beside the computation.
    """
    spans, end = [], 0
    for tensor in _tensors(fitted):
        spans.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    flat = _buffer(end, pin)
    offsets = iter(spans)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return _view(flat, next(offsets), tensor).copy_(tensor)

    return Image(remade(fitted, copied), flat, tuple(spans))


class HostTier:
    """Images of adapters in host memory, at most `memory` bytes; the least recently used goes out first."""

    def __init__(self, memory: int, copier: Copier, *, pin: bool = True) -> None:
        self.memory = memory
        self._copier = copier
        self._pin = pin
        self._held: OrderedDict[str, Image] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    @property
    def used(self) -> int:
        """Bytes of all images."""
        return sum(image.nbytes for image in self._held.values())

    def put(self, fitted: Fitted) -> None:
        """Keep a copy of an adapter on the device, if the budget can hold it at all."""
        if fitted.digest in self._held:
            self._held.move_to_end(fitted.digest)
            return
        size = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in _tensors(fitted))
        if size > self.memory:
            return
        while self.used + size > self.memory:
            self._held.popitem(last=False)
        self._held[fitted.digest] = image_of(fitted, pin=self._pin)

    def size(self, digest: str) -> int | None:
        """Bytes of an adapter held here."""
        image = self._held.get(digest)
        return None if image is None else image.fitted.nbytes

    def promote(self, digest: str) -> tuple[Fitted, Callable[[], None]]:
        """Start the copy of a held adapter to the device; the second value waits for it."""
        self._held.move_to_end(digest)
        return self._held[digest].on(self._copier)

    def drop(self, digest: str) -> bool:
        """Forget an adapter; False if it was not here."""
        return self._held.pop(digest, None) is not None

    def resident(self) -> list[Image]:
        """Least recently used first."""
        return list(self._held.values())


def host_tier(given: int | str | None, device: torch.device) -> HostTier | None:
    """The host's tier for a device with memory of its own; None on a CPU, where a budget is checked and not used."""
    memory = parse_bytes(given) if given is not None else max(1, int(_SHARE * available_bytes()))
    return HostTier(memory, CudaCopier(device)) if device.type == "cuda" else None


class Prefetch:
    """Adapters on their way in, on one background thread: read ahead of their use, then installed as by that use.

    What fails is forgotten: whoever uses the adapter finds out for himself.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a runtime may be collected, and close this, at any line of this thread
        self._pool: ThreadPoolExecutor | None = None
        self._flights: dict[str, tuple[Future[None], Future[Admitted | None]]] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._flights

    def reading(self, digest: str) -> bool:
        """Whether it has not been read yet."""
        with self._lock:
            return digest in self._flights and not self._flights[digest][1].done()

    def start(self, digest: str, read: Callable[[], Admitted | None], install: Callable[[], object]) -> None:
        """Begin to bring an adapter in, if that is not under way.

        Args:
            read: what needs no lock on the base; None where nothing can be done without it.
            install: makes the adapter resident, with `take`.
        """
        found: Future[Admitted | None] = Future()

        def run() -> None:
            try:
                found.set_result(read())
                with self._lock:
                    wanted = digest in self._flights and self._flights[digest][1] is found
                if wanted:
                    install()
            except Exception as error:
                if not found.done():
                    found.set_exception(error)
            finally:
                with self._lock:
                    if digest in self._flights and self._flights[digest][1] is found:
                        del self._flights[digest]

        with self._lock:
            if digest not in self._flights:
                self._pool = self._pool or ThreadPoolExecutor(1, "adapterhub-prefetch")
                with suppress(RuntimeError):  # the process is ending
                    self._flights[digest] = self._pool.submit(run), found

    def take(self, digest: str) -> Admitted | None:
        """What was read ahead of this use, waiting for it; None if nothing was. Raises what the reading raised."""
        with self._lock:
            flight = self._flights.pop(digest, None)
        if flight is None or flight[0].cancel():
            return None
        return flight[1].result()

    def drop(self, digest: str) -> bool:
        """Bring an adapter in no more; False if it was not on its way."""
        with self._lock:
            flight = self._flights.pop(digest, None)
        if flight is not None:
            flight[0].cancel()
        return flight is not None

    def close(self) -> None:
        """Start nothing more."""
        with self._lock:
            for flight, _ in self._flights.values():
                flight.cancel()
            self._flights.clear()
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)


def remade(fitted: Fitted, move: Callable[[torch.Tensor], torch.Tensor]) -> Fitted:
    """The same packed adapter of other tensors: `move` is called once for each, always in the same order."""

    def some(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else move(tensor)

    packs = {
        group: Pack(
            move(pack.down),
            tuple(map(some, pack.ups)),
            tuple(map(some, pack.gains)),
            tuple(map(some, pack.biases)),
            some(pack.scale),
        )
        for group, pack in fitted.packs.items()
    }
    prefix, prompt = fitted.prefix, fitted.prompt
    return replace(
        fitted,
        packs=packs,
        sites=unpacked(packs),
        prefix=None if prefix is None else FittedPrefix(move(prefix.keys), move(prefix.values)),
        prompt=None if prompt is None else FittedPrompt(move(prompt.embeddings), prompt.embed),
        head=None if fitted.head is None else _head(fitted.head, move),
    )


def _head(head: nn.Module, move: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    shared: dict[int, Any] = {id(p): nn.Parameter(move(p.data), requires_grad=False) for p in head.parameters()}
    return copy.deepcopy(head, shared)


def _tensors(fitted: Fitted) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    remade(fitted, note)
    return found


def _view(flat: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return flat[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def _buffer(size: int, pin: bool) -> torch.Tensor:
    if pin:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # no CUDA, or no more memory that may be locked
            pass
    return torch.empty(size, dtype=torch.uint8)
