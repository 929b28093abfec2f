"""What computes the gradients of an optimiser step, whichever way a base is computed.

Gradients are sums over rows: packing, padding and who computes beside a row change nothing but rounding. The loop
divides each learner's gradients by its own count, clips them by their own norm and steps its own optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..bases.load import Base
from ..tasks.task import Example
from .trainable import Trainable


@dataclass(frozen=True)
class Row:
    """One example of one learner in one optimiser step.

    Attributes:
        learner: index into the learners that are trained together.
        key: 63-bit number that names this row in this step; dropout masks are a pure function of it.
    """

    example: Example
    learner: int = 0
    key: int = 0


@dataclass
class Sums:
    """What rows of one learner gave: summed loss over `count` supervised items; `tokens` real tokens; right labels
    (`hits`) where there are classes.
    """

    total: float = 0.0
    count: int = 0
    tokens: int = 0
    hits: int | None = None


@dataclass
class Learner:
    """One adapter in training: its trainable tensors, and the head of an encoder."""

    trainable: Trainable
    head: nn.Module | None = None
    task_type: str = "CAUSAL_LM"

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, the head's last."""
        return [*self.trainable.parameters(), *(self.head.parameters() if self.head is not None else ())]


@dataclass(frozen=True)
class Load:
    """One forward and backward, as far as its cost goes.

    Attributes:
        rows: indices of the rows, of those that were asked about.
        tokens: that go through the model, padding included.
        squares: sum of what each token attends to, times two: the squared lengths of rows.
        supervised: tokens or texts that have a loss.
    """

    rows: tuple[int, ...]
    tokens: int
    squares: int
    supervised: int


@dataclass(frozen=True)
class Settings:
    """How a step is computed; none of it changes what is computed.

    Attributes:
        pack_tokens: most tokens of one forward and backward; a longer row runs alone.
        checkpoint: keep only each layer's input, and compute the rest again in the backward.
        offload: with `checkpoint` on CUDA, keep these inputs in the host's memory (decoders built as Llama is).
        dropout_of_base: encoders train with their own dropout.
        recompute_mlp: without `checkpoint`, keep all but gate and up, which are multiplied again in the backward: less
            memory than keeping all, faster than `checkpoint` (decoders built as Llama is).
        table_on_host: while learning, the table of input embeddings is in the host's memory; see `memory.offload`.
    """

    pack_tokens: int = 1024
    checkpoint: bool = False
    dropout_of_base: bool = True
    offload: bool = False
    recompute_mlp: bool = False
    table_on_host: bool = False


class Computation(Protocol):
    """Rows in, gradients in the learners' parameters out. Keeps nothing between calls but buffers.

    Attributes:
        name: e.g. "fused decoder"; a plan prints it.
        why: one sentence on why it is this one.
    """

    name: str
    why: str

    @property
    def padded(self) -> bool:
        """Whether rows are made as long as the longest beside them."""
        ...

    @property
    def on_host(self) -> int:
        """Bytes that it keeps in the host's memory for a device, as far as packs have asked for them."""
        ...

    def gradients(self, rows: Sequence[Row]) -> list[Sums]:
        """Add the gradients of each row's summed loss to its learner's parameters' `.grad` (made where None).

        Args:
            rows: all rows of one optimiser step, of all learners, in any order.

        Returns:
            The sums of each learner.
        """
        ...

    def losses(self, rows: Sequence[Row]) -> list[Sums]:
        """The same sums without gradients and with all dropout off."""
        ...

    def loads(self, rows: Sequence[Row], training: bool = True) -> list[Load]:
        """The packs in which `gradients` goes over these rows, or `losses` where not `training`; computes nothing."""
        ...

    def tokens(self, row: Row) -> int:
        """Tokens of a row as its `Sums` count them."""
        ...

    def release(self) -> None:
        """Give all buffers back; a later call makes them anew."""
        ...


def make_computation(base: Base, learners: Sequence[Learner], settings: Settings) -> Computation:
    """The fastest computation that covers this base and these learners; each learner has the kind it has alone."""
    from .divided import Divided, Share

    makers = {"decoder": _decoder, "encoder": _encoder, "modules": _modules}
    groups: dict[tuple[str, str], list[int]] = {}
    for i, learner in enumerate(learners):
        groups.setdefault((_kind(base, learner), learner.task_type), []).append(i)
    shares = [
        Share(tuple(places), makers[kind](base, [learners[i] for i in places], settings))
        for (kind, _), places in groups.items()
    ]
    return shares[0].computation if len(shares) == 1 else Divided(shares)


def heeded(base: Base, learners: Sequence[Learner]) -> frozenset[str]:
    """Which of the `Settings` that save memory change something here: `recompute_mlp`, `offload` and
    `table_on_host`; every computation heeds `pack_tokens` and `checkpoint`.
    """
    from .memory.offload import movable_table

    kinds = [_kind(base, learner) for learner in learners]
    found = set()
    if "decoder" in kinds:
        found.add("recompute_mlp")
        if base.device.type == "cuda":
            found.add("offload")
        if set(kinds) == {"decoder"} and movable_table(base) is not None:
            found.add("table_on_host")
    return frozenset(found)


def _kind(base: Base, learner: Learner) -> str:
    """The kind of computation that covers a learner."""
    return next(kind for kind in ("decoder", "encoder", "modules") if _declined(kind, base, learner) is None)


def _declined(kind: str, base: Base, learner: Learner) -> str | None:
    """Why a kind of computation does not cover this learner; None where it does."""
    from .decoder import parts as decoder_parts
    from .encoder import parts as encoder_parts

    if kind == "decoder":
        return decoder_parts.not_covered(base, [learner])
    return encoder_parts.not_covered(base, [learner]) if kind == "encoder" else None


def _decoder(base: Base, learners: Sequence[Learner], settings: Settings) -> Computation:
    from .decoder.fused import FusedDecoder

    return FusedDecoder(base, learners, settings)


def _encoder(base: Base, learners: Sequence[Learner], settings: Settings) -> Computation:
    from .encoder.fused import FusedEncoder

    return FusedEncoder(base, learners, settings)


def _modules(base: Base, learners: Sequence[Learner], settings: Settings) -> Computation:
    from .modules.computation import ModuleComputation

    made = ModuleComputation(base, learners, settings)
    made.why = _declined("encoder" if base.kind == "encoder" else "decoder", base, learners[0]) or made.why
    return made
