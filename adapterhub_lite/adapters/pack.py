"""The tensors of an adapter as its products read them, packed by groups of layers that share their input.

A base computes q, k and v (gate and up) of one input, so their down matrices lie side by side and one product makes the
hidden values of all. Down is kept as [in, R] and up as [R, out]: with few rows both products then read memory straight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .lora import LoraSite

Group = tuple[nn.Module, ...]
"""Linear layers of one input, in the order of a fused weight's rows."""


@dataclass(frozen=True)
class Pack:
    """One adapter at one group of layers.

    Attributes:
        down: [in, R], the members' down matrices side by side.
        ups: for each member [rank, out]; None where the adapter leaves a layer alone.
        gains, biases: for each member [out], or None.
        scale: [in], the factor on the input of all members, or None.
    """

    down: torch.Tensor
    ups: tuple[torch.Tensor | None, ...]
    gains: tuple[torch.Tensor | None, ...]
    biases: tuple[torch.Tensor | None, ...]
    scale: torch.Tensor | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank at each member; 0 where there is none."""
        return tuple(0 if up is None else int(up.shape[0]) for up in self.ups)


def pack(sites: Mapping[nn.Module, LoraSite], groups: Iterable[Group]) -> dict[Group, Pack]:
    """Pack the sites of an adapter, in the device and dtype they are in; a site of no group is a group of its own.

    So is a site that scales its input: the others of its group read that input as it is.
    """
    packs: dict[Group, Pack] = {}
    left = dict(sites)
    together = {module: site for module, site in sites.items() if site.scale is None}
    for group in groups:
        members = [left.pop(module) if module in together else None for module in group]
        if any(member is not None for member in members):
            packs[group] = _pack(members)
    packs |= {(module,): _pack([site]) for module, site in left.items()}
    return packs


def unpack(group: Group, packed: Pack) -> Iterator[tuple[nn.Module, LoraSite]]:
    """The sites of a group, as views of its pack."""
    column = 0
    for module, up, gain, bias in zip(group, packed.ups, packed.gains, packed.biases, strict=True):
        if up is not None:
            yield module, LoraSite(packed.down[:, column : column + up.shape[0]].t(), up.t(), gain, bias, packed.scale)
            column += up.shape[0]


def _pack(members: Sequence[LoraSite | None]) -> Pack:
    downs = [site.down.t() for site in members if site is not None]
    return Pack(
        (downs[0] if len(downs) == 1 else torch.cat(downs, 1)).contiguous(),
        tuple(None if site is None else site.up.t().contiguous() for site in members),
        tuple(None if site is None else site.gain for site in members),
        tuple(None if site is None else site.bias for site in members),
        members[0].scale if len(members) == 1 and members[0] is not None else None,
    )
